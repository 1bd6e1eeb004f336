"""DeepGEMM's products for weights with 128x128 blocks: its own package, or the copy inside vLLM's wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from ..errors import UnsupportedError
from ..numerics import encode_ue8m0
from ..scaled import BLOCK_128, GROUP_128, ScaledTensor, Scheme
from .activations import quantize_tokens
from .base import Engine, Machine, MatmulSpec, PackedWeight
from .padding import cropped, padded, widened

ROWS, COLS = 64, 128  # multiples of N and K, for every version: asserted by DeepGEMM 1, and still followed by vLLM
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLACES = (("deep_gemm", ""), ("vllm", "third_party/deep_gemm"))
_ABSENT = (
    "DeepGEMM 2.2 or newer is not installed for this Python; build it from github.com/deepseek-ai/DeepGEMM "
    "(PyPI's deep-gemm is 1.0), or pip install 'vllm>=0.20', which includes it"
)
_NO_COMPILER = (
    "DeepGEMM compiles its kernels when they are first used: needs a CUDA toolkit with nvcc in CUDA_HOME, on PATH or "
    "in /usr/local/cuda (DG_JIT_USE_NVRTC=1 works without nvcc)"
)


@dataclass(frozen=True, kw_only=True)
class DeepGemm:
    """The DeepGEMM that was found, and the toolkit that it compiles with."""

    present: bool = False
    nvcc: bool = False

    def __str__(self) -> str:
        return f"{'' if self.present else 'not '}installed, {'with' if self.nvcc else 'without'} nvcc"


class DeepGemmEngine(Engine):
    """Block scaling through ``deep_gemm.fp8_gemm_nt``, which always accumulates in float32 and returns bfloat16.

    ``auto`` never chooses it, because it was not measured here; request it with ``engine="deep_gemm"``. The first
    product of each N and K compiles for seconds, so run the model once before capturing a CUDA graph. N is padded with
    zeros to a multiple of 64, and K to a multiple of 128. On compute capability 10.x DeepGEMM supports only
    power-of-two scales, and packs the weight's scales again in every call.
    """

    name = "deep_gemm"
    tolerance = 8e-3  # Hopper's 14-bit accumulator within 128 products, and rounding to bfloat16

    def probe(self, device: torch.device, machine: Machine) -> DeepGemm | None:
        return DeepGemm(present=find() is not None, nvcc=_compiles()) if machine.device == "cuda" else None

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        found = machine.facts(self.name, DeepGemm) or DeepGemm()
        reasons = []
        if machine.device != "cuda":
            reasons.append(f"runs on cuda only, found {machine.device}")
        elif machine.capability != (9, 0) and (machine.capability or (0, 0))[0] != 10:
            capability = "unknown" if machine.capability is None else "{}.{}".format(*machine.capability)
            reasons.append(f"needs compute capability 9.0 or 10.x, found {capability}")
        elif machine.capability != (9, 0) and spec.scheme.scale_format != "ue8m0":
            reasons.append(f"on compute capability 10.x scales must be powers of two (ue8m0), found {spec.scheme}")
        if not found.present:
            reasons.append(_ABSENT)
        if not found.nvcc:
            reasons.append(_NO_COMPILER)
        if (spec.scheme.weight, spec.scheme.activation) != (BLOCK_128, GROUP_128):
            reasons.append(f"scales are 128x128 with 1x128 activations; found {spec.scheme}")
        if spec.experts:
            reasons.append(
                "its grouped products need each expert's tokens padded to 128, which takes their counts on the host or "
                "a padded copy of the longest list"
            )
        if spec.compute_dtype not in _DTYPES:
            reasons.append(
                f"returns bfloat16, float16 or float32, not {str(spec.compute_dtype).removeprefix('torch.')}"
            )
        if spec.weight_dtype != torch.float8_e4m3fn:
            reasons.append(f"multiplies e4m3 by e4m3, found weights in {spec.weight_dtype}")
        return reasons

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        if scheme.scale_format == "ue8m0":
            try:
                encode_ue8m0(weight.scale)
            except ValueError as error:  # DeepGEMM would drop the mantissas
                raise UnsupportedError(
                    f"{scheme} needs power-of-two scales, but the weight has others: {error}"
                ) from error
        n, k = weight.shape
        return PackedWeight(
            engine=self.name,
            scheme=scheme,
            n=n,
            k=k,
            data=padded(weight.data, ROWS, COLS),
            scale=weight.scale,
            input_scale=input_scale,
            # Row-major with the strides implied by its shape, which DeepGEMM asserts even for a single row.
            extra={"scale": weight.scale.reshape(-1).view(weight.scale.shape)},
            dtypes=_DTYPES,
        )

    def restore(self, packed: PackedWeight) -> ScaledTensor:
        return ScaledTensor(cropped(packed), packed.scale, packed.scheme.weight)

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        m = x.shape[0]
        if m == 0 or weight.n == 0 or weight.k == 0:
            y = x.new_zeros(m, weight.n, dtype=out_dtype)
        else:
            ue8m0 = weight.scheme.scale_format == "ue8m0"
            wide = x.new_empty(m, weight.data.shape[0], dtype=torch.bfloat16)
            with torch.cuda.device(x.get_device()):  # DeepGEMM launches on the current device
                xq = quantize_tokens(widened(x, weight), GROUP_128, scale_format=weight.scheme.scale_format)
                wq = weight.data, weight.extra["scale"]
                load().fp8_gemm_nt(xq, wq, wide, disable_ue8m0_cast=not ue8m0)
            y = wide[:, : weight.n].to(out_dtype)
        return y if bias is None else y + bias.to(out_dtype)

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        return "deep_gemm fp8_gemm_nt"


@cache
def find() -> tuple[str, Path] | None:
    """DeepGEMM's module name and folder, an installed package before vLLM's copy; imports neither."""
    for package, inside in _PLACES:
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            folder = Path(place, inside)
            # Version 1, the one on PyPI, has no compiled part; vLLM's wheel has one for each of several Python
            # versions.
            if any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
                return ".".join((package, *Path(inside).parts)), folder
    return None


def _compiles() -> bool:
    """Whether DeepGEMM will find a compiler; looks in the same places (its README, environment variables)."""
    on_path = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    toolkit = Path(home) if home else Path(on_path).parent.parent if on_path else Path("/usr/local/cuda")
    if os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
        return toolkit.is_dir()
    return Path(os.environ.get("DG_JIT_NVCC_COMPILER") or toolkit / "bin" / "nvcc").is_file()


@cache
def load() -> ModuleType:
    """Imports DeepGEMM; vLLM's copy under its own name, without importing vLLM, which takes seconds.

    Raises:
        UnsupportedError: it is not installed, or it cannot be imported.
    """
    found = find()
    if found is None:
        raise UnsupportedError(_ABSENT)
    name, folder = found
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # another torch, or no CUDA toolkit
        del sys.modules[name]
        raise UnsupportedError(f"DeepGEMM in {folder} cannot be imported: {error!r}") from error
    return module
