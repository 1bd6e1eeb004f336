"""``FP8Linear``: an ``nn.Linear`` whose weight is FP8 bytes and scales; the same object before and after."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import native
from ..engines import ENGINES, Prepared
from ..scaled import FP8_DTYPES, FP8GemmOptions, ScaledTensor
from .holder import OURS, FP8Holder
from .original import Activity, Original
from .prepared import prepare_for, quantized
from .product import dense, jit_tracing, multiply, wants_derivative
from .quick import KEPT_KERNEL, UNBOUND, Bound, notice
from .weight import FP8Weight


class FP8Linear(FP8Holder, nn.Linear):
    """``y = x @ w.T + bias`` with ``w [N, K]`` in FP8; ``bias`` stays a Parameter.

    Made from an existing layer by ``from_linear`` (a new module) or ``convert`` (this very object). ``state_dict``
    saves ``weight`` (FP8), ``weight_scale`` (float32) and ``bias``; the attribute ``weight`` is a lazy tensor of the
    compute dtype.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, options: FP8GemmOptions | None = None) -> FP8Linear:
        """A new FP8Linear beside ``linear``, sharing its bias and hooks; ``linear`` itself stays as it is."""
        twin = copy.copy(linear)
        for container in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[container] = dict(getattr(linear, container))
        return cls.convert(twin, options or FP8GemmOptions())

    @classmethod
    def convert(
        cls,
        linear: nn.Linear,
        options: FP8GemmOptions,
        *,
        weight: ScaledTensor | None = None,
        input_scale: torch.Tensor | None = None,
    ) -> FP8Linear:
        """Turns this very object into an FP8Linear: references to it, hooks and parents need no change.

        Args:
            weight: FP8 bytes ``[N, K]`` and scales to hold as they are, instead of quantizing the layer's own weight.
            input_scale: the static activation scale, float32, for schemes that have one.

        Raises:
            ValueError: the layer's weight is not a floating parameter, or ``weight`` has another shape.
            UnsupportedError: no engine, or not the one that was named, can run it. The layer is as it was then.
        """
        parameter = linear._parameters.get("weight")
        if parameter is None or not parameter.dtype.is_floating_point or parameter.dtype in FP8_DTYPES:
            found = "no weight parameter" if parameter is None else f"a weight in {parameter.dtype}"
            raise ValueError(f"FP8Linear is made from a Linear with a floating weight, found {found}")
        if weight is not None and tuple(weight.shape) != tuple(parameter.shape):
            raise ValueError(f"the layer's weight has shape {tuple(parameter.shape)}, found {tuple(weight.shape)}")
        prepared = None
        keeps = weight is None and not parameter.is_meta
        if weight is None and (parameter.is_meta or options.materialize_fp8_on_wrap):
            weight = quantized(parameter, options, parameter.device)
        if weight is not None and weight.device.type != "meta":
            prepared = prepare_for(weight, options, parameter.dtype, input_scale)

        layer = linear
        original = Original(type(linear), parameter.nbytes, parameter.requires_grad)
        layer.__class__ = cls
        assert isinstance(layer, FP8Linear)
        del layer._parameters["weight"]
        for name, value in (
            ("options", options),
            ("scheme", options.resolved_scheme),
            ("compute_dtype", parameter.dtype),
            ("activity", Activity()),
            ("_original", original),
            ("_layout", None),
            ("_published", None),
            ("_elsewhere", {}),
            ("_bound", {}),
        ):
            object.__setattr__(layer, name, value)
        layer._buffers.update({"fp8_weight": None, "weight_scale": None, "input_scale": input_scale})
        if prepared is not None:
            layer._publish(prepared)
        elif weight is not None:
            layer._hold(weight)
        if keeps:
            layer._keep_original(parameter, quantized=weight is not None)
        return layer

    def revert(self) -> bool:
        """Turns this very object back into the layer it was; True if its weight is the original, not dequantized."""
        original = self._original
        exact = original.weight is not None
        weight = original.weight
        if weight is None:
            w = self.dense_weight(self.compute_dtype)
            weight = nn.Parameter(w, requires_grad=original.requires_grad)
        elif self.device.type != weight.device.type and self.device.type != "meta":
            weight.data = weight.data.to(self.device)
        bias = self._parameters.get("bias")
        for name in OURS:
            self._buffers.pop(name, None)
        for name in FP8Holder.__annotations__:
            self.__dict__.pop(name, None)
        self.__class__ = original.kind
        self.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        return exact

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight ``[N, K]`` as a lazy tensor of the compute dtype; see ``fp8gemm.weights.weight``."""
        if torch.compiler.is_compiling():  # traced as plain operations, and dropped where only its dtype is asked
            return dense(self._traced(), self.compute_dtype)
        return FP8Weight(self, (self.out_features, self.in_features), self.compute_dtype, self.device, False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.replace_weight(value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        engine = self.engine or f"{self.options.engine}, not materialized"
        return f"{super().extra_repr()}, {self.scheme}, engine={engine}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (torch.compiler.is_compiling() or jit_tracing()) and native.plain(input):
            key = (input.shape, input.dtype, input.device)
            bound = self._bound.get(key)
            if isinstance(bound, Bound):
                if bound.fits(self, input):
                    return bound(self, input)
            elif bound is not UNBOUND:
                notice(self, key, input)
        return self._run(input, self.bias)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """``self(silu(gate) * up)`` for ``gate`` and ``up`` ``[..., K]``.

        Where the engine can, one kernel makes the product in float32 and rounds it to FP8.
        """
        y = self._gated(gate, up)
        return self(F.silu(gate) * up) if y is None else y

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
        alike = type(gate) is type(up) is torch.Tensor and gate.shape == up.shape and gate.device == up.device
        if not alike or {gate.dtype, up.dtype} != {self.compute_dtype} or gate.shape[-1:] != (self.in_features,):
            return None
        bias, kind = self.bias, gate.device.type
        needs = wants_derivative(gate, bias) or wants_derivative(up, None)
        if torch.is_autocast_enabled(kind) or needs or gate.numel() == 0:
            return None
        prepared = self._current(gate.device)
        if gate.dtype not in prepared.dtypes or self.faster_kept(gate, bias, prepared) is not None:
            return None
        gates, ups = gate.reshape(-1, self.in_features), up.reshape(-1, self.in_features)
        if gates.stride(1) != 1 or ups.stride(1) != 1 or (bias is not None and bias.device != gate.device):
            return None
        y = ENGINES[prepared.engine].gated(gates, ups, prepared, bias, gate.dtype)
        if y is None:
            return None
        self.activity.count(ENGINES[prepared.engine].kernel(y.shape[0], prepared, gate.dtype))
        return y.view(*gate.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] @ w.T + bias``: what the lazy weight calls."""
        return self._run(x, bias)

    def _run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        k = self.in_features
        if x.is_nested or x.layout != torch.strided:  # torch multiplies those, no engine does
            return F.linear(x, self.dense_weight(self.compute_dtype), bias)
        if x.dim() == 0 or x.shape[-1] != k:
            return F.linear(x, x.new_zeros(()).expand(self.out_features, k))  # raises what nn.Linear raises
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        prepared = self._traced() if torch.compiler.is_compiling() else self._current(x.device)
        if bias is not None and bias.device != x.device:
            bias = bias.to(x.device)
        kept = self.faster_kept(x, bias, prepared)
        if kept is not None:
            return self._rows(x, lambda rows, dtype: F.linear(rows, kept, bias), prepared, KEPT_KERNEL)
        return self._rows(x, lambda rows, dtype: multiply(rows, prepared, bias, dtype), prepared)

    def faster_kept(self, x: torch.Tensor, bias: torch.Tensor | None, prepared: Prepared) -> torch.Tensor | None:
        """The kept weight, where it lies beside ``x`` and the engine says that it is multiplied sooner than FP8."""
        kept = self._original.weight
        if kept is None or torch.compiler.is_compiling() or x.numel() == 0:
            return None
        alike = kept.device == x.device and kept.dtype == x.dtype and (bias is None or bias.dtype == kept.dtype)
        loses = alike and ENGINES[prepared.engine].loses(x.numel() // prepared.k, prepared, x.dtype)
        return kept.detach() if loses else None
