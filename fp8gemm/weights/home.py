"""``Home``: the state that an FP8 weight shares with its views and aliases, as dense tensors share a storage."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import native
from ..engines import PackedWeight
from ..errors import UnsupportedError
from ..scaled import FP8GemmOptions, Precision, ScaledTensor, Scheme
from .activity import Activity
from .geometry import Layout, Part
from .kept import watch
from .lookup import dequantized
from .packed import prepare_for, quantized
from .rounding import rounded_again, warn_of_loss
from .search import Search
from .sizes import Sizes
from .stored import Stored, lock


class Home(Sizes):
    """The bytes and scales of a weight, its pending writes, its packed weights and its original.

    A weight may start unquantized, with only ``dense``. It is quantized once, when a product, a copy or a save first
    needs it. Writes are collected in ``dense`` (they are *pending*) until the next such need; ``settle`` then quantizes
    them. The *form* of a weight is the ``PackedWeight`` that an engine multiplies by.

    Attributes:
        layout: the shape ``[(E,) N, K]`` and how the parameter lies in memory.
        stored: the quantized weight; None before there is one.
        dense: the values including pending writes, in the parameter's own layout; None if no write is pending.
        original: the dense parameter that was converted, if it is kept.
        owned: whether the weight is a parameter. A temporary copy is not: it stays dense once it was written to.
        search: how scales and codes were chosen, where not just by rounding to nearest.
        version: incremented at every change; calls that were bound for an earlier version are no longer valid.
        aside: the weight as it is packed for the other of the precisions ``"fp8"`` and ``"weight_only"``.
    """

    precision: Precision = "fp8"  # of products: see ``precision.switch``
    aside: Stored | None = None

    def __init__(
        self,
        options: FP8GemmOptions,
        layout: Layout,
        *,
        stored: Stored | None = None,
        dense: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        scheme: Scheme | None = None,
        trains: bool = False,
    ) -> None:
        self.options, self.layout = options, layout
        self.scheme = options.resolved_scheme if scheme is None else scheme
        self.stored, self.dense, self.input_scale = stored, dense, input_scale
        self._original: nn.Parameter | weakref.ref[nn.Parameter] | None = None
        self.original_version: int | None = None
        self.trains = trains  # whether the converted parameter required gradients
        self.activity = Activity()
        self.search: Search | None = None
        self.owned = False
        self.version = 0
        self.returned: tuple[int, nn.Parameter, bool] | None = None  # the dense parameter that undo gave for a version
        self.calls: dict[Any, Any] = {}  # bound calls of this version: see ``remembered_call``
        self.flat: tuple[list[str], Any] | None = None  # what traced graphs receive: attribute names and context
        self.inner_data: torch.Tensor | None = None  # these tensors are set together with ``flat``
        self.inner_scale: torch.Tensor | None = None
        self.inner_input_scale: torch.Tensor | None = None
        self.inner_dense: torch.Tensor | None = None

    @property
    def original(self) -> nn.Parameter | None:
        held = self._original
        return held() if isinstance(held, weakref.ref) else held

    @property
    def follows(self) -> bool:
        """Whether ``original`` belongs to others: a parameter that was assigned, as long as somebody else keeps it."""
        return isinstance(self._original, weakref.ref)

    @property
    def device(self) -> torch.device:
        stored, dense = self.stored, self.dense
        if stored is None and dense is None:  # quantized in between by another thread
            stored = self.settle()
        holder = dense if stored is None else stored
        assert holder is not None
        return holder.device

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def pending(self) -> bool:
        """Whether values wait to be quantized: the initial ones, a write, or a changed original."""
        return self.dense is not None or self.changed

    @property
    def changed(self) -> bool:
        """Whether the kept original was written to since it was quantized."""
        original = self.original
        return original is not None and original._version != self.original_version

    def master(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense values that writes go to, in the parameter's own layout; the writer increments ``version``."""
        with lock():
            if self.dense is None:
                self.dense = self.values(dtype)
            return self.dense

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense values: of the original, where that is kept."""
        original = self.original
        if original is not None:
            values = original.detach()
            if values.device != self.device or values.dtype != dtype:
                values = values.to(self.device, dtype)
            return values.contiguous()
        self.activity.dequantized()
        assert self.stored is not None
        w = dequantized(self.stored.scaled(), dtype)
        return self.layout.shaped(w)

    def settle(self) -> Stored | None:
        """Quantizes pending writes and returns the quantized weight; None for a temporary copy that was written to."""
        stored = self.stored  # read first: other threads may publish a new weight, or forget this one
        if stored is not None and not self.pending:
            return stored
        if stored is not None and not self.owned and self.dense is not None:
            return None
        return self._settle(None)

    def _settle(self, device: torch.device | None) -> Stored:
        with lock():
            dense, original = self.dense, self.original
            if dense is None and not self.changed:
                assert self.stored is not None
                return self.stored
            if device is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise UnsupportedError(
                    "an FP8 weight cannot be quantized while a CUDA graph is captured; call "
                    f"materialize_fp8_weight({str(device)!r}) or run the model once before"
                )
            if original is not None and dense is not None and dense.data_ptr() != original.data_ptr():
                with torch.no_grad():  # writes went to another tensor, as the original is on another device
                    original.copy_(dense)
            version = None if original is None else original._version
            after = original.detach() if dense is None and original is not None else dense
            assert after is not None
            w = self.layout.plain(after)
            if self.stored is None or original is not None:
                scaled = quantized(w, self.options, self.scheme, device or self.device, self.search)
            else:
                scaled, lost = rounded_again(self.stored.scaled(), w, self.options, self.scheme)
                warn_of_loss(lost, tuple(self.layout.size))
            if self.stored is not None and self.search is not None:
                self.search = self.search.written(whole=original is not None)
            self._publish(Stored(scaled))
            self.original_version = version
            self.dense = None
            assert self.stored is not None
            return self.stored

    def touch(self) -> None:
        """Marks a change: calls and graph inputs of earlier versions are no longer valid."""
        self.version += 1
        self.flat = self.aside = None
        self.calls = {}
        self.inner_data = self.inner_scale = self.inner_input_scale = self.inner_dense = None

    def _publish(self, stored: Stored) -> None:
        if self.stored is not None:
            self.stored.forget_calls()
        self.stored = stored
        self.touch()

    def take_bytes(self, weight: ScaledTensor) -> None:
        """Replaces bytes and scales after some of them were overwritten; the weight is otherwise the same."""
        with lock():
            self._publish(Stored(weight))

    def keep(self, original: nn.Parameter) -> None:
        """Keeps the converted parameter as ``fp16_weight_storage`` says; with ``"discard"`` it is dropped."""
        if self.options.fp16_weight_storage == "discard":
            return
        if original.is_inference():
            with torch.inference_mode(mode=False):
                # a tensor of our own, whose version counter torch maintains
                original = nn.Parameter(original.detach().clone(), original.requires_grad)
        if self.options.fp16_weight_storage == "cpu_offload" and original.device.type != "cpu":
            original = nn.Parameter(original.detach().to("cpu"), original.requires_grad)
        self.hold_original(original)

    def hold_original(self, original: nn.Parameter, *, behind: bool = False) -> None:
        """Uses this very parameter as the original; ``behind`` means it has changed since it was quantized."""
        self._original, self.original_version = original, None if behind else original._version

    def assigned(self, parameter: nn.Parameter) -> None:
        """Takes the very parameter that was assigned, as a dense layer does: it may be tied to another module."""
        if self.options.fp16_weight_storage == "discard":
            self.follow(parameter)
        elif self.options.fp16_weight_storage == "keep":
            self.hold_original(parameter)
            watch(parameter)

    def follow(self, parameter: nn.Parameter) -> None:
        """Quantizes again whenever this parameter of somebody else's changes, and writes to it what is written here."""
        self._original, self.original_version = weakref.ref(parameter), parameter._version

    def scaled(self) -> ScaledTensor:
        """The plain bytes and scales; quantizes pending writes first."""
        self.owned = True
        stored = self.settle()
        assert stored is not None
        return stored.scaled()

    def form(
        self, dtype: torch.dtype, device: torch.device | None = None, part: Part | None = None
    ) -> PackedWeight | None:
        """The weight, or some of its rows or experts, packed by an engine; None where its blocks do not allow that
        part.

        Raises:
            UnsupportedError: no engine can run it there, or a CUDA graph is being captured.
        """
        stored = self.stored  # read before asking what has changed since
        if stored is None:
            stored = self._settle(device)
        elif self.pending and (stored := self.settle()) is None:
            return None
        if part is not None and part.whole(self.layout):
            part = None
        packed = stored.packed
        at_home = device is None or device == stored.device
        if part is None and at_home and packed is not None and dtype in packed.dtypes:
            return packed
        if part is not None and part.single and at_home and packed is not None and dtype in packed.dtypes:
            n = self.layout.shape[-2]
            if part.rows == (0, n) and part.all_columns(self.layout) and part.experts is not None:
                return packed.parts[part.experts[0]] if packed.parts else self._split(stored).parts[part.experts[0]]
        key = (stored.device if device is None else device, dtype, part)
        if (found := stored.forms.get(key)) is not None:
            return found
        return self._make_form(stored, key)

    def _split(self, stored: Stored) -> PackedWeight:
        with lock():
            assert stored.packed is not None
            if not stored.packed.parts:
                stored.packed = stored.packed.split()
            return stored.packed

    def _make_form(self, stored: Stored, key: tuple[torch.device, torch.dtype, Part | None]) -> PackedWeight | None:
        device, dtype, part = key
        with lock():
            if (found := stored.forms.get(key)) is not None:
                return found
            weight, scheme = stored.scaled(), self.scheme.at(self.precision)
            if part is not None:
                taken = part.take_finer(weight) if part.all_columns(self.layout) else None
                if taken is None:
                    return None
                weight, scheme = taken, replace(scheme, weight=taken.granularity)
            scale = None if self.input_scale is None or not scheme.static else self.input_scale
            traced = not native.plain_but_for_modes(weight.data)
            try:  # packed outside of modes, to which it would be a part of the product
                with nullcontext() if traced else _disable_current_modes():
                    scale = None if scale is None else scale.to(device)
                    form = prepare_for(weight.to(device), self.options, dtype, scale, scheme)
            except UnsupportedError:
                if scheme.weight == self.scheme.weight:
                    raise
                return None  # no engine supports blocks of so few rows
            if traced:
                form = replace(form, extra={}, bare=True)
                stored.forms = {**stored.forms, key: form}
            elif part is None and device == stored.device and (stored.packed is None or stored.plain is None):
                stored.hold(form)
            else:
                stored.forms = {**stored.forms, key: form}
            return form

    @property
    def engine(self) -> str | None:
        """The name of the engine that runs the weight on its device; None before one was chosen."""
        stored = self.stored
        return None if stored is None or stored.packed is None else stored.packed.engine

    def forget(self) -> None:
        """Drops what can be computed again: the FP8 bytes if the original is kept, else only the packed weights."""
        with lock():
            if self.original is not None and (self.search is None or self.search.repeats):
                self.dense = self.dense if self.dense is not None else self.values(self.original.dtype)
                self.stored = None
            elif self.stored is not None:
                self.stored = Stored(self.stored.scaled())
            self.touch()

    def copy(self, stored: Stored | None = None, layout: Layout | None = None) -> Home:
        """A separate home with the same values, or with ``stored``; bytes are shared until either is written to."""
        twin = Home(
            self.options,
            layout or self.layout,
            stored=stored,
            input_scale=self.input_scale,
            scheme=self.scheme,
            trains=self.trains,
        )
        twin.search = self.search
        if stored is None:
            with lock():
                twin.stored, twin.dense = self.stored, None if self.dense is None else self.dense.clone()
        twin.precision = self.precision
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        """A copy that shares no memory."""
        with lock():
            stored = self.stored
            if stored is not None:
                stored = Stored(stored.scaled().clone())
            original = copy.deepcopy(self.original, memo)
            twin = Home(self.options, self.layout, stored=stored, scheme=self.scheme, trains=self.trains)
            if self.dense is not None:
                shares = self.dense_is_original()
                twin.dense = original.detach() if original is not None and shares else self.dense.detach().clone()
            if original is not None:
                (twin.follow if self.follows else twin.hold_original)(original)
                twin.original_version = None if self.changed else original._version
            twin.input_scale = None if self.input_scale is None else self.input_scale.clone()
            twin.activity, twin.owned = copy.deepcopy(self.activity), self.owned
            twin.precision, twin.search = self.precision, self.search
        memo[id(self)] = twin
        return twin
