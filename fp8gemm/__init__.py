"""fp8gemm: one line makes any PyTorch model run its matrix products on FP8 weights."""

from .analysis.estimate import estimate
from .analysis.gain import Estimate, LayerEstimate
from .analysis.measure import measure
from .analysis.measurement import LayerError, Measurement
from .analysis.roles import roles
from .analysis.tune import tune
from .analysis.tuning import Tuning
from .checkpoint import (
    Checkpoint,
    LoadReport,
    Split,
    Swap,
    WriteReport,
    convert_checkpoint,
    load_checkpoint,
    open_checkpoint,
    original_key_mapping,
    quantize_checkpoint,
    save_checkpoint,
)
from .engines import ENGINES, Choice, Machine, MatmulSpec, choose, probe, register_engine
from .errors import CheckpointError, UnsupportedError
from .formats import register_format
from .models.calibration import CalibratedLayer, Calibration, calibrate, count_saturation
from .models.gated import fuse_gated
from .models.layerwise import layerwise_casting_filter
from .models.patch import disable_fp8_gemm, enable_fp8_gemm
from .models.pause import paused
from .models.precision import precision_schedule, set_precision
from .models.recipe import Recipe
from .models.selection import plan
from .models.siblings import Fused, fuse_siblings
from .models.warmup import warmup
from .numerics import dequantize, quantize
from .scaled import (
    BLOCK_128,
    GROUP_128,
    MX,
    ROW,
    SCHEMES,
    TENSOR,
    FP8GemmOptions,
    Granularity,
    ScaledTensor,
    Scheme,
)
from .weights import FP8Linear, FP8Weight
from .weights.report import Coverage, Report, report
from .weights.strict import strict

__version__ = "0.1.0"

__all__ = [
    "BLOCK_128",
    "ENGINES",
    "GROUP_128",
    "MX",
    "ROW",
    "SCHEMES",
    "TENSOR",
    "CalibratedLayer",
    "Calibration",
    "Checkpoint",
    "CheckpointError",
    "Choice",
    "Coverage",
    "Estimate",
    "FP8GemmOptions",
    "FP8Linear",
    "FP8Weight",
    "Fused",
    "Granularity",
    "LayerError",
    "LayerEstimate",
    "LoadReport",
    "Machine",
    "MatmulSpec",
    "Measurement",
    "Recipe",
    "Report",
    "ScaledTensor",
    "Scheme",
    "Split",
    "Swap",
    "Tuning",
    "UnsupportedError",
    "WriteReport",
    "calibrate",
    "choose",
    "convert_checkpoint",
    "count_saturation",
    "dequantize",
    "disable_fp8_gemm",
    "enable_fp8_gemm",
    "estimate",
    "fuse_gated",
    "fuse_siblings",
    "layerwise_casting_filter",
    "load_checkpoint",
    "measure",
    "open_checkpoint",
    "original_key_mapping",
    "paused",
    "plan",
    "precision_schedule",
    "probe",
    "quantize",
    "quantize_checkpoint",
    "register_engine",
    "register_format",
    "report",
    "roles",
    "save_checkpoint",
    "set_precision",
    "strict",
    "tune",
    "warmup",
]
