"""Converting a parameter to FP8 and back: everything that can fail comes first, and the last step cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..scaled import FP8_DTYPES, TENSOR, FP8GemmOptions, Granularity, ScaledTensor, Scheme
from .geometry import Layout
from .home import Home
from .kept import unwatch, watch
from .managed import manager, padded_share, tell
from .packed import quantized
from .persistence import hooked, install_hooks, remove_hooks
from .search import Search, unweighted
from .sharding import held
from .shares import is_split, like, share, whole
from .stored import Stored, lock
from .weight import FP8Weight

_OURS = ("_home", "_fresh", "_source", "_by_value", "_is_param")  # attributes of an FP8Weight
_FORMER = "_fp8gemm_former_class"  # attribute of a module whose class was changed
CONVERTED = "_fp8gemm_converted"  # attribute of a module: the names of the parameters that became FP8
_OWN = (_FORMER, "_bound", CONVERTED)  # attributes that a converted module is given


def convert(
    module: nn.Module,
    name: str,
    options: FP8GemmOptions,
    *,
    turned: bool = False,
    layout: Layout | None = None,
    weight: ScaledTensor | None = None,
    input_scale: torch.Tensor | None = None,
    kind: type[nn.Module] | None = None,
) -> FP8Weight:
    """Replaces the parameter ``name`` of ``module`` by an FP8Weight; the module stays the same object.

    If the parameter is a DTensor, the result is this rank's part, in a DTensor with the same placements.

    Args:
        turned: the parameter is transposed, ``[K, N]`` or ``[E, K, N]``.
        layout: how it lies in memory, where ``turned`` is not enough.
        weight: FP8 bytes ``[(E,) N, K]`` and scales to use as they are, instead of quantizing the parameter.
        input_scale: the static activation scale, float32, for schemes that have one.
        kind: the class that the module becomes an instance of.

    Raises:
        ValueError: the parameter is not floating point, or ``weight`` has another shape.
        UnsupportedError: no engine, or not the requested one, can run it. The module is then unchanged.
    """
    new = made(module, name, options, turned=turned, layout=layout, weight=weight, input_scale=input_scale)
    put(module, name, new, kind)
    return held(new)  # type: ignore[no-any-return]


def made(
    module: nn.Module,
    name: str,
    options: FP8GemmOptions,
    *,
    turned: bool = False,
    layout: Layout | None = None,
    weight: ScaledTensor | None = None,
    input_scale: torch.Tensor | None = None,
    search: Search | None = None,
) -> Any:
    """The parameter that ``convert`` would install; the module is not changed.

    A DTensor is gathered and quantized as a whole, which is a collective call; each rank keeps its own part.
    ``search`` is how its scales and codes are chosen, if ``options.weight_search`` asks for that.
    """
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.dtype.is_floating_point or parameter.dtype in FP8_DTYPES:
        found = f"no {name} parameter" if parameter is None else f"a {name} in {parameter.dtype}"
        raise ValueError(
            f"an FP8 weight is made from a floating-point parameter, found {found} in {type(module).__name__}"
        )
    if isinstance(held(parameter), FP8Weight):
        raise ValueError(f"{name} of {type(module).__name__} is in FP8 already")
    layout = layout or Layout.of(parameter.shape, turned=turned)
    if weight is not None and tuple(weight.shape) != layout.shape:
        raise ValueError(f"the layer's {name} has shape {layout.shape}, found {tuple(weight.shape)}")
    given, split = weight is not None, is_split(parameter)
    scheme = options.resolved_scheme if given else scheme_for(options, name, layout.shape)
    home = Home(options, layout, scheme=scheme, input_scale=input_scale, trains=parameter.requires_grad)
    home.owned = True
    if weight is None and options.weight_search != "none" and not parameter.is_meta:
        if search is None and options.weight_search == "rounding":
            raise ValueError("weight_search='rounding' needs calibration_inputs: use enable_fp8_gemm")
        search = search or unweighted()
        home.search = search.kept()
    if weight is None:
        values = whole(parameter).detach()
        if split or parameter.is_meta or options.materialize_fp8_on_wrap:
            plain = layout.plain(values if layout.folded is None else values.contiguous())
            weight = quantized(plain, options, scheme, values.device, search)
        else:
            home.dense = values.contiguous()
    home.stored = None if weight is None else Stored(weight)
    new: Any = FP8Weight(home, parameter.dtype)
    divide = share if manager(module, name) is None else padded_share
    new = divide(new, parameter) if split else new.as_parameter()
    home = held(new)._home
    if home.stored is not None and not home.is_meta and 0 not in home.layout.shape:
        home.form(parameter.dtype)  # raises where no engine can
    if not given and not split and not parameter.is_meta:
        home.keep(parameter)
    new.__dict__.update(_attributes(parameter))
    return new


class Change:
    """A parameter that becomes FP8 in all modules that share it, and the earlier state of these modules.

    It can be undone after an interruption at any point; tied parameters change together, in both directions.
    """

    def __init__(self, *places: tuple[nn.Module, str, type[nn.Module] | None]) -> None:
        """Each place is a module, the parameter's name there, and the class that the module becomes an instance of."""
        self.places = [_Before(module, name, kind) for module, name, kind in places]
        module, name, _ = places[0]
        self.former: Any = module._parameters[name]
        self.former_kind = type(self.former)

    def put(self, parameter: nn.Parameter) -> None:
        """Installs a parameter from ``made`` in its places and drops the former one. Other threads see complete modules
        after each step."""
        for place in self.places:
            place.put(parameter)
        home = held(parameter)._home
        watch(home.original)
        if not _costs_nothing(self.former, home):
            self.former = None

    def undo(self) -> bool:
        """Restores the modules; False if the weight had to be dequantized, as the original was freed."""
        parameter, exact = self.former, True
        if parameter is None:
            parameter, exact = _dense(self.places[0].module._parameters[self.places[0].name])
        elif self.former_kind is nn.Parameter:
            unwatch(parameter)
        for place in self.places:
            place.put_back(parameter)
        return exact


class _Before:
    """The state of a module before one of its parameters became FP8."""

    def __init__(self, module: nn.Module, name: str, kind: type[nn.Module] | None) -> None:
        self.module, self.name, self.kind, self.former_kind = module, name, kind, type(module)
        self.own = {key: module.__dict__[key] for key in _OWN if key in module.__dict__}
        self.hooked = hooked(module)

    def put(self, parameter: nn.Parameter) -> None:
        module, kind = self.module, self.kind
        install_hooks(module)
        module.__dict__[CONVERTED] = module.__dict__.get(CONVERTED, frozenset()) | {self.name}
        module._parameters[self.name] = parameter
        tell(module, self.name)
        if kind is not None and type(module) is not kind:
            module.__dict__[_FORMER] = type(module)
            module.__dict__["_bound"] = {}
            module.__class__ = kind

    def put_back(self, parameter: nn.Parameter) -> None:
        module = self.module
        module._parameters[self.name] = parameter
        tell(module, self.name)
        module.__class__ = self.former_kind
        for key in _OWN:
            module.__dict__.pop(key, None)
        module.__dict__.update(self.own)
        if not self.hooked:
            remove_hooks(module)


def _costs_nothing(parameter: nn.Parameter, home: Home) -> bool:
    """Whether the former parameter takes no memory besides its FP8 weight."""
    waits = home.stored is None and home.dense is not None and home.dense.data_ptr() == parameter.data_ptr()
    return parameter.is_meta or parameter is home.original or waits


def put(module: nn.Module, name: str, parameter: nn.Parameter, kind: type[nn.Module] | None = None) -> None:
    """Installs a parameter from ``made``; an interruption leaves the module as it was."""
    change = Change((module, name, kind))
    try:
        change.put(parameter)
    except BaseException:
        change.undo()
        raise


def revert(module: nn.Module, name: str) -> bool:
    """Restores the module's dense parameter; True if it is the original, not a dequantized one.

    After an interruption the module still runs, and ``leave`` completes the restoration. Tied parameters stay tied.
    """
    module._parameters[name], exact = _dense(module._parameters[name])
    leave(module)
    return exact


def _dense(weight: Any) -> tuple[Any, bool]:
    """The original of a weight, including later writes, or else a dequantized parameter; and whether it is the
    original. Repeated calls return the same object until the weight is written to."""
    if is_split(weight):
        return like(weight, held(weight).dequantize()), False
    home = weight._home
    with lock():
        if home.returned is None or home.returned[0] != home.version or home.pending:
            parameter, exact = _made_dense(weight)
            home.returned = (home.version, parameter, exact)
        _, parameter, exact = home.returned
    return parameter, exact


def _made_dense(weight: Any) -> tuple[Any, bool]:
    home = weight._home
    exact = home.original is not None or home.stored is None
    parameter = home.original
    if parameter is None:
        parameter = nn.Parameter(weight.dequantize(), requires_grad=home.trains)
    elif home.pending and home.dense is not None:
        home.settle()  # writes reach the original
    if parameter.device != weight.device and not weight.is_meta:
        with torch.no_grad():
            parameter.data = parameter.data.to(weight.device)
    parameter.__dict__.update(_attributes(weight))
    unwatch(parameter)
    if home.stored is not None:
        home.stored.forget_calls()
    return parameter, exact


def leave(module: nn.Module) -> None:
    """Restores the former class of a module that has no FP8 weight left, and removes its hooks."""
    left = frozenset(name for name, parameter in module._parameters.items() if isinstance(held(parameter), FP8Weight))
    if left:
        module.__dict__[CONVERTED] = left
        return
    former = module.__dict__.get(_FORMER)
    if former is not None:
        module.__class__ = former
    for key in _OWN:
        module.__dict__.pop(key, None)
    remove_hooks(module)


def _attributes(parameter: Any) -> dict[str, Any]:
    """The attributes that others have set on a parameter, such as ``tensor_model_parallel``."""
    return {key: value for key, value in vars(parameter).items() if key not in _OURS}


def scheme_for(options: FP8GemmOptions, name: str, shape: tuple[int, ...]) -> Scheme:
    """The requested scheme; one scale per tensor means one per expert and one per half of a fused gate and up."""
    scheme = options.resolved_scheme
    if len(shape) == 3 and scheme.weight == TENSOR and "gate_up" in name and shape[1] % 2 == 0:
        return replace(scheme, weight=Granularity(shape[1] // 2, None))
    return scheme
