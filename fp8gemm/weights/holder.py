"""Who holds the FP8 bytes of a layer: on its device and others, beside a kept original, through moves and copies."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..engines import ENGINES, Prepared, restore
from ..errors import UnsupportedError
from ..scaled import FP8GemmOptions, ScaledTensor, Scheme
from .original import Activity, Original, tensor_version
from .prepared import prepare_for, quantized
from .product import dense
from .quick import Bound, Key, Unbound
from .state import KEYS, load_weight, save_weight
from .weight import FP8Weight

_LOCK = threading.RLock()  # of quantization, which two threads may ask for at once; one for all layers, as it is rare
# Not "weight": who moves buffers by name (accelerate) reads the attribute of that name, which is the lazy weight.
OURS = ("fp8_weight", "weight_scale", "input_scale")


class FP8Holder(nn.Module):
    """The storage side of ``FP8Linear`` and ``FP8Experts``.

    The buffers ``fp8_weight`` and ``weight_scale`` (float32) hold the bytes in the layout of the engine that runs
    them; they are made when wrapping or at the first call, and again when a kept original changes.
    """

    options: FP8GemmOptions
    scheme: Scheme
    compute_dtype: torch.dtype
    activity: Activity
    _original: Original
    _layout: str | None  # the engine in whose layout the FP8 buffer is; None: plain
    _published: Prepared | None  # of the buffers' own device
    _elsewhere: dict[torch.device, Prepared]  # of other devices that inputs came from
    _bound: dict[Key, Bound | Unbound]  # calls of shapes that were seen before

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[N, K]``, or ``[E, N, K]`` of a stack of experts."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        home = self._buffers["fp8_weight"]
        if home is not None:
            return home.device
        assert self._original.weight is not None
        return self._original.weight.device

    @property
    def materialized(self) -> bool:
        """Whether the FP8 bytes exist."""
        return self._buffers["fp8_weight"] is not None

    @property
    def original_weight(self) -> nn.Parameter | None:
        """The kept original, ``None`` if it was discarded. Writing to it quantizes the layer again."""
        return self._original.weight

    @property
    def engine(self) -> str | None:
        """The name of the engine that runs this layer, ``None`` before it was chosen."""
        return None if self._published is None else self._published.engine

    @property
    def fp8_nbytes(self) -> int:
        """Bytes of the FP8 weight and its scales, 0 before they exist; an engine's layout need not be undone for it."""
        data, scale = self._buffers["fp8_weight"], self._buffers["weight_scale"]
        if data is None or scale is None:
            return 0
        return math.prod(self.weight_shape) * data.element_size() + scale.nbytes

    def scaled(self) -> ScaledTensor:
        """The plain FP8 bytes and float32 scales, bit for bit; quantizes first if that is still due."""
        if not self.materialized:
            self.materialize_fp8_weight(self.device)
        data, scale = self._buffers["fp8_weight"], self._buffers["weight_scale"]
        assert data is not None
        assert scale is not None
        if self._layout is None:
            return ScaledTensor(data, scale, self.scheme.weight)
        *stack, n, k = self.weight_shape
        experts = stack[0] if stack else 0
        held = Prepared(engine=self._layout, scheme=self.scheme, n=n, k=k, data=data, scale=scale, experts=experts)
        return restore(held)

    def _current(self, device: torch.device) -> Prepared:
        """The weight as the engine of ``device`` takes it; makes it where that is still due."""
        prepared = self._published
        if prepared is not None and prepared.data is self._buffers["fp8_weight"] and not self._original.changed:
            if prepared.device == device:
                return prepared
            if (copied := self._elsewhere.get(device)) is not None:
                return copied
        return self._materialize(device)

    def _rows(
        self,
        x: torch.Tensor,
        compute: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
        prepared: Prepared,
        kernel: str | None = None,
    ) -> torch.Tensor:
        """``compute(rows [M, K], dtype)`` for ``x [..., K]`` in the dtype that the engine takes; ``y [..., N]``.

        ``kernel`` is what ran, by default the engine's own name for it.
        """
        out_dtype, given = self._dtypes(x)
        run_dtype = out_dtype if out_dtype in prepared.dtypes else prepared.dtypes[0]
        rows = x.reshape(-1, x.shape[-1]).to(run_dtype)
        if not rows.is_contiguous():
            rows = rows.contiguous()
        elif not torch.compiler.is_compiling() and rows.numel() == 0:  # contiguous by definition, whatever its strides
            rows = rows.clone(memory_format=torch.contiguous_format)
        y = compute(rows, run_dtype)
        if not torch.compiler.is_compiling():
            self.activity.count(kernel or ENGINES[prepared.engine].kernel(rows.shape[0], prepared, run_dtype))
        return y.reshape(*x.shape[:-1], prepared.n).to(given)

    def _dtypes(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The dtype to compute in and the dtype to return, for an input: as ``nn.Linear`` has them, casts aside."""
        kind = x.device.type
        # torch does not autocast float64, nor do we.
        if torch.is_autocast_enabled(kind) and x.dtype.is_floating_point and x.dtype != torch.float64:
            autocast = torch.get_autocast_dtype(kind)
            return autocast, autocast
        if x.dtype == self.compute_dtype:
            return x.dtype, x.dtype
        if not self.options.cast_inputs or not x.dtype.is_floating_point:
            raise RuntimeError(
                f"expected input of dtype {self.compute_dtype}, found {x.dtype}"
                + ("; FP8GemmOptions(cast_inputs=True) casts it" if x.dtype.is_floating_point else "")
            )
        return self.compute_dtype, x.dtype if self.options.cast_output_back else self.compute_dtype

    def _traced(self) -> Prepared:
        """The weight inside a trace, where it must exist already; its bytes from the buffers, which export keeps."""
        prepared = self._published
        if prepared is None:
            raise UnsupportedError(
                "an FP8 weight cannot be quantized inside torch.compile; run the model once before compiling it, or "
                "call materialize_fp8_weight(device), or leave materialize_fp8_on_wrap=True"
            )
        data, scale, input_scale = (self._buffers[name] for name in OURS)
        assert data is not None and scale is not None  # noqa: PT018
        return replace(prepared, data=data, scale=scale, input_scale=input_scale)

    def materialize_fp8_weight(self, device: torch.device | str | None = None) -> None:
        """Quantizes the weight for ``device`` now (by default where it is) instead of at the first call there.

        Raises:
            UnsupportedError: no engine can run it there, or a CUDA graph is being captured.
        """
        self._current(self.device if device is None else torch.device(device))

    def invalidate_weight_cache(self) -> None:
        """Forgets what can be made again: the FP8 bytes if the original is kept, else only the engine's views."""
        with _LOCK:
            if self._original.weight is not None:
                self._buffers.update({"fp8_weight": None, "weight_scale": None})
                self._layout = None
            elif self.materialized:
                self._hold(self.scaled())
            self._published, self._elsewhere, self._bound = None, {}, {}

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight dequantized in ``dtype``; counted."""
        self.activity.dequantizations += 1
        if self.device.type == "meta":
            return torch.empty(self.weight_shape, dtype=dtype, device="meta")
        return dense(self._current(self.device), dtype)

    def writable_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """What an in-place operation on the lazy weight works on: the kept original, else a dequantized one."""
        original = self._original.weight
        return self.dense_weight(dtype) if original is None else original.detach()

    def replace_weight(self, w: torch.Tensor) -> None:
        """Takes a new dense weight, quantizes it, and keeps it if originals are kept.

        Raises:
            ValueError: for another shape.
        """
        if not isinstance(w, torch.Tensor) or tuple(w.shape) != self.weight_shape:
            found = tuple(w.shape) if isinstance(w, torch.Tensor) else type(w).__name__
            raise ValueError(f"the layer's weight has shape {self.weight_shape}, found {found}")
        if isinstance(w, FP8Weight):
            w = w.dequantize()
        original = self._original.weight
        if original is not None and w.data_ptr() == original.data_ptr():
            w = original  # written to in place, and below autograd, which did not count it
        parameter = w if isinstance(w, nn.Parameter) else nn.Parameter(w.detach(), self._original.requires_grad)
        with _LOCK:
            weight = quantized(parameter, self.options, parameter.device)
            self.compute_dtype = parameter.dtype
            self._hold(weight)
            self._keep_original(parameter, quantized=True)

    def _materialize(self, device: torch.device) -> Prepared:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"an FP8 weight cannot be quantized while a CUDA graph is captured; call "
                f"materialize_fp8_weight({str(device)!r}) or run the model once before"
            )
        with _LOCK:
            original = self._original
            if original.weight is not None and (not self.materialized or original.changed):
                version = tensor_version(original.weight)
                self._hold(quantized(self._plain(original.weight), self.options, device))
                original.version = version
                self._keep_original(original.weight, quantized=True)
            home = self.device
            if self._published is None or self._published.data is not self._buffers["fp8_weight"]:
                self._publish(self._prepared_on(home))
            assert self._published is not None
            if device == home:
                return self._published
            self._elsewhere = {**self._elsewhere, device: self._prepared_on(device)}
            return self._elsewhere[device]

    def _prepared_on(self, device: torch.device) -> Prepared:
        input_scale = self._buffers["input_scale"]
        if input_scale is not None:
            input_scale = input_scale.to(device)
        weight = self.scaled().to(device)
        return prepare_for(weight, self.options, self.compute_dtype, input_scale, self.scheme)

    def _plain(self, original: torch.Tensor) -> torch.Tensor:
        """A kept original as ``[..., N, K]``."""
        return original

    def _hold(self, weight: ScaledTensor) -> None:
        """Holds plain bytes and scales; the engine's form of them is made at the next call."""
        self._layout = None
        self._published, self._elsewhere, self._bound = None, {}, {}
        self._buffers.update({"fp8_weight": weight.data, "weight_scale": weight.scale})

    def _publish(self, prepared: Prepared) -> None:
        """Makes an engine's form of the weight what calls use; the last assignment is what other threads see."""
        self._buffers.update({"fp8_weight": prepared.data, "weight_scale": prepared.scale})
        self._layout = prepared.engine
        self._elsewhere, self._bound = {}, {}
        self._published = prepared

    def _keep_original(self, parameter: nn.Parameter, *, quantized: bool) -> None:
        storage = self.options.fp16_weight_storage
        if storage == "discard" and quantized:
            self._original.weight = None
            return
        if storage == "cpu_offload" and quantized and parameter.device.type != "cpu":
            parameter = nn.Parameter(parameter.detach().to("cpu"), parameter.requires_grad)
        self._original.hold(parameter)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Holder:
        """``.to``, ``.half``, ``.cuda``, ``.to_empty``: move the FP8 bytes and scales, cast the compute dtype only."""
        with _LOCK:
            self._bound = {}
            held = {name: self._buffers.pop(name) for name in OURS}
            try:
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            finally:
                self._buffers.update(held)
            home = self.device
            probe_after = fn(torch.empty(0, dtype=self.compute_dtype, device=home))
            if self.materialized:
                self._apply_bytes(fn, moved=probe_after.device != home)
            published = self._published
            if published is not None and probe_after.dtype not in published.dtypes:
                self._hold(self.scaled())  # another engine may be the one for the new dtype
            original = self._original
            if original.weight is not None:
                original.apply(fn, probe_after.dtype, self.options.fp16_weight_storage)
            self.compute_dtype = probe_after.dtype
        return self

    def _apply_bytes(self, fn: Callable[[torch.Tensor], torch.Tensor], *, moved: bool) -> None:
        home = self._buffers["fp8_weight"]
        assert home is not None
        # As integers, which casts to a floating dtype leave alone.
        if not moved and fn(home.view(torch.uint8)).data_ptr() == home.data_ptr():
            return
        plain = self.scaled()
        data = fn(plain.data.view(torch.uint8)).view(plain.data.dtype)
        scale = fn(plain.scale.view(torch.int32)).view(torch.float32)
        self._hold(ScaledTensor(data, scale, plain.granularity))
        input_scale = self._buffers["input_scale"]
        if input_scale is not None:
            self._buffers["input_scale"] = fn(input_scale.view(torch.int32)).view(torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: plain bytes, as uint8 because torch 2.13 cannot unpickle FP8 tensors."""
        state = {**self.__dict__, "_layout": None, "_published": None, "_elsewhere": {}, "_bound": {}}
        if self.materialized:
            plain = self.scaled()
            data = plain.data.view(torch.uint8)
            state["_buffers"] = {**self._buffers, "fp8_weight": data, "weight_scale": plain.scale}
            state["_fp8_dtype"] = plain.data.dtype
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        fp8_dtype = state.pop("_fp8_dtype", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if fp8_dtype is not None:
            code = self._buffers["fp8_weight"]
            assert code is not None
            self._buffers["fp8_weight"] = code.view(fp8_dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        plain = self.scaled()
        save_weight(destination, prefix, plain, self._buffers["input_scale"])
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {prefix + name for name in KEYS}
        rest = {key: value for key, value in state_dict.items() if key.startswith(prefix) and key not in ours}
        held = {name: self._buffers.pop(name) for name in OURS}
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._buffers.update(held)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        loaded = load_weight(self, state_dict, prefix, assign, missing_keys, error_msgs)
        with _LOCK:
            if isinstance(loaded, ScaledTensor):
                self._hold(loaded)
                self._original.weight = None
            elif loaded is not None:
                self.replace_weight(loaded)
