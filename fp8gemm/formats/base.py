"""What a checkpoint format consists of: key names, scale shapes and a config; no files and no models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..numerics import decode_ue8m0
from ..scaled import FP8_DTYPES, Granularity, ScaledTensor, Scheme
from .arrangements import Arrangement
from .rotations import rotation

Read = Callable[[str], torch.Tensor]
Part = Callable[[torch.Tensor], torch.Tensor]
UE8M0_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *UE8M0_DTYPES)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a file's header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything known about a checkpoint without reading its tensors.

    ``tensors`` by key, ``metadata`` from the files' headers, ``config`` the quantization config (empty if there is
    none), ``model_config`` the whole config.json (None if there is none), ``files`` the names of the files. ``read``
    reads one tensor, for formats that store their description in small ones. ``raw`` is the user's word that FP8
    tensors without a scale are values.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] | None = None
    files: tuple[str, ...] = ()
    read: Read | None = None
    raw: bool = False

    @property
    def method(self) -> str:
        return str(self.config.get("quant_method") or "")

    @cached_property
    def rotation(self) -> str:
        """Why weights are not what a model multiplies with, if the config turns a rotation on; else empty."""
        return rotation(self.config)

    @property
    def holds_fp8(self) -> bool:
        return any(info.dtype in FP8_DTYPES for info in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class Names:
    """How the tensors of one layer are named: suffixes of the layer's own name."""

    weight: str
    scales: tuple[str, ...]
    input_scales: tuple[str, ...] = ()
    zero_points: tuple[str, ...] = ()


LINEAR = Names(
    weight=".weight",
    scales=(
        ".weight_scale",
        ".weight_scale_inv",
        ".scale_weight",
        ".qscale_weight",
        ".weights_scaling_factor",
        ".scale",
    ),
    input_scales=(".input_scale", ".activation_scale", ".scale_input", ".qscale_act", ".activation_scaling_factor"),
    zero_points=(".weight_zero_point", ".input_zero_point"),
)
# Stacked experts are a bare parameter without ".weight"; its scales are parameters of the same module.
STACKED = Names(
    weight="",
    scales=("_scale", "_scale_inv", "_weight_scale", "_weight_scale_inv", ".weight_scale", ".weight_scale_inv"),
    input_scales=("_activation_scale", "_input_scale", ".input_scale", ".activation_scale"),
)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """How a format quantizes activations; ``static`` is None if only the tensors tell."""

    granularity: Granularity | None
    static: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One FP8 weight on disk: the keys that hold it and how to build a ``ScaledTensor`` from them.

    ``scale`` is None for a raw cast, whose scale is 1. ``part`` extracts this weight's share of a scale tensor that
    covers several experts, or arranges it; ``arrange`` brings the stored bytes into ``shape``.
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme
    scale: str | None
    scale_dtype: torch.dtype = torch.float32
    input_scale: str | None = None
    zero_points: tuple[str, ...] = ()
    part: Part | None = None
    arrange: Part | None = None

    @property
    def granularity(self) -> Granularity:
        return self.scheme.weight

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() + 4 * torch.Size(self.granularity.scale_shape(self.shape)).numel()

    def read(self, read: Read) -> ScaledTensor:
        """The bytes unchanged and the scales converted exactly to float32.

        Raises:
            CheckpointError: a scale is not finite, or a zero point is not zero.
        """
        data = read(self.weight)
        if data.dtype != self.dtype:
            data = data.view(self.dtype)
        if self.arrange is not None:
            data = self.arrange(data.view(torch.uint8)).contiguous().view(self.dtype)
        for key in self.zero_points:
            if bool(read(key).to(torch.float32).ne(0).any()):
                raise CheckpointError(f"{key} is not zero; only symmetric FP8 (zero points of 0) can be read")
        return ScaledTensor(data, self.read_scale(read), self.granularity)

    def read_scale(self, read: Read) -> torch.Tensor:
        """The float32 scales, in the shape that ``granularity`` requires."""
        grid = self.granularity.scale_shape(self.shape)
        if self.scale is None:
            return torch.ones(grid, dtype=torch.float32, device="cpu")
        scale = widen(read(self.scale))
        if self.part is not None:
            scale = self.part(scale)
        scale = scale.expand(grid) if scale.numel() == 1 and len(grid) > 2 else scale.reshape(grid)
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(f"{self.scale}, the scale of {self.weight}, holds non-finite values")
        return scale.contiguous()

    def read_input_scale(self, read: Read) -> torch.Tensor | None:
        """The static activation scale, a float32 scalar (``[E]`` for stacked experts)."""
        if self.input_scale is None or not self.scheme.static:
            return None
        scale = widen(read(self.input_scale))
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CheckpointError(f"{self.input_scale} must be finite and positive, found {scale.flatten().tolist()}")
        # One for each of the projections that a matrix joins: none saturates with the largest.
        scale = scale.amax() if len(self.shape) == 2 else scale
        return scale.reshape(()) if scale.numel() == 1 else scale.contiguous()


def widen(scale: torch.Tensor) -> torch.Tensor:
    """A scale stored in any dtype as float32; exact for all but float64."""
    return decode_ue8m0(scale) if scale.dtype in UE8M0_DTYPES else scale.to(torch.float32)


@dataclass
class Layout:
    """What each key of a checkpoint is.

    ``plain`` and ``layers`` by canonical name; ``kv_scales`` name -> key; ``unused`` key -> why nothing reads it;
    ``unknown`` keys that look like scales but belong to no weight; ``companions`` name of an FP8 weight -> keys beside
    it whose meaning is unknown; ``unsupported`` name -> reason; ``suspicious`` messages for the user.
    """

    plain: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    kv_scales: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    companions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    suspicious: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A layer to be written; ``scale_dtype`` is a dtype that represents its scales exactly."""

    scheme: Scheme
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float8_e4m3fn
    scale_dtype: torch.dtype = torch.float32


class Format:
    """A way to name and describe FP8 layers. The base class uses only what the tensors themselves tell."""

    name: ClassVar[str] = ""
    names: ClassVar[tuple[Names, ...]] = (LINEAR, STACKED)
    writable: ClassVar[bool] = False
    single_file: ClassVar[bool] = False  # written as one file without config.json
    strips: ClassVar[bool] = False  # whether canonical names drop a prefix of the keys

    def recognises(self, contents: Contents) -> str:
        """Why this format claims the checkpoint; empty if it does not."""
        raise NotImplementedError

    def names_of(self, key: str) -> tuple[Names, str]:
        """The naming that ``key`` follows, and its module; a bare parameter is its own."""
        for names in self.names:
            if names.weight and key.endswith(names.weight):
                return names, key[: -len(names.weight)]
        return next((names for names in self.names if not names.weight), self.names[0]), key

    def canonical(self, key: str) -> str:
        """The name of the module parameter that ``key`` stores."""
        return key

    def is_marker(self, key: str) -> bool:
        """Whether ``key`` describes other tensors and holds no data of its own."""
        return False

    def fp8_dtype(self, key: str, info: TensorInfo, contents: Contents) -> torch.dtype | None:
        """The FP8 dtype of a stored tensor, None if it is not FP8."""
        return info.dtype if info.dtype in FP8_DTYPES else None

    def allows_raw(self, contents: Contents) -> bool:
        """Whether FP8 tensors may come without any scale, which means a scale of 1."""
        return contents.raw

    def infers_blocks(self, contents: Contents, module: str) -> bool:
        """Whether the size of square blocks may be told from a grid of scales that divides the weight evenly."""
        return False

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        """What the config says about the scales of ``module``, most likely first; shapes decide between them."""
        return ()

    def arrangement(self, contents: Contents, key: str, scale: str) -> Arrangement | None:
        """How the weight ``key`` with this scale is stored, if not as it is in the model.

        Raises:
            CheckpointError: the shapes do not fit what the file says.
        """
        return None

    def unreadable(self, contents: Contents, module: str) -> str:
        """Why the weight of ``module`` cannot be read, if the file says that it is not plain FP8; else empty."""
        return contents.rotation

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        """How to quantize the activations of ``module``, whose weight has this granularity."""
        return Activation(granularity=natural_activation(weight))

    def ue8m0(self, contents: Contents, scale: TensorInfo) -> bool:
        """Whether scales are declared to be powers of two."""
        return scale.dtype in UE8M0_DTYPES

    def check(self, contents: Contents, layout: Layout) -> None:
        """Adds to ``layout.suspicious`` where the config disagrees with the tensors."""

    def refuses(self, layers: Mapping[str, Written]) -> list[str]:
        """All reasons why these layers cannot be written in this format; empty if they can."""
        raise NotImplementedError

    def stored(self, name: str, layer: Written) -> dict[str, TensorInfo]:
        """The tensors that ``write`` makes from the layer ``name``."""
        raise NotImplementedError

    def write(
        self, name: str, layer: Written, weight: ScaledTensor, input_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The tensors of the layer ``name`` as the format stores them, bit for bit."""
        raise NotImplementedError

    def write_config(self, layers: Mapping[str, Written], unquantized: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``unquantized`` are the modules whose weights are not quantized."""
        raise NotImplementedError


def natural_activation(weight: Granularity) -> Granularity:
    """The activation granularity that matches a weight's, for files that do not specify one."""
    if weight.rows is None:
        return Granularity(None, None)
    return Granularity(1, weight.cols)
