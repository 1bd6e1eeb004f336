"""State-dict hooks for any module that owns FP8 weights: ``weight``, ``weight_scale`` and ``input_scale``.

These are compressed-tensors' names. For a parameter ``name`` other than ``weight`` the keys are ``name``,
``name_scale`` and ``name_input_scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..scaled import FP8_DTYPES, ScaledTensor
from .entry import FP8Entry
from .home import Home
from .sharding import Gathered, held, whole_scheme
from .shares import is_split, like, whole_layout
from .split_state import Entry, entries, loaded
from .stored import Stored
from .weight import FP8Weight

# torch.distributed.checkpoint.state_dict looks for an attribute for each key of a state dict. It asks a method of this
# name for another attribute, which has the first.
_NAMES, _SCALES = "_fqn_modifiers", "_fp8gemm_scales"
# torch.jit.script calls the attribute of this name of every module first.
_SCRIPT = "__prepare_scriptable__"


class _Scales:
    """An object that seems to have all scales as attributes."""

    def __getattr__(self, name: str) -> None:
        if not name.endswith("_scale"):
            raise AttributeError(name)


class _NamesOfScales(dict[str, str]):
    def get(self, name: Any, default: Any = None) -> Any:
        return _SCALES if str(name).endswith("_scale") else default


def _names_of_scales() -> dict[str, str]:
    return _NamesOfScales()


def refuse_script() -> None:
    """Raises in place of torch.jit.script, since torch.jit.save crashes on tensors without a storage."""
    raise UnsupportedError(
        "torch.jit.script cannot compile FP8 weights: use torch.compile or torch.export, or call "
        "fp8gemm.disable_fp8_gemm(model) first"
    )


def install_hooks(module: nn.Module) -> None:
    """Registers the hooks that save and load the FP8 weights of ``module``."""
    if not hooked(module):
        if not hasattr(module, _NAMES):
            module.__dict__.update({_NAMES: _names_of_scales, _SCALES: _Scales()})
        module.__dict__[_SCRIPT] = refuse_script
        module.register_state_dict_post_hook(_save)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_load)  # type: ignore[no-untyped-call]


def hooked(module: nn.Module) -> bool:
    """Whether ``install_hooks`` has been called on the module."""
    return any(hook is _save for hook in module._state_dict_hooks.values())


def remove_hooks(module: nn.Module) -> None:
    """Undoes ``install_hooks`` once the module has no FP8 weight left."""
    if any(isinstance(held(parameter), FP8Weight) for parameter in module._parameters.values()):
        return
    if module.__dict__.get(_SCRIPT) is refuse_script:
        del module.__dict__[_SCRIPT]
    if module.__dict__.get(_NAMES) is _names_of_scales:
        del module.__dict__[_NAMES], module.__dict__[_SCALES]
    for key in [key for key, hook in module._state_dict_hooks.items() if hook is _save]:
        del module._state_dict_hooks[key]
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _load]:
        del hooks[key]


def own_weights(module: nn.Module) -> list[tuple[str, FP8Weight]]:
    """The names and values of the FP8 weights among a module's own parameters."""
    parameters: dict[str, Any] = module._parameters
    return [(name, p) for name, p in parameters.items() if isinstance(p, FP8Weight)]


def input_scale_key(key: str) -> str:
    """The state-dict key of the activation scale of the weight ``key``."""
    owner, dot, name = key.rpartition(".")
    return f"{owner}{dot}input_scale" if name == "weight" else f"{key}_input_scale"


def _save(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    """Replaces each FP8 weight in the state dict by its bytes, followed by its scales.

    With ``keep_vars=True`` a state dict has the parameters themselves, which torch.distributed.pipelining looks for.
    """
    parameters = {prefix + name: parameter for name, parameter in module._parameters.items()}
    ours = {key: p for key, p in parameters.items() if isinstance(held(p), FP8Weight) and key in state}
    if not ours or any(state[key] is parameter for key, parameter in ours.items()):
        return
    after = list(state.items())
    start = next(place for place, (key, _) in enumerate(after) if key in ours)
    for key, _ in after[start:]:
        del state[key]
    for key, value in after[start:]:
        parameter = ours.get(key)
        if parameter is None or not isinstance(held(value), FP8Weight):
            state[key] = value
            continue
        weight: FP8Weight = held(parameter)
        if is_split(parameter):
            state.update(entries(parameter, key))
        else:
            entry = FP8Entry.of(weight)
            state[key] = entry
            state[key + "_scale"] = entry.scale.detach()
        if weight._home.input_scale is not None:
            state[input_scale_key(key)] = weight._home.input_scale.detach()


def _load(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Prepares the entries of the state dict for nn.Module: FP8 weights, or dense values, which are quantized later."""
    assign = bool(metadata.get("assign_to_params_buffers", False))
    for name, parameter in module._parameters.items():
        weight: FP8Weight = held(parameter)
        if not isinstance(weight, FP8Weight):
            continue
        key, split = prefix + name, is_split(parameter)
        data, scale = state.get(key), state.pop(key + "_scale", None)
        input_scale = state.pop(input_scale_key(key), None)
        if data is None:
            if scale is None:
                missing.append(key + "_scale")
            continue
        if isinstance(data, FP8Entry) and (scale is None or data.dtype not in FP8_DTYPES):
            data = data.handed_over()  # it has its scale
        codes = isinstance(held(data), Entry) or (data.dtype in FP8_DTYPES and not isinstance(data, FP8Weight))
        if codes and scale is None:
            missing.append(key + "_scale")
        problem = _problem(parameter, key, data, scale if codes else None, assign)
        if problem:
            errors.append(problem)
        if problem or (codes and scale is None):
            # the weight itself: it stays unchanged
            state[key] = parameter.detach() if split else weight.like()  # type: ignore[union-attr]
            continue
        if split:
            part = loaded(parameter, data, scale, input_scale)
            if not assign:
                weight.data = part
            state[key] = like(parameter, part if assign else weight)
            continue
        if codes:
            data = _loaded(weight, data, scale, input_scale, assign)
        elif isinstance(data, FP8Weight):
            data = data if assign else data.to(weight.device, weight.dtype).clone()
        else:
            data = data.detach() if assign else data.detach().to(weight.device, weight.dtype, copy=True)
        if assign:
            state[key] = data if isinstance(data, FP8Weight) else weight.adopt(data)
        else:  # not by copy_, which would treat the values as an update of the old weight
            weight.data = data
            state[key] = weight.like()


def _problem(parameter: Any, key: str, data: torch.Tensor, scale: torch.Tensor | None, assign: bool) -> str:
    """Why an entry of a state dict does not fit; empty if it does."""
    if tuple(data.shape) != tuple(parameter.shape):
        return f"size mismatch for {key}: the layer has {tuple(parameter.shape)}, the state dict {tuple(data.shape)}."
    weight = held(parameter)
    home = weight._home
    if isinstance(home, Gathered):
        return f"{key} is gathered from all ranks: call model.reshard() before load_state_dict."
    shape = whole_layout(parameter).shape if is_split(parameter) else home.layout.shape
    expected = whole_scheme(home.scheme).weight.scale_shape(shape)
    if scale is not None and tuple(scale.shape) != expected:
        return (
            f"size mismatch for {key}_scale: scheme {home.scheme} has {expected}, the state dict {tuple(scale.shape)}; "
            "patch the model with the scheme that was saved."
        )
    if scale is not None and home.precision == "original":
        return f"{key} runs on its original, which FP8 bytes are not: call set_precision(model, pattern, 'fp8') first."
    if weight.is_meta and not assign:
        return f"{key} is on meta: call to_empty(device=...) first, or load with assign=True."
    return ""


def _loaded(
    weight: FP8Weight, data: torch.Tensor, scale: torch.Tensor, input_scale: torch.Tensor | None, assign: bool
) -> FP8Weight:
    """An FP8 weight made of the state dict's own tensors, or of copies on the layer's device."""
    home = weight._home

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            plain = tensor.detach().as_subclass(torch.Tensor)
            return plain if assign else plain.to(weight.device, copy=True)

    data = taken(data)
    data = home.layout.plain(data).contiguous()
    scaled = ScaledTensor(data, taken(scale).to(torch.float32), home.scheme.weight)
    scheme = home.scheme if input_scale is None else home.scheme.calibrated()
    new = Home(home.options, home.layout, stored=Stored(scaled), scheme=scheme, trains=home.trains)
    new.input_scale = home.input_scale if input_scale is None else taken(input_scale)
    return FP8Weight(new, weight.dtype)
