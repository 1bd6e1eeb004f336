"""The interface of all engines, and the dataclasses that describe a problem, a machine and a choice between engines."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch

from .. import native
from ..scaled import COMPUTE_DTYPES, Accumulate, Granularity, ScaledTensor, Scheme

# Up to this K, partial sums may stay in the 14-bit accumulator of Ada and Hopper, as in vLLM, FBGEMM and TensorRT-LLM;
# torch's CUTLASS products stop doing so at 16384 (pytorch#153809).
# What such sums lose is emulated by benchmarks/accumulation.py: a twelfth of FP8's own error is reached after 8192.
FAST_UP_TO_K = 8192

Facts = TypeVar("Facts")


def major_minor(version: str) -> tuple[int, int]:
    """The first two numbers of a library's version.

    Example:
        >>> major_minor("2.13.0+cpu")
        (2, 13)
    """
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """A problem: ``y [M, n] = x [M, k] @ w [n, k].T`` under a scheme, for activations of ``compute_dtype``.

    ``experts`` > 0 means a stack ``w [experts, n, k]`` for ``Engine.grouped``; ``accumulate`` is as in
    ``FP8GemmOptions``.

    Example:
        >>> from fp8gemm import SCHEMES
        >>> MatmulSpec(scheme=SCHEMES["block"], n=512, k=256).experts
        0
    """

    scheme: Scheme
    n: int
    k: int
    compute_dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    experts: int = 0
    accumulate: Accumulate = "auto"

    @property
    def fast(self) -> bool:
        """Whether partial sums may stay in Ada's and Hopper's 14-bit accumulator: requested, or K is short enough."""
        return _fast(self.accumulate, self.k)


def _fast(accumulate: Accumulate, k: int) -> bool:
    return accumulate == "fast" or (accumulate == "auto" and k <= FAST_UP_TO_K)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and its software as a plain value, so that the choice for an H100 can be tested on a laptop.

    ``capability`` is CUDA's (major, minor) compute capability. ``features`` names what else the device supports:
    ``"amx_bf16"`` and ``"avx512_bf16"`` for a CPU, ``"native"`` where fp8gemm's compiled kernels are available, and
    ``"gfx942"`` and the like for AMD GPUs. ``system`` is Python's ``sys.platform``. ``found`` has the result of each
    engine's ``probe``, by the engine's name.

    Example:
        >>> Machine(device="cuda", name="NVIDIA H100", capability=(9, 0)).capability
        (9, 0)
    """

    device: str
    name: str = ""
    capability: tuple[int, int] | None = None
    torch_version: tuple[int, int] = (2, 10)
    cuda_version: tuple[int, int] | None = None
    features: frozenset[str] = frozenset()
    system: str = field(default_factory=lambda: sys.platform)
    found: Mapping[str, object] = field(default_factory=dict)

    def facts(self, engine: str, kind: type[Facts]) -> Facts | None:
        """The result of the ``probe`` of the engine of that name; None if it found nothing."""
        facts = self.found.get(engine)
        return facts if isinstance(facts, kind) else None


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight ``[n, k]``, or a stack of ``experts`` of them, in the memory layout of one engine.

    ``data`` and ``scale`` are the bytes and float32 scales, which the layer owns, moves and counts. ``extra`` has
    tensors derived from them for the kernel (views, padded or expanded scales), under names of the engine's choice.
    ``scheme`` is what the engine really computes: its ``activation`` is None where activations are not quantized.
    ``apart`` is the granularity with which ``linear_quantized`` expects activations, for more than ``few`` tokens; None
    if the engine quantizes them inside its product. torch.compile traces these values and no method of an engine, so it
    can fuse the quantization with the operations before it.
    """

    engine: str
    scheme: Scheme
    n: int
    k: int
    data: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)  # a plain dict, which torch.compile can trace
    dtypes: tuple[torch.dtype, ...] = COMPUTE_DTYPES
    accumulate: Accumulate = "auto"
    apart: Granularity | None = None
    few: int = 0
    experts: int = 0
    parts: tuple[PackedWeight, ...] = ()  # of a stack: each expert, sharing its memory
    bare: bool = False  # ``extra`` is left out: inside a trace it would become stale

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which activations of ``dtype`` are multiplied: ``dtype`` if supported, else the engine's
        first."""
        return dtype if dtype in self.dtypes else self.dtypes[0]

    @property
    def fast(self) -> bool:
        """Whether partial sums may stay in Ada's and Hopper's 14-bit accumulator: requested, or K is short enough."""
        return _fast(self.accumulate, self.k)

    def split(self) -> PackedWeight:
        """This stack with its ``parts``, which are views."""
        parts = (
            replace(
                self,
                data=self.data[expert],
                scale=self.scale[expert],
                extra={name: tensor[expert] for name, tensor in self.extra.items()},
                experts=0,
                parts=(),
            )
            for expert in range(self.experts)
        )
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True)
class Trial:
    """A product by one kernel: its name, M, and ``run(x [M, K], bias [N]) -> y [M, N]``."""

    kernel: str
    m: int
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Engine(ABC):
    """A stateless implementation of products with an FP8 weight.

    ``name`` is what users pass as ``engine=``. ``tolerance`` is the largest relative Frobenius error of a bfloat16
    output against the float32 product of the dequantized operands. ``traceable`` says whether torch.compile may trace
    into the engine.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float] = 4e-3
    traceable: ClassVar[bool] = False

    def probe(self, device: torch.device, machine: Machine) -> object | None:
        """Looks for what only this engine needs on a device, such as a library; None if it finds or needs nothing.

        The result is a frozen dataclass whose ``str`` is shown by ``fp8gemm doctor``. It becomes
        ``machine.found[self.name]``, where ``rejects`` reads it. Called once per device, with a ``machine`` whose
        ``found`` is still empty.
        """
        return None

    @abstractmethod
    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        """All reasons why this engine cannot run ``spec`` on ``machine``; empty if it can.

        It depends on the arguments only, so that it can be called for machines other than this one.
        """

    @abstractmethod
    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """``y [M, n] = x [M, k] @ w.T + bias [n]`` in ``out_dtype``; ``x`` has unit stride along k, and M may be 0."""

    def effective(self, scheme: Scheme) -> Scheme:
        """What the engine makes of ``scheme``: the same scheme, or its weight-only variant."""
        return scheme

    def rounds(self, m: int, weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Scheme:
        """The scheme that ``linear`` really applies to ``m`` tokens: weight-only where it does not quantize them."""
        return weight.scheme

    def bind(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``linear`` with all decisions made, for inputs with the shape, dtype, device and alignment of ``x [..., K]``.

        The returned function maps such an input, contiguous, to ``y [..., N]``; weight and bias must stay in their
        memory. None if the engine has nothing to decide in advance.
        """
        return None

    def linear_quantized(
        self, x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """``linear`` for activations that were quantized with the granularity ``weight.apart``."""
        raise NotImplementedError(f"engine {self.name} rounds activations inside its product")

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """``linear`` of ``silu(gate) * up``, each ``[M, K]`` with unit stride along K.

        None where the engine has no kernel that fuses the activation function with the quantization.
        """
        return None

    def loses(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether a kept 16-bit weight multiplies ``m`` tokens of ``dtype`` faster than this engine."""
        return False

    def trials(self, weight: PackedWeight, dtype: torch.dtype) -> Iterator[Trial]:
        """Products of ``weight`` that together run every kernel ``linear`` chooses among, for ``engines.proof``."""
        for m in (1, 16, 96):
            name = self.kernel(m, weight, dtype)
            yield Trial(name, m, lambda x, bias: self.linear(x, weight, bias, dtype))

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        """Packs a weight ``[n, k]`` for the engine; by default it shares the plain weight's memory.

        Raises:
            UnsupportedError: the kernel would misread these bytes; ``engine="auto"`` then tries the next engine.
        """
        n, k = weight.shape
        return PackedWeight(
            engine=self.name,
            scheme=self.effective(scheme),
            n=n,
            k=k,
            data=weight.data,
            scale=weight.scale,
            input_scale=input_scale,
        )

    def restore(self, packed: PackedWeight) -> ScaledTensor:
        """The plain weight that was given to ``prepare``, bit for bit."""
        return ScaledTensor(packed.data, packed.scale, packed.scheme.weight)

    def grouped(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """``y [T, n]``: the tokens of expert e, ``x[ends[e - 1]:ends[e]]``, times ``w[e].T`` plus ``bias[e]``.

        Args:
            x: ``[T, k]``, sorted by expert, unit stride along k.
            weight: a stack of E experts, packed.
            ends: int32 ``[E]`` on the device of ``x``, non-decreasing: one past the last token of each expert; an
            expert
                without tokens repeats the previous end. Tokens past the last end belong to experts on other ranks, and
                their rows of ``y`` are zeros.
            bias: ``[E, n]`` or None.

        The default runs ``linear`` for each expert that has tokens, for engines whose ``ends`` are in CPU memory. On a
        GPU an engine overrides it without padding or host synchronization, or rejects stacks.
        """
        y = x.new_zeros(x.shape[0], weight.n, dtype=out_dtype)
        parts = weight.parts or weight.split().parts
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                own = None if bias is None else bias[expert]
                y[start:end] = self.linear(x[start:end], parts[expert], own, out_dtype)
            start = end
        return y

    def prepare_stack(self, weight: ScaledTensor, scheme: Scheme) -> PackedWeight:
        """Packs a stack ``[E, n, k]``; by default expert by expert."""
        pairs = zip(weight.data, weight.scale, strict=True)
        parts = [self.prepare(ScaledTensor(data, scale, weight.granularity), scheme) for data, scale in pairs]
        both = zip(parts, weight.data, strict=True)
        shared = native.plain(weight.data) and all(part.data.data_ptr() == data.data_ptr() for part, data in both)
        stack = replace(
            parts[0],
            data=weight.data if shared else torch.stack([part.data for part in parts]),
            scale=weight.scale,
            extra={name: torch.stack([part.extra[name] for part in parts]) for name in parts[0].extra},
            experts=len(parts),
        )
        return stack.split()

    def restore_stack(self, packed: PackedWeight) -> ScaledTensor:
        """The plain stack that was given to ``prepare_stack``, bit for bit."""
        if type(self).restore is Engine.restore:
            return self.restore(packed)
        parts = [self.restore(part) for part in (packed.parts or packed.split().parts)]
        return ScaledTensor(torch.stack([part.data for part in parts]), packed.scale, packed.scheme.weight)

    def look_up(self, weight: ScaledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Rows ``ids [M]`` of ``weight [N, K]``, dequantized to ``dtype``; None to use torch's own operations."""
        return None

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        """The name of the kernel that ``linear`` runs for ``m`` tokens of ``dtype``, for the report."""
        return self.name


class WeightOnlyEngine(Engine):
    """An engine that does not quantize activations."""

    def effective(self, scheme: Scheme) -> Scheme:
        return scheme.weight_only()


@dataclass(frozen=True)
class Choice:
    """The engine that runs a problem, and why each engine that was considered before it does not.

    Example:
        >>> Choice("cpu", {"vllm": ["vLLM is not installed"]}).rejected["vllm"]
        ['vLLM is not installed']
    """

    winner: str
    rejected: Mapping[str, list[str]]
