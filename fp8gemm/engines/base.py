"""The contract that every engine fulfils, and the values that a choice between engines is made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch

from .. import native
from ..scaled import COMPUTE_DTYPES, Accumulate, Granularity, ScaledTensor, Scheme

# Up to this K partial sums may stay in Hopper's 14-bit accumulator, as vLLM, FBGEMM and TensorRT-LLM leave them;
# torch's CUTLASS products stop doing so from 16384 on (pytorch#153809).
FAST_UP_TO_K = 8192

Facts = TypeVar("Facts")


@dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """The problem: ``y [M, n] = x [M, k] @ w [n, k].T`` under a scheme, for activations of ``compute_dtype``.

    ``experts`` > 0 is a stack ``w [experts, n, k]``, asked of ``grouped``; ``accumulate`` as in ``FP8GemmOptions``.

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


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The place: a value, so that what runs on an H100 with vLLM can be decided and tested on a laptop.

    ``capability`` is CUDA's (major, minor). ``features`` names what else a device can do: ``"amx_bf16"`` and
    ``"avx512_bf16"`` of a CPU, ``"native"`` where there are compiled kernels for it, ``"gfx942"`` and the like of AMD's
    cards. ``found`` is what each engine's ``probe`` found of what it needs here, by the engine's name.

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
    found: Mapping[str, object] = field(default_factory=dict)

    def facts(self, engine: str, kind: type[Facts]) -> Facts | None:
        """What the engine of that name found here; None where it found nothing."""
        facts = self.found.get(engine)
        return facts if isinstance(facts, kind) else None


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight ``[n, k]``, or a stack of ``experts`` of them, in the layout of one engine.

    ``data`` and ``scale`` hold the bytes and float32 scales (what a layer owns, moves and counts); ``extra`` are
    tensors derived from them that the kernel takes (views, padded or expanded scales), by identifiers of the engine's.
    ``scheme`` is what the engine really does: its ``activation`` is None where activations stay as they are. ``apart``
    is how ``linear`` rounds more than ``few`` tokens before its product, where ``linear_quantized`` takes them so
    rounded: torch.compile traces these values and no method of an engine, so it sees the rounding and fuses it into
    what comes before.
    """

    engine: str
    scheme: Scheme
    n: int
    k: int
    data: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)  # a plain dict, as torch.compile traces it
    dtypes: tuple[torch.dtype, ...] = COMPUTE_DTYPES
    accumulate: Accumulate = "auto"
    apart: Granularity | None = None
    few: int = 0
    experts: int = 0
    parts: tuple[PackedWeight, ...] = ()  # of a stack: each expert, sharing its memory
    bare: bool = False  # ``extra`` is left out: inside a trace it would be stale once other bytes come

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """What activations of ``dtype`` are multiplied in: that, or the first that the engine takes."""
        return dtype if dtype in self.dtypes else self.dtypes[0]

    @property
    def fast(self) -> bool:
        """Whether partial sums may stay in Hopper's accumulator of about 14 bits: asked for, or K is short enough."""
        return self.accumulate == "fast" or (self.accumulate == "auto" and self.k <= FAST_UP_TO_K)

    def split(self) -> PackedWeight:
        """This stack with its ``parts``, which are views made once."""
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


class Engine(ABC):
    """A stateless way to multiply by an FP8 weight.

    ``name`` is what users type, ``tolerance`` the largest relative Frobenius error against the float32 product of
    the dequantized operands, for bfloat16 output, ``traceable`` whether torch.compile may look inside.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float] = 4e-3
    traceable: ClassVar[bool] = False

    def probe(self, device: torch.device, machine: Machine) -> object | None:
        """What is here of that which only this engine needs; None where it is nothing, or nothing is needed.

        A frozen dataclass that says itself as text, for ``fp8gemm doctor``. It becomes ``machine.found[self.name]``,
        from where ``rejects`` reads it. Asked once for each device, whose ``machine`` has nothing in ``found`` yet.
        """
        return None

    @abstractmethod
    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        """All reasons why this engine cannot do ``spec`` on ``machine``; empty if it can.

        Of the machine it knows nothing but this value, so that it can be asked about machines that are not here.
        """

    @abstractmethod
    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """``y [M, n] = x [M, k] @ w.T + bias [n]`` in ``out_dtype``; ``x`` has unit stride along k, M may be 0."""

    def effective(self, scheme: Scheme) -> Scheme:
        """What the engine makes of ``scheme``: the same, or activations left as they are."""
        return scheme

    def rounds(self, m: int, weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Scheme:
        """The scheme that ``linear`` really follows for ``m`` tokens: weight-only where it leaves them as they are."""
        return weight.scheme

    def bind(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``linear`` with all decisions made for inputs like ``x [..., K]``: of its shape, dtype, device and alignment.

        What it returns takes such an input, contiguous, and gives ``y [..., N]``; weight and bias stay where they are.
        None where nothing would be saved.
        """
        return None

    def linear_quantized(
        self, x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """``linear`` of activations that were rounded as ``weight.apart`` says."""
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

        None where activation and rounding are not one kernel, so that nothing would be saved.
        """
        return None

    def loses(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether ``m`` tokens of ``dtype`` are multiplied faster by a kept 16-bit weight."""
        return False

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        """The engine's layout of a weight ``[n, k]``; by default the plain one, sharing its memory.

        Raises:
            UnsupportedError: the engine would misread these very bytes; ``auto`` then goes on to the next engine.
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
        """The plain weight that ``prepare`` was given, bit for bit."""
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
            ends: int32 ``[E]`` on the device of ``x``: one past the last token of each expert; never decreasing, so an
                expert without tokens repeats the end before it. Tokens past the last end belong to experts that are
                not here: their rows of ``y`` are zeros.
            bias: ``[E, n]`` or None.

        By default one ``linear`` for each expert that has tokens, for engines whose ``ends`` are in CPU memory; on a
        GPU an engine needs its own, without padding or host synchronisation, or rejects stacks.
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
        """The engine's layout of a stack ``[E, n, k]``: by default that of each expert, one after the other."""
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
        """The plain stack that ``prepare_stack`` was given, bit for bit."""
        if type(self).restore is Engine.restore:
            return self.restore(packed)
        parts = [self.restore(part) for part in (packed.parts or packed.split().parts)]
        return ScaledTensor(torch.stack([part.data for part in parts]), packed.scale, packed.scheme.weight)

    def look_up(self, weight: ScaledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Rows ``ids [M]`` of ``weight [N, K]``, dequantized to ``dtype``; None where torch's own operations do it."""
        return None

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        """The name of the kernel that ``linear`` runs for ``m`` tokens of ``dtype``, for the report."""
        return self.name


class WeightOnlyEngine(Engine):
    """An engine that multiplies activations as they are."""

    def effective(self, scheme: Scheme) -> Scheme:
        return scheme.weight_only()


@dataclass(frozen=True)
class Choice:
    """Which engine runs, and why each of the others that were asked does not.

    Example:
        >>> Choice("cpu", {"vllm": ["vLLM is not installed"]}).rejected["vllm"]
        ['vLLM is not installed']
    """

    winner: str
    rejected: Mapping[str, list[str]]
