"""The pass in which layers are measured: each module's forward runs with the FP8 weight first, then as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedError
from ..models.batches import Batch
from ..models.multiplies import CONVOLUTIONS as CONVOLVING
from ..models.multiplies import factors_of, places_of
from ..models.owners import CONVOLUTIONS, is_plain_linear
from ..weights import FP8Weight
from .layers import Layer, PatchedLayer, Unobserved

aten = torch.ops.aten


class Pass(TorchDispatchMode):
    """Runs a model on its originals and, in each module that has layers, on one FP8 weight more for a moment.

    As a dispatch mode it sees every product below autograd, with the inputs of the FP8 weight that is in use. While a
    mode is active fused layers run one by one, and the hooks that wait for a patched model's first call let it pass.
    """

    def __init__(self, layers: Sequence[Layer], done: Callable[[], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.done = layers, done
        self.running: Layer | None = None  # the layer that runs in FP8
        self.on: Literal["as it is", "originals", "fp8"] = "as it is"  # what the model runs on
        self.storages: dict[int, Layer] = {}
        self.where = ""  # the batch, for messages

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Allows torch.compile under the mode; otherwise, code first called under a mode would never be compiled."""
        return True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The mode is on; afterwards those that were on before are, whatever an interrupt has left of the stack.

        torch takes modes off the stack for each operation that they see, and puts them back in Python.
        """
        former = _get_current_dispatch_mode_stack()
        with self:
            try:
                yield
            finally:
                while torch._C._len_torch_dispatch_stack():
                    _pop_mode()
                for mode in [*former, self]:
                    _push_mode(mode)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces the forward of every module that has layers; restores those, and all weights, at the end."""
        modules = list(dict.fromkeys(module for layer in self.layers for module in layer.needs))
        owners = {place.module: dict(place.module._parameters) for layer in self.layers for place in layer.places}
        forwards = {module: module.__dict__.get("forward") for module in modules}
        try:
            for module in modules:
                own = [layer for layer in self.layers if module in layer.needs]
                module.__dict__["forward"] = self._probe(module, own)
            yield
        finally:
            for module, forward in forwards.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            for module, parameters in owners.items():
                module._parameters.update(parameters)

    def run(self, model: nn.Module, batch: Batch) -> tuple[Any, Any]:
        """The outputs of ``model`` on its originals, while its layers are measured, and with all layers in FP8."""
        self.on = "originals"
        with ExitStack() as originals, _Forked():
            for layer in self.layers:
                originals.enter_context(layer.originals())
            self.storages = _storages(self.layers)
            y = Batch(duplicate(batch.args), duplicate(batch.kwargs)).run(model)
        self.on = "fp8"
        with _Forked():
            return y, Batch(duplicate(batch.args), duplicate(batch.kwargs)).run(model)

    def _probe(self, module: nn.Module, layers: list[Layer]) -> Callable[..., Any]:
        inner = module.forward

        @functools.wraps(inner)  # others ask for its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.on == "as it is":
                return inner(*args, **kwargs)
            with ExitStack() as stack:
                for layer in layers:
                    if layer is not self.running:
                        stack.enter_context(layer.fp8() if self.on == "fp8" else layer.dense())
                if self.on == "fp8" or self.running is not None:  # the latter within a module that runs in FP8
                    return inner(*args, **kwargs)
                return self._measured(module, layers, inner, args, kwargs)

        return forward

    def _measured(
        self,
        module: nn.Module,
        layers: list[Layer],
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        found = []
        for layer in layers:
            if module in layer.runs:
                found.append((layer, self._in_fp8(layer, inner, *_apart(module, args, kwargs))))
        result = inner(*args, **kwargs)
        y = first_tensor(result)
        with Unobserved():
            for layer, y8 in found:
                if y is None or y8 is None:
                    raise ValueError(f"{layer.name} gives no floating-point tensor to compare: {type(result).__name__}")
                self._check(layer, y, y8, (args, kwargs))
                spatial = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
                layer.error.add(y, y8, channels=-1 - spatial)
                self.done()
        return result

    def _in_fp8(self, layer: Layer, inner: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor | None:
        with layer.fp8(), _Forked():
            self.running = layer
            try:
                return first_tensor(inner(*args, **kwargs))
            finally:
                self.running = None

    def _check(self, layer: Layer, y: torch.Tensor, y8: torch.Tensor, inputs: Any) -> None:
        if not bool(torch.isfinite(y).all()):
            given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            bad = any(leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()) for leaf in given)
            raise ValueError(
                f"{layer.name}: the original itself gives {_not_finite(y)} on {self.where}"
                + (", as some of its inputs are not finite" if bad else ", on finite inputs")
            )
        if not bool(torch.isfinite(y8).all()):
            raise ValueError(
                f"{layer.name}: FP8 gives {_not_finite(y8)} on {self.where}, where the original is finite "
                f"({layer.scheme} on {layer.engine}); keep this layer dense"
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.running is not None:
            _note_inputs(func, args, self.running)
        elif self.on == "originals":
            self._note_use(func, args)
        return func(*args, **(kwargs or {}))

    def _note_use(self, func: Any, args: tuple[Any, ...]) -> None:
        """Notes products with a layer's weight, whichever module computes them."""
        for factor in factors_of(func, args):
            if isinstance(factor, FP8Weight):
                raise UnsupportedError(
                    f"{self._named(factor)} is multiplied by outside of its layer, where its offloaded original cannot "
                    "take its place: patch the model with fp16_weight_storage='keep'"
                )
            if isinstance(factor, torch.Tensor) and factor.layout is torch.strided:
                layer = self.storages.get(factor.untyped_storage()._cdata)
                if layer is not None:
                    layer.multiplied = True

    def _named(self, weight: FP8Weight) -> str:
        names = [one.name for one in self.layers if isinstance(one, PatchedLayer) and one.home is weight._home]
        return names[0] if names else "an FP8 weight"


def _note_inputs(func: Any, args: tuple[Any, ...], layer: Layer) -> None:
    """Counts the other factor of a product with an FP8 weight."""
    if func in CONVOLVING:
        pairs = [(args[1], args[0], 1)]
    elif func is aten._trilinear.default:
        pairs = [(args[1], args[2], -1)]
    elif (places := places_of(func)) is not None:
        first, second = (args[place] for place in places)
        pairs = [(second, first, -1), (first, second, -2 if second.dim() > 1 else -1)]
    else:
        return
    for weight, x, channels in pairs:
        if isinstance(weight, FP8Weight) and not isinstance(x, FP8Weight):
            layer.inputs.add(x, channels, layer.static)


def _apart(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments for one call more of a module, which may write to them or, as to a cache, add to them."""
    return (args, kwargs) if is_plain_linear(module) else (duplicate(args), duplicate(kwargs))


def duplicate(arguments: Any) -> Any:
    """A copy that shares nothing with ``arguments`` but modules and what cannot be copied, such as locks."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone()
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        if isinstance(leaf, nn.Module):
            return leaf
        try:
            return copy.deepcopy(leaf)
        except (TypeError, RuntimeError):
            return leaf

    return tree_map(one, arguments)


def first_tensor(result: Any) -> torch.Tensor | None:
    """The first floating-point tensor in what a module returns."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            found = leaf if leaf.is_floating_point() else None
        elif isinstance(leaf, Mapping):
            found = first_tensor(list(leaf.values()))
        else:
            found = first_tensor(list(vars(leaf).values())) if is_dataclass(leaf) else None
        if found is not None:
            return found
    return None


def _not_finite(y: torch.Tensor) -> str:
    return "NaN" if bool(torch.isnan(y).any()) else "infinity"


class _Forked:
    """``torch.random.fork_rng`` of all devices, but not a generator; see ``Unobserved``."""

    def __enter__(self) -> None:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        self.cpu = torch.get_rng_state()
        self.gpus = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.gpus:
            torch.cuda.set_rng_state(state, device)


def _storages(layers: Sequence[Layer]) -> dict[int, Layer]:
    """The layers by the storage of their dense weight."""
    weights = [(layer.places[0].module._parameters[layer.places[0].parameter], layer) for layer in layers]
    plain = [(weight, layer) for weight, layer in weights if weight is not None and not isinstance(weight, FP8Weight)]
    return {weight.untyped_storage()._cdata: layer for weight, layer in plain}
