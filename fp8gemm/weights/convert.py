"""Making a parameter FP8, and back: all that can fail comes first, the last step cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..scaled import FP8_DTYPES, TENSOR, FP8GemmOptions, Granularity, ScaledTensor, Scheme
from .geometry import Layout
from .home import Home
from .persistence import install_hooks, remove_hooks
from .prepared import quantized
from .stored import Stored
from .weight import FP8Weight

_OURS = ("_home", "_fresh", "_source", "_is_param")  # attributes of an FP8Weight
_FORMER = "_fp8gemm_former_class"  # of a module whose class was exchanged


def convert(
    module: nn.Module,
    name: str,
    options: FP8GemmOptions,
    *,
    turned: bool = False,
    weight: ScaledTensor | None = None,
    input_scale: torch.Tensor | None = None,
    kind: type[nn.Module] | None = None,
) -> FP8Weight:
    """Makes the parameter ``name`` of ``module`` an FP8Weight; the module stays the same object with the same code.

    Args:
        turned: the parameter is ``[K, N]`` or ``[E, K, N]``, multiplied from the right.
        weight: FP8 bytes ``[(E,) N, K]`` and scales to hold as they are, instead of quantizing the parameter.
        input_scale: the static activation scale, float32, for schemes that have one.
        kind: the class that the module becomes an instance of.

    Raises:
        ValueError: the parameter is not floating, or ``weight`` has another shape.
        UnsupportedError: no engine, or not the one that was named, can run it. The module is as it was then.
    """
    new = made(module, name, options, turned=turned, weight=weight, input_scale=input_scale)
    put(module, name, new, kind)
    assert isinstance(new, FP8Weight)
    return new


def made(
    module: nn.Module,
    name: str,
    options: FP8GemmOptions,
    *,
    turned: bool = False,
    weight: ScaledTensor | None = None,
    input_scale: torch.Tensor | None = None,
) -> Any:
    """The parameter that ``convert`` would put in place; the module is not touched."""
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.dtype.is_floating_point or parameter.dtype in FP8_DTYPES:
        found = f"no {name} parameter" if parameter is None else f"a {name} in {parameter.dtype}"
        raise ValueError(f"an FP8 weight is made from a floating parameter, found {found} in {type(module).__name__}")
    if isinstance(parameter, FP8Weight):
        raise ValueError(f"{name} of {type(module).__name__} is in FP8 already")
    plain = parameter.detach().transpose(-1, -2) if turned else parameter.detach()
    if weight is not None and tuple(weight.shape) != tuple(plain.shape):
        raise ValueError(f"the layer's {name} has shape {tuple(plain.shape)}, found {tuple(weight.shape)}")
    given = weight is not None
    scheme = options.resolved_scheme if given else scheme_for(options, name, tuple(plain.shape))
    layout = Layout(tuple(plain.shape), turned)
    home = Home(options, layout, scheme=scheme, input_scale=input_scale, trains=parameter.requires_grad)
    home.owned = True
    if weight is None and (parameter.is_meta or options.materialize_fp8_on_wrap):
        weight = quantized(plain, options, scheme, parameter.device)
    if weight is None:
        home.dense = parameter.detach().contiguous()
    else:
        home.stored = Stored(weight)
        if weight.device.type != "meta":
            home.form(parameter.dtype)  # raises where no engine can
    if not given and not parameter.is_meta:
        home.keep(parameter)
    return FP8Weight(home, parameter.dtype).as_parameter()


def put(module: nn.Module, name: str, parameter: nn.Parameter, kind: type[nn.Module] | None = None) -> None:
    """Puts a parameter that ``made`` made in its place. After each step the module is whole."""
    parameter.__dict__.update(_attributes(module._parameters[name]))
    install_hooks(module)
    module._parameters[name] = parameter
    if kind is not None and type(module) is not kind:
        module.__dict__["_bound"] = {}
        module.__dict__[_FORMER] = type(module)
        module.__class__ = kind


def revert(module: nn.Module, name: str) -> bool:
    """Gives the module its parameter back; True if it is the original, not a dequantized one."""
    weight = module._parameters[name]
    assert isinstance(weight, FP8Weight)
    home = weight._home
    exact = home.original is not None or home.stored is None
    parameter = home.original
    if parameter is None:
        parameter = nn.Parameter(weight.dequantize(), requires_grad=home.trains)
    elif home.pending and home.dense is not None:
        home.settle()  # what was written reaches the original
    if parameter.device != weight.device and not weight.is_meta:
        with torch.no_grad():
            parameter.data = parameter.data.to(weight.device)
    parameter.__dict__.update(_attributes(weight))
    module._parameters[name] = parameter
    if home.stored is not None:
        home.stored.forget_calls()
    leave(module)
    remove_hooks(module)
    return exact


def leave(module: nn.Module) -> None:
    """Gives the module its former class back."""
    former = module.__dict__.get(_FORMER)
    if former is not None:
        module.__class__ = former
        module.__dict__.pop(_FORMER, None)
        module.__dict__.pop("_bound", None)


def _attributes(parameter: Any) -> dict[str, Any]:
    """What others have written on a parameter, such as ``tensor_model_parallel``."""
    return {key: value for key, value in vars(parameter).items() if key not in _OURS}


def scheme_for(options: FP8GemmOptions, name: str, shape: tuple[int, ...]) -> Scheme:
    """The scheme that was asked; one scale a tensor means one for each expert and each half of a fused gate and up."""
    scheme = options.resolved_scheme
    if len(shape) == 3 and scheme.weight == TENSOR and "gate_up" in name and shape[1] % 2 == 0:
        return replace(scheme, weight=Granularity(shape[1] // 2, None))
    return scheme
