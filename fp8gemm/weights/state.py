"""An FP8 weight in a ``state_dict``: ``weight``, ``weight_scale`` and ``input_scale``, compressed-tensors' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..scaled import FP8_DTYPES, ScaledTensor, Scheme

KEYS = ("weight", "weight_scale", "input_scale")


class Loadable(Protocol):
    """The layer that a weight is loaded into."""

    scheme: Scheme

    @property
    def weight_shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...


def save_weight(
    destination: dict[str, Any], prefix: str, weight: ScaledTensor, input_scale: torch.Tensor | None
) -> None:
    """Adds the weight's plain bytes and scales under their names, detached but not copied."""
    destination[prefix + "weight"] = weight.data.detach()
    destination[prefix + "weight_scale"] = weight.scale.detach()
    if input_scale is not None:
        destination[prefix + "input_scale"] = input_scale.detach()


def load_weight(
    layer: Loadable,
    state_dict: Mapping[str, Any],
    prefix: str,
    assign: bool,
    missing_keys: list[str],
    error_msgs: list[str],
) -> ScaledTensor | torch.Tensor | None:
    """The weight that a state dict holds for ``layer``: FP8 with its scales, or a dense one that is to be quantized.

    None where there is none; then the key is in ``missing_keys`` or the reason in ``error_msgs``, as ``nn.Module``
    collects them. ``assign`` takes the tensors themselves instead of copies on the layer's device.
    """
    name, scale_name = prefix + "weight", prefix + "weight_scale"
    data, scale = state_dict.get(name), state_dict.get(scale_name)
    if data is None or (data.dtype in FP8_DTYPES and scale is None):
        missing_keys += [key for key in (name, scale_name) if key not in state_dict]
        return None
    problem = _problem(layer, name, data, scale, assign)
    if problem:
        error_msgs.append(problem)
        return None
    device = data.device if assign else layer.device

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if assign else tensor.detach().to(device, copy=True)

    if data.dtype not in FP8_DTYPES or scale is None:
        return taken(data)
    return ScaledTensor(taken(data), taken(scale).to(torch.float32), layer.scheme.weight)


def _problem(layer: Loadable, name: str, data: torch.Tensor, scale: torch.Tensor | None, assign: bool) -> str:
    shape = layer.weight_shape
    if tuple(data.shape) != shape:
        return f"size mismatch for {name}: the layer has {shape}, the state dict {tuple(data.shape)}."
    if data.dtype in FP8_DTYPES and scale is not None:
        expected = layer.scheme.weight.scale_shape(shape)
        if tuple(scale.shape) != expected:
            return (
                f"size mismatch for {name}_scale: scheme {layer.scheme} has {expected}, the state dict "
                f"{tuple(scale.shape)}; patch the model with the scheme that was saved."
            )
    if layer.device.type == "meta" and not assign:
        return f"{name} is on meta: call to_empty(device=...) first, or load with assign=True."
    return ""
