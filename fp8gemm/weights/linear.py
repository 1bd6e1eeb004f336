"""``FP8Linear``: an ``nn.Linear`` whose weight is an ``FP8Weight``, with less overhead per call."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import native
from ..engines import ENGINES, PackedWeight
from ..scaled import FP8GemmOptions, ScaledTensor, Scheme
from .activity import KEPT_KERNEL, ORIGINAL_KERNEL
from .bound import UNBOUND, Bound, faster_kept, notice
from .convert import convert, revert
from .home import Home
from .precision import original_values
from .product import in_forward_mode, multiply, wants_derivative
from .sharding import held
from .watching import counted, exporting, jit_tracing, profiling
from .weight import FP8Weight


class FP8Linear(nn.Linear):
    """``y = x @ w.T + bias`` with ``w [N, K]`` in FP8; ``bias`` stays a Parameter.

    Made from an existing layer by ``from_linear`` (a new module) or ``convert`` (the same object). ``weight`` is an
    ``FP8Weight``; ``state_dict`` saves it as ``weight`` (FP8) and ``weight_scale`` (float32). The class only reduces
    the overhead per call and casts inputs of other dtypes as ``FP8GemmOptions`` say; ``F.linear`` gives the same
    result.

    Example:
        >>> layer = FP8Linear.from_linear(torch.nn.Linear(64, 32))
        >>> layer.weight.dtype, layer.scaled().data.dtype, layer.scaled().scale.shape
        (torch.float32, torch.float8_e4m3fn, torch.Size([32, 1]))
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, options: FP8GemmOptions | None = None) -> FP8Linear:
        """A new FP8Linear that shares the bias and hooks of ``linear``; ``linear`` itself is not changed.

        Example:
            >>> layer = FP8Linear.from_linear(torch.nn.Linear(64, 32))
            >>> layer(torch.randn(3, 64)).shape
            torch.Size([3, 32])
        """
        twin = copy.copy(linear)
        for container in ("_parameters", "_buffers", "_modules", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            twin.__dict__[container] = copy.copy(getattr(linear, container))
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
        """Converts this very object to an FP8Linear: references to it, hooks and parents need no change.

        Args:
            weight: FP8 bytes ``[N, K]`` and scales to use as they are, instead of quantizing the layer's own weight.
            input_scale: the static activation scale, float32, for schemes that have one.

        Raises:
            ValueError: the layer's weight is not a floating-point parameter, or ``weight`` has another shape.
            UnsupportedError: no engine, or not the requested one, can run it. The layer is then unchanged.
        """
        convert(linear, "weight", options, weight=weight, input_scale=input_scale, kind=cls)
        assert isinstance(linear, FP8Linear)
        return linear

    def revert(self) -> bool:
        """Converts this very object back; True if its weight is the original, False if it is a dequantized one."""
        return revert(self, "weight")

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning a dense parameter to ``weight`` quantizes it, so that the layer keeps running on FP8."""
        weight = self._parameters.get("weight") if name == "weight" else None
        dense = isinstance(value, nn.Parameter) and not isinstance(value, FP8Weight)
        # a DTensor shards the weight
        if not isinstance(weight, FP8Weight) or not dense or hasattr(value, "_local_tensor"):
            super().__setattr__(name, value)
            return
        if value.shape != weight.shape:
            raise ValueError(f"the layer's weight has shape {tuple(weight.shape)}, found {tuple(value.shape)}")
        weight.data = value.detach()
        if value.dtype == weight.dtype and value.device == weight.device and not value.is_inference():
            weight._home.assigned(value)

    @property
    def home(self) -> Home:
        """The state that the weight shares with its views and aliases.

        Raises:
            AttributeError: the weight was replaced by a dense one.
        """
        weight = held(self._parameters.get("weight"))
        if not isinstance(weight, FP8Weight):
            raise AttributeError(f"the weight of this FP8Linear is no longer FP8 but a {type(weight).__name__}")
        return weight._home

    options = property(lambda self: self.home.options, doc="The options that it was converted with.")
    activity = property(lambda self: self.home.activity, doc="What it has done.")
    compute_dtype = property(lambda self: self._parameters["weight"].dtype, doc="The dtype of the dense weight.")
    device = property(lambda self: self.home.device, doc="Where the bytes are.")

    @property
    def scheme(self) -> Scheme:
        return self.home.scheme

    @property
    def input_scale(self) -> torch.Tensor | None:
        """The static activation scale, float32, of schemes that have one."""
        return self.home.input_scale

    @property
    def materialized(self) -> bool:
        """Whether the FP8 bytes exist."""
        return self.home.stored is not None

    @property
    def original_weight(self) -> nn.Parameter | None:
        """The kept original; ``None`` if it was discarded. Writing to it makes the layer quantize again."""
        home = self.home
        dense = home.dense if home.original is None and home.stored is None else None
        return home.original if dense is None else nn.Parameter(dense, requires_grad=home.trains)

    @property
    def engine(self) -> str | None:
        """The name of the engine that runs this layer; ``None`` before one was chosen."""
        return self.home.engine

    @property
    def fp8_nbytes(self) -> int:
        """Bytes of the FP8 weight and its scales; 0 before they exist."""
        return self.home.fp8_nbytes

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def scaled(self) -> ScaledTensor:
        """The plain FP8 bytes ``[N, K]`` and float32 scales, bit for bit; quantizes pending values first."""
        return self.home.scaled().detach()

    def materialize_fp8_weight(self, device: torch.device | str | None = None) -> None:
        """Quantizes the weight for ``device`` now (by default its own) instead of at the first call.

        Raises:
            UnsupportedError: no engine can run it there, or a CUDA graph is being captured.
        """
        self.form(self.device if device is None else torch.device(device))

    def invalidate_weight_cache(self) -> None:
        """Drops what can be computed again: the FP8 bytes if the original is kept, else only the packed weights."""
        self.home.forget()

    def form(self, device: torch.device) -> PackedWeight:
        """The weight as the engine of ``device`` has packed it; packs it first if necessary."""
        return _form(self.home, held(self._parameters["weight"]), device)

    def extra_repr(self) -> str:
        if not isinstance(held(self._parameters.get("weight")), FP8Weight):
            return f"{super().extra_repr()}, dense"
        # Others that try to load an FP8 checkpoint into the layer print it, as accelerate does.
        waits = (
            "on meta until fp8gemm.load_checkpoint(model, folder) fills it" if self.home.is_meta else "not materialized"
        )
        engine = self.engine or f"{self.options.engine}, {waits}"
        precision = "" if self.home.precision == "fp8" else f", precision={self.home.precision}"
        return f"{super().extra_repr()}, {self.scheme}, engine={engine}{precision}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if torch.compiler.is_compiling():
            return self._traced(input, weight)
        if not isinstance(weight, FP8Weight):
            return F.linear(input, self.weight, self.bias)
        if not native.plain(input) or in_forward_mode():
            if isinstance(input, fx.Proxy):
                return self._recorded(input)
            # Below autograd, a mode that only counts sees the registered operation.
            recorded = wants_derivative(input, self.bias) and not in_forward_mode() and counted(input)
            return FP8Linear._run(input, weight, self.bias) if recorded else self._as_operation(input, weight)
        if not jit_tracing() and not profiling():
            key = (input.shape, input.dtype, input.device)
            bound = self.__dict__.get("_bound", _NONE).get(key)
            if isinstance(bound, Bound):
                if bound.fits(self, input):
                    return bound(input)
                if bound.is_stale(self, weight):
                    notice(self, weight, key, input)
            elif bound is not UNBOUND:
                notice(self, weight, key, input)
        return FP8Linear._run(input, weight, self.bias)

    def _as_operation(self, x: torch.Tensor, weight: FP8Weight) -> torch.Tensor:
        """What modes and transforms see: torch's own linear, with the casts that ``FP8GemmOptions`` ask for.

        Of rows, since torch adds the bias to a rounded product where an input of more dimensions is not contiguous.
        """
        rows = weight._home.precision != "original"
        if rows and x.dim() > 2 and x.layout is torch.strided and not x.is_nested and x.shape[-1] == weight.shape[-1]:
            return self._as_operation(x.flatten(0, -2), weight).reshape(*x.shape[:-1], weight.shape[0])
        return _cast(x, weight, self.bias, weight._home.options)

    def _recorded(self, x: fx.Proxy) -> Any:
        """The node of a symbolic trace: a call of this layer, as torch's own layers are leaves of every tracer."""
        tracer: Any = x.tracer
        if tracer.root is self:
            return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}}

    # Static, as another thread may restore the layer's former class in the middle of a call.
    @staticmethod
    def _run(x: torch.Tensor, weight: FP8Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """The general path, for plain inputs of any dtype, shape and stride."""
        if x.dim() == 0 or x.shape[-1] != weight.shape[-1] or x.is_meta or not weight.is_whole():
            return F.linear(x, weight, bias)  # raises the error of nn.Linear
        home = weight._home
        if home.precision == "original":
            home.activity.count(ORIGINAL_KERNEL)
            return _cast(x, original_values(home, weight.dtype), bias, home.options)
        form = _form(home, weight, x.device)
        out_dtype, given = _dtypes(x, weight.dtype, home.options)
        run_dtype = form.dtype_for(out_dtype)
        if bias is not None:
            # A view holds the memory in case another thread assigns new data to the bias. The dtypes differ for a
            # moment while the layer is being cast.
            bias = bias.view_as(bias) if wants_derivative(x, bias) or jit_tracing() else bias.detach()
            if bias.device != x.device or bias.dtype not in (run_dtype, torch.float32):
                bias = bias.to(x.device, run_dtype)
        kept = faster_kept(home, x, bias, form)
        rows = x.reshape(-1, x.shape[-1]).to(run_dtype)
        if not rows.is_contiguous() or rows.numel() == 0:  # an empty tensor is contiguous whatever its strides
            rows = rows.clone(memory_format=torch.contiguous_format)
        if kept is not None:
            y, kernel = F.linear(rows, kept, bias), KEPT_KERNEL
        else:
            y = multiply(rows, form, bias, run_dtype, lambda: home.version)
            kernel = ENGINES[form.engine].kernel(rows.shape[0], form, run_dtype)
        home.activity.count(kernel)
        return y.reshape(*x.shape[:-1], form.n).to(given)

    def _traced(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """The product inside a trace: the graph receives the tensors of the packed weight instead of the wrapper."""
        if isinstance(weight, FP8Weight):
            home = weight._home
            if home.precision == "original":
                return _cast(x, weight, self.bias, home.options)
            if home.dense is None and home.stored is not None and home.stored.packed is not None and not exporting():
                out_dtype, given = _dtypes(x, weight.dtype, home.options)
                form = home.stored.packed
                run_dtype = form.dtype_for(out_dtype)
                rows = x.reshape(-1, x.shape[-1]).to(run_dtype).contiguous()
                y = multiply(rows, form, self.bias, run_dtype)
                return y.reshape(*x.shape[:-1], form.n).to(given)
        return F.linear(x, self.weight, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] @ w.T + bias``, with a bias other than the layer's own."""
        return F.linear(x, self.weight, bias)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """``self(silu(gate) * up)`` for ``gate`` and ``up`` of shape ``[..., K]``.

        Where the engine supports it, one kernel computes ``silu(gate) * up`` in float32 and rounds it to FP8.
        """
        y = self._gated(gate, up)
        return self(F.silu(gate) * up) if y is None else y

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
        alike = type(gate) is type(up) is torch.Tensor and gate.shape == up.shape and gate.device == up.device
        weight = self._parameters.get("weight")
        if not alike or not isinstance(weight, FP8Weight) or not native.plain(gate, up) or in_forward_mode():
            return None
        if {gate.dtype, up.dtype} != {weight.dtype} or gate.shape[-1:] != (self.in_features,):
            return None
        bias, kind = self.bias, gate.device.type
        needs = wants_derivative(gate, bias) or wants_derivative(up, None)
        if torch.is_autocast_enabled(kind) or needs or gate.numel() == 0:
            return None
        if self.home.precision == "original":
            return None
        packed = self.form(gate.device)
        if gate.dtype not in packed.dtypes or faster_kept(self.home, gate, bias, packed) is not None:
            return None
        gates, ups = gate.reshape(-1, self.in_features), up.reshape(-1, self.in_features)
        if gates.stride(1) != 1 or ups.stride(1) != 1 or (bias is not None and bias.device != gate.device):
            return None
        y = ENGINES[packed.engine].gated(gates, ups, packed, bias, gate.dtype)
        if y is None:
            return None
        self.activity.count(ENGINES[packed.engine].kernel(y.shape[0], packed, gate.dtype))
        return y.view(*gate.shape[:-1], self.out_features)


_NONE: dict[Any, Any] = {}  # the default where no call is bound


def _form(home: Home, weight: Any, device: torch.device) -> PackedWeight:
    home.owned = True
    form = home.form(weight.dtype, device)
    assert form is not None
    if (stored := home.stored) is not None and stored.device != weight.device:
        weight.data = FP8Weight(home, weight.dtype)  # a lazily quantized weight moves to the device of its first input
    return form


def _cast(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, options: FP8GemmOptions) -> torch.Tensor:
    """torch's own linear, with the casts that ``FP8GemmOptions`` ask for."""
    if x.dtype == w.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, w, bias)
    out_dtype, given = _dtypes(x, w.dtype, options)
    return F.linear(x.to(out_dtype), w, bias).to(given)


def _dtypes(x: torch.Tensor, compute_dtype: torch.dtype, options: FP8GemmOptions) -> tuple[torch.dtype, torch.dtype]:
    """The dtype to compute in and the dtype to return for an input: those of ``nn.Linear``, plus the casts of
    ``options``."""
    kind = x.device.type
    # torch does not autocast float64, and neither do we.
    if torch.is_autocast_enabled(kind) and x.dtype.is_floating_point and x.dtype != torch.float64:
        autocast = torch.get_autocast_dtype(kind)
        return autocast, autocast
    if x.dtype == compute_dtype:
        return x.dtype, x.dtype
    if not options.cast_inputs or not x.dtype.is_floating_point:
        raise RuntimeError(
            f"expected input of dtype {compute_dtype}, found {x.dtype}"
            + ("; FP8GemmOptions(cast_inputs=True) casts it" if x.dtype.is_floating_point else "")
        )
    return compute_dtype, x.dtype if options.cast_output_back else compute_dtype
