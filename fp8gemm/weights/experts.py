"""``FP8Experts``: a stacked parameter ``[E, N, K]`` in FP8, whose owner keeps its class name and its forward code."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from ..engines import ENGINES
from ..scaled import TENSOR, FP8GemmOptions, Granularity, ScaledTensor, Scheme
from .holder import OURS, FP8Holder
from .original import Activity, Original, renamed_subclass
from .prepared import prepare_for, quantized
from .product import dense, multiply
from .stack import FP8Stack


class FP8Experts(FP8Holder):
    """The FP8 bytes and scales of one stacked parameter, a child module of its owner under the parameter's name.

    The owner's attribute of that name reads as a lazy stack: indexing it gives an expert's lazy weight, and
    ``F.linear``, ``@``, ``bmm``, ``grouped_mm`` and ``einsum`` with it run the FP8 engine. Stored as ``[E, N, K]``
    also where the owner has it transposed, ``[E, K, N]``, so that scales run along the output features.
    """

    transposed: bool
    shape: tuple[int, int, int]

    @classmethod
    def convert(
        cls,
        owner: nn.Module,
        name: str,
        options: FP8GemmOptions,
        *,
        transposed: bool = False,
        weight: ScaledTensor | None = None,
    ) -> FP8Experts:
        """Replaces the parameter ``name`` of ``owner``; the owner stays the same object with the same code.

        Args:
            transposed: the parameter is ``[E, K, N]``, multiplied from the right.
            weight: FP8 bytes ``[E, N, K]`` and scales to hold as they are, instead of quantizing the parameter.

        Raises:
            ValueError: the parameter is not a floating stack, or ``weight`` has another shape.
            UnsupportedError: no engine, or not the one that was named, can run it. The owner is as it was then.
        """
        parameter = owner._parameters.get(name)
        if parameter is None or parameter.dim() != 3 or not parameter.dtype.is_floating_point:
            found = "none" if parameter is None else f"{parameter.dtype} of shape {tuple(parameter.shape)}"
            raise ValueError(f"{type(owner).__name__}.{name} must be a floating parameter [E, N, K], found {found}")
        plain = parameter.detach().transpose(1, 2) if transposed else parameter.detach()
        if weight is not None and tuple(weight.shape) != tuple(plain.shape):
            raise ValueError(f"{name} has shape {tuple(plain.shape)} [E, N, K], found {tuple(weight.shape)}")
        given = weight is not None
        if weight is None:
            options = replace(options, scheme=_scheme(options, name, plain))
            if parameter.is_meta or options.materialize_fp8_on_wrap:
                weight = quantized(plain, options, parameter.device)
        prepared = None
        if weight is not None and weight.device.type != "meta":
            prepared = prepare_for(weight, options, parameter.dtype, None)
        experts = cls()
        experts._start(options, parameter, tuple(plain.shape), transposed)
        if prepared is not None:
            experts._publish(prepared)
        elif weight is not None:
            experts._hold(weight)
        if not given and not parameter.is_meta:
            experts._keep_original(parameter, quantized=weight is not None)
        _place(owner, name, experts)
        return experts

    def _start(
        self, options: FP8GemmOptions, parameter: nn.Parameter, shape: tuple[int, ...], transposed: bool
    ) -> None:
        self.options, self.scheme = options, options.resolved_scheme
        self.compute_dtype, self.activity = parameter.dtype, Activity()
        self._original = Original(nn.Parameter, parameter.nbytes, parameter.requires_grad)
        self._layout, self._published, self._elsewhere, self._bound = None, None, {}, {}
        experts, n, k = shape
        self.shape, self.transposed = (experts, n, k), transposed
        self._buffers.update(dict.fromkeys(OURS))

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        return self.shape

    def extra_repr(self) -> str:
        experts, n, k = self.shape
        return f"experts={experts}, out_features={n}, in_features={k}, {self.scheme}, engine={self.engine}"

    def lazy(self) -> torch.Tensor:
        """What the owner's attribute reads as: the stack in the owner's own orientation, without memory."""
        if torch.compiler.is_compiling():  # traced as plain operations
            w = dense(self._traced(), self.compute_dtype)
            return w.transpose(1, 2) if self.transposed else w
        return FP8Stack(self, self.shape, self.compute_dtype, self.device, self.transposed)

    def expert_product(self, expert: int, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] @ w[expert].T + bias [N]``."""
        prepared = self._current(x.device)
        part = (prepared.parts or prepared.split().parts)[expert]
        return self._rows(x, lambda rows, dtype: multiply(rows, part, bias, dtype), part)

    def grouped_product(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """``[T, N]``: rows of ``x [T, K]`` sorted by expert, ``ends`` int32 ``[E]``; zeros past the last end."""
        prepared = self._current(x.device)
        engine = ENGINES[prepared.engine]
        ends = ends.to(torch.int32)
        return self._rows(x, lambda rows, dtype: engine.grouped(rows, prepared, ends, None, dtype), prepared)

    def selected_product(self, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """``y [B, M, N]``: ``x [B, M, K]`` times expert ``ids[b]`` each; every expert in turn where ids is None."""
        experts, n, _ = self.shape
        count, m, k = x.shape
        if ids is None:
            ends = torch.arange(m, m * experts + 1, m, device=x.device, dtype=torch.int32)
            return self.grouped_product(x.reshape(-1, k), ends[:experts]).view(count, m, n)
        order = torch.argsort(ids, stable=True)
        counts = torch.zeros(experts, device=x.device, dtype=torch.int32)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        ends = torch.cumsum(counts * m, dim=0, dtype=torch.int32)
        y = self.grouped_product(x[order].reshape(-1, k), ends).view(count, m, n)
        result = torch.empty_like(y)
        result[order] = y
        return result

    def dense_stack(self, dtype: torch.dtype, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The stack ``[E, N, K]``, or its experts ``ids``, dequantized; counted."""
        if ids is None or self.device.type == "meta":
            w = self.dense_weight(dtype)
            return w if ids is None else w[ids]
        self.activity.dequantizations += 1
        prepared = self._current(self.device)
        parts = prepared.parts or prepared.split().parts
        wanted = {expert: dense(parts[expert], dtype) for expert in set(ids.reshape(-1).tolist())}
        return torch.stack([wanted[expert] for expert in ids.reshape(-1).tolist()])

    def expert_weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's weight ``[N, K]``, dequantized; counted."""
        self.activity.dequantizations += 1
        prepared = self._current(self.device)
        return dense((prepared.parts or prepared.split().parts)[expert], dtype)

    def revert(self, owner: nn.Module, name: str) -> bool:
        """Gives the owner its parameter back; True if it is the original, not a dequantized one."""
        original = self._original
        parameter = original.weight
        exact = parameter is not None
        if parameter is None:
            w = self.dense_weight(self.compute_dtype)
            w = w.transpose(1, 2).contiguous() if self.transposed else w
            parameter = nn.Parameter(w, requires_grad=original.requires_grad)
        _take_back(owner, name, parameter)
        return exact

    def _plain(self, original: torch.Tensor) -> torch.Tensor:
        return original.transpose(1, 2) if self.transposed else original


def _scheme(options: FP8GemmOptions, name: str, plain: torch.Tensor) -> Scheme:
    """The asked scheme; one scale a tensor means one for each expert, and for each half of a fused gate and up."""
    scheme = options.resolved_scheme
    if scheme.weight == TENSOR and "gate_up" in name and plain.shape[1] % 2 == 0:
        return replace(scheme, weight=Granularity(plain.shape[1] // 2, None))
    return scheme


def _place(owner: nn.Module, name: str, experts: FP8Experts) -> None:
    del owner._parameters[name]
    owner._modules[name] = experts
    base, names = _base_and_names(type(owner))
    owner.__class__ = stacked_class(base, tuple(sorted({*names, name})))


def _take_back(owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
    base, names = _base_and_names(type(owner))
    left = tuple(sorted(set(names) - {name}))
    owner.__class__ = stacked_class(base, left) if left else base
    del owner._modules[name]
    owner._parameters[name] = parameter


def _base_and_names(kind: type[nn.Module]) -> tuple[Any, tuple[str, ...]]:
    """The class that an owner had before, and which of its parameters are FP8."""
    return getattr(kind, "_fp8gemm_base", kind), getattr(kind, "_fp8gemm_stacks", ())


@cache
def stacked_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``base``, of the same name, in which each of ``names`` reads as a lazy stack."""

    def stack_property(name: str) -> property:
        return property(lambda owner: owner._modules[name].lazy())

    members: dict[str, Any] = {name: stack_property(name) for name in names}
    members |= {"_fp8gemm_base": base, "_fp8gemm_stacks": names}
    return renamed_subclass(base, members, _rebuild, base, names)


def _rebuild(base: Any, names: tuple[str, ...]) -> nn.Module:
    kind = stacked_class(base, names)
    return kind.__new__(kind)
