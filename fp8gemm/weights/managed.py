"""Parameters that FSDP2 has sharded already when they become FP8: its own record of each has to be changed with them.

torch has no public way to do that. What is used here of ``FSDPParam`` is the same in torch 2.10 to 2.13; where it is
missing, such a parameter is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .geometry import Layout
from .shares import along, device_of, like
from .weight import FP8Weight

_USED = ("sharded_param", "reset_sharded_param", "_init_extensions", "_sharded_param_data", "all_gather_outputs")


def manager(module: nn.Module, name: str) -> Any:
    """FSDP2's record of a parameter, or None; FSDP2 leaves a hook on the module that refers to it."""
    for hook in getattr(module, "_load_state_dict_post_hooks", {}).values():
        names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
        if names != ("self",):
            continue
        found = hook.__closure__[0].cell_contents
        if type(found).__name__ == "FSDPParam" and found._module_info.param_name == name:
            return found
    return None


def refusal(module: nn.Module, name: str, layout: Layout) -> str:
    """Why a parameter that FSDP2 has sharded cannot become FP8; empty if it can."""
    found, parameter = manager(module, name), module._parameters[name]
    if found is None:
        return ""
    if not all(hasattr(found, used) for used in _USED):
        return "FSDP2 of this torch has sharded its weight: patch the model before fully_shard"
    if parameter is not found.sharded_param:
        return "its weight is gathered at the moment: call reshard() of the FSDP2 module before patching"
    split = [getattr(placement, "dim", None) for placement in parameter.placements]
    if [dim for dim in split if dim is not None] != [0] or getattr(found, "pin_memory", False):
        return "its weight is split by FSDP2 and otherwise, or offloaded: patch the model before fully_shard"
    if layout.folded is not None or (layout.turned and len(layout.shape) == 2) or layout.shape[-1] < 4:
        return "FSDP2 shards weights that are transposed, folded or narrower than a scale in their dense dtype"
    return ""


def refuse_smaller_mesh(module: nn.Module, mesh: Any) -> None:
    """Raises where FSDP2 was asked to keep gathered weights on fewer ranks, which it does not for tensor subclasses."""
    for name in module._parameters:
        after = getattr(manager(module, name), "post_forward_mesh_info", None)
        if after is not None and getattr(after, "shard_mesh_size", mesh.size()) != mesh.size():
            raise UnsupportedError(
                f"{name} of {type(module).__name__}: FSDP2 cannot reshard FP8 weights to a smaller mesh; use "
                "reshard_after_forward=True or False"
            )


def padded_share(weight: FP8Weight, parameter: Any) -> nn.Parameter:
    """This rank's rows of a whole weight as FSDP2 stores them: with as many as the rank with the most has."""
    every = along(parameter, 0)
    counts = [sum(end - first for first, end in runs) for runs in every]
    first = every[0][0][0] if every[0] else 0
    room = weight.new_zeros((max(counts), *weight.shape[1:]))
    if counts[0]:
        room.narrow(0, 0, counts[0]).copy_(weight.narrow(0, first, counts[0]))
    return like(parameter, room.to(device_of(parameter, weight)).narrow(0, 0, counts[0]))


def tell(module: nn.Module, name: str) -> None:
    """Lets FSDP2 know that the module has another parameter now."""
    found, parameter = manager(module, name), module._parameters[name]
    if found is None or parameter is found.sharded_param:
        return
    # Nothing that could have the same memory as the new shard: FSDP2 then pads it.
    found._sharded_param_data = torch.empty(0, dtype=torch.uint8, device="cpu")
    found.reset_sharded_param()
    found._init_extensions()
    found.all_gather_outputs = []
    found.__dict__.pop("_unsharded_param", None)
