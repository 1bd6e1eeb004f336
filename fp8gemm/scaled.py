"""The core data types: granularity, scaled tensor, scheme and options. Imports only torch and the standard library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

ScaleFormat = Literal["float32", "ue8m0"]
SchemeName = Literal["row", "tensor", "block", "weight_only"]
WeightStorage = Literal["keep", "cpu_offload", "discard"]
Accumulate = Literal["auto", "fast", "precise"]
Rounding = Literal["nearest", "stochastic"]
Precision = Literal["fp8", "weight_only", "original"]
WeightSearch = Literal["none", "scales", "rounding"]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Granularity:
    """How many elements share one scale, along the last two dimensions; ``None`` means all of them.

    ``Granularity(1, None)`` is one scale per row, ``Granularity(128, 128)`` one scale per 128 x 128 block. The last
    block of a dimension may be smaller.

    Example:
        >>> Granularity(128, 128).scale_shape((300, 256))
        (3, 2)
    """

    rows: int | None
    cols: int | None

    def __post_init__(self) -> None:
        for name, size in (("rows", self.rows), ("cols", self.cols)):
            if size is not None and size < 1:
                raise ValueError(f"Granularity.{name} must be None or at least 1, found {size}")

    @property
    def by_row(self) -> bool:
        """Whether scales vary only from row to row, so that they can be applied to the output columns instead."""
        return self.cols is None and self.rows is not None

    def block(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """The (rows, cols) of one block in a tensor of this ``shape``; at least 1, even for empty tensors."""
        n, k = shape[-2:]
        return (max(n, 1) if self.rows is None else self.rows, max(k, 1) if self.cols is None else self.cols)

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales for a tensor of this ``shape``: leading dimensions, then the grid of blocks."""
        rows, cols = self.block(shape)
        n, k = shape[-2:]
        return (*shape[:-2], _ceil_div(max(n, 1), rows), _ceil_div(max(k, 1), cols))

    def __str__(self) -> str:
        return _GRANULARITY_NAMES.get(self, f"{self.rows or 'all'}x{self.cols or 'all'}")


TENSOR = Granularity(None, None)
ROW = Granularity(1, None)
GROUP_128 = Granularity(1, 128)
BLOCK_128 = Granularity(128, 128)
MX = Granularity(1, 32)
_GRANULARITY_NAMES = {TENSOR: "tensor", ROW: "row", GROUP_128: "1x128", BLOCK_128: "128x128", MX: "1x32"}


@dataclass(frozen=True)
class ScaledTensor:
    """``x[..., i, j] ≈ data[..., i, j] * scale[..., i // rows, j // cols]``: FP8 data and its scales.

    ``data`` is ``[..., N, K]`` in an FP8 dtype; ``scale`` is float32 of shape
    ``granularity.scale_shape(data.shape)`` on the same device. Leading dimensions are experts.

    Raises:
        ValueError: dtype, shape or device are inconsistent with this equation.

    Example:
        >>> codes = torch.zeros(4, 8, dtype=torch.float8_e4m3fn)
        >>> ScaledTensor(codes, torch.ones(4, 1), Granularity(1, None)).nbytes
        48
    """

    data: torch.Tensor
    scale: torch.Tensor
    granularity: Granularity

    def __post_init__(self) -> None:
        if self.data.dtype not in FP8_DTYPES:
            raise ValueError(f"ScaledTensor.data must be one of {_names(FP8_DTYPES)}, found {self.data.dtype}")
        if self.data.dim() < 2:
            raise ValueError(f"ScaledTensor.data must have at least 2 dimensions, found shape {tuple(self.data.shape)}")
        if self.scale.dtype != torch.float32:
            raise ValueError(f"ScaledTensor.scale must be torch.float32, found {self.scale.dtype}")
        expected = self.granularity.scale_shape(self.data.shape)
        if tuple(self.scale.shape) != expected:
            raise ValueError(
                f"scales of granularity {self.granularity} for data of shape {tuple(self.data.shape)} have shape "
                f"{expected}, found {tuple(self.scale.shape)}"
            )
        if self.scale.device != self.data.device:
            raise ValueError(f"data is on {self.data.device} but scale is on {self.scale.device}")

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def clone(self) -> ScaledTensor:
        """A contiguous copy that shares no memory with this one."""
        data = self.data.view(torch.uint8).clone(memory_format=torch.contiguous_format).view(self.data.dtype)
        return ScaledTensor(data, self.scale.clone(memory_format=torch.contiguous_format), self.granularity)

    def detach(self) -> ScaledTensor:
        """The same memory as new tensor objects, without what an engine has attached to those that it runs."""
        return ScaledTensor(self.data.detach(), self.scale.detach(), self.granularity)

    def to(self, device: torch.device | str) -> ScaledTensor:
        return ScaledTensor(self.data.to(device), self.scale.to(device), self.granularity)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are stored and how activations may be quantized.

    ``activation=None`` means weight-only. Otherwise it is the coarsest quantization of activations that is allowed:
    an engine may quantize them more finely or not at all, never more coarsely. ``static`` activations are scaled by a
    calibrated constant instead of their own maximum (amax).

    Example:
        >>> print(Scheme(weight=Granularity(1, None), activation=None))
        weight row, activation kept
    """

    weight: Granularity
    activation: Granularity | None
    static: bool = False
    scale_format: ScaleFormat = "float32"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the FP8 data and float32 scales of a weight ``[..., N, K]``.

        Example:
            >>> SCHEMES["row"].nbytes((32, 64))
            2176
        """
        return math.prod(shape) + 4 * math.prod(self.weight.scale_shape(shape))

    def weight_only(self) -> Scheme:
        """The same scheme for weights, with activations left unquantized."""
        return replace(self, activation=None, static=False)

    def at(self, precision: Precision) -> Scheme:
        """The scheme of products at this precision: weight-only if that is asked for, else the same."""
        return self.weight_only() if precision == "weight_only" else self

    def calibrated(self) -> Scheme:
        """The same scheme with one static scale for all activations; itself if it keeps them, or scales groups.

        Example:
            >>> print(SCHEMES["row"].calibrated())
            weight row, activation static tensor
        """
        if self.activation is None or self.activation.cols is not None:
            return self
        return replace(self, activation=TENSOR, static=True)

    def dynamic(self) -> Scheme:
        """The same scheme with activations that are scaled by their own maximum, one for each scale of a weight row."""
        if not self.static:
            return self
        return replace(self, activation=TENSOR if self.weight.rows is None else ROW, static=False)

    def __str__(self) -> str:
        how = "kept" if self.activation is None else f"{'static ' if self.static else ''}{self.activation}"
        ue8m0 = ", ue8m0" if self.scale_format == "ue8m0" else ""
        return f"weight {self.weight}, activation {how}{ue8m0}"


SCHEMES: Mapping[SchemeName, Scheme] = MappingProxyType(
    {
        "row": Scheme(weight=ROW, activation=ROW),
        "tensor": Scheme(weight=TENSOR, activation=TENSOR),
        "block": Scheme(weight=BLOCK_128, activation=GROUP_128),
        "weight_only": Scheme(weight=ROW, activation=None),
    }
)


@dataclass(frozen=True, kw_only=True)
class FP8GemmOptions:
    """How ``enable_fp8_gemm`` treats each layer.

    Attributes:
        cast_inputs: cast an input of another floating-point dtype to the layer's compute dtype; if False, such an
            input raises, as it does in ``nn.Linear``.
        cast_output_back: cast the output to the dtype that the input had before it was cast.
        fp16_weight_storage: what happens to the original weight. ``"discard"`` frees it, layer by layer, which leaves
            half the memory of 16-bit weights; undo then gives dequantized weights. ``"keep"`` keeps it alongside the
            FP8 weight: undo is exact, and on a GPU it runs where FP8 is expected to be slower. ``"cpu_offload"`` keeps
            it in CPU memory: undo is exact.
        materialize_fp8_on_wrap: quantize while patching, if the weight is on a real device; otherwise at the first
            call, on the device of the input.
        scheme: ``"row"``, ``"tensor"``, ``"block"`` (128 x 128) or ``"weight_only"``, or a ``Scheme``.
        engine: ``"auto"`` or the name of an engine, which then runs or raises with its reasons.
        strict: whether nothing to convert, or a pattern that matches nothing, is an error (True) or a warning (False).
        weight_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        accumulate: where FP8 products on a GPU keep partial sums: ``"fast"``, in the tensor cores' own accumulator,
            which has about 14 bits on Ada and Hopper; ``"precise"``, in float32 after at most 128 products;
            ``"auto"``, fast up to K = 8192. Engines that cannot do what was asked are skipped.
        rounding: how values written into a quantized weight (merged adapters, for example) are rounded: ``"nearest"``,
            or ``"stochastic"``, which on average preserves changes that are small relative to the weight.
        weight_search: how scales and codes of weights are chosen, at the same bytes: ``"none"``, scales from the
            largest values and rounding to nearest; ``"scales"``, among a few scales those with the least squared error,
            weighted by what ``enable_fp8_gemm``'s ``calibration_inputs`` give each input channel; ``"rounding"``, which
            needs them, error-compensated rounding (GPTQ). See docs/calibrate.md.
        embeddings: also convert embedding tables, whose rows are then looked up in FP8. A table that is tied to a head
            is converted with it in any case.
        generator: the random number generator for stochastic rounding; by default torch's own.

    Raises:
        ValueError: for an invalid value; the message lists the valid ones.

    Example:
        >>> FP8GemmOptions(scheme="block", fp16_weight_storage="keep").resolved_scheme.weight
        Granularity(rows=128, cols=128)
    """

    cast_inputs: bool = True
    cast_output_back: bool = True
    fp16_weight_storage: WeightStorage = "discard"
    materialize_fp8_on_wrap: bool = True
    scheme: SchemeName | Scheme = "row"
    engine: str = "auto"
    strict: bool = True
    weight_dtype: torch.dtype = field(default=torch.float8_e4m3fn)
    accumulate: Accumulate = "auto"
    rounding: Rounding = "nearest"
    weight_search: WeightSearch = "none"
    embeddings: bool = False
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.fp16_weight_storage not in get_args(WeightStorage):
            raise ValueError(
                f"fp16_weight_storage must be one of {', '.join(get_args(WeightStorage))}, "
                f"found {self.fp16_weight_storage!r}"
            )
        if not isinstance(self.scheme, Scheme) and self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be a Scheme or one of {', '.join(SCHEMES)}, found {self.scheme!r}")
        if self.accumulate not in get_args(Accumulate):
            raise ValueError(f"accumulate must be one of {', '.join(get_args(Accumulate))}, found {self.accumulate!r}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, found {self.rounding!r}")
        if self.weight_search not in get_args(WeightSearch):
            raise ValueError(
                f"weight_search must be one of {', '.join(get_args(WeightSearch))}, found {self.weight_search!r}"
            )
        if self.weight_dtype not in FP8_DTYPES:
            raise ValueError(f"weight_dtype must be one of {_names(FP8_DTYPES)}, found {self.weight_dtype}")

    @property
    def resolved_scheme(self) -> Scheme:
        return self.scheme if isinstance(self.scheme, Scheme) else SCHEMES[self.scheme]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
