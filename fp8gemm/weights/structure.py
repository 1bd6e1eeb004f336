"""Detecting mixture-of-experts layers: stacks of experts' matrices, their orientation, and their routers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# The usual parameter names of stacked experts. Other names are converted only where a filter names them.
STACK_NAMES = (
    "gate_up_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "v1",
    "w2",
    "w3",
    "w13",
    "w2_weight",
    "w13_weight",
)
ROUTER_NAMES = ("gate", "router", "gate_proj_router", "wg")


def stacks(module: nn.Module) -> Iterator[str]:
    """The names of the module's own 3-D floating-point parameters: at least two matrices, both sides at least 16."""
    for name, parameter in module._parameters.items():
        if parameter is None or isinstance(parameter, nn.UninitializedParameter) or parameter.dim() != 3:
            continue
        if parameter.dtype.is_floating_point and parameter.shape[0] > 1 and min(parameter.shape[1:]) >= 16:
            yield name


def is_transposed(owner: nn.Module, name: str) -> bool:
    """Whether a stack is ``[E, K, N]``: by the owner's ``is_transposed`` (as in transformers), else by the shapes.

    A fused gate and up projection has twice as many outputs as the down projection has inputs: ``[E, 2I, H]`` with
    ``[E, H, I]``, or transposed ``[E, H, 2I]`` with ``[E, I, H]``. Otherwise the stack is taken to be ``[E, N, K]``,
    as in ``nn.Linear``.
    """
    said = getattr(owner, "is_transposed", None)
    if isinstance(said, bool):
        return said
    gate_up, down = owner._parameters.get("gate_up_proj"), owner._parameters.get("down_proj")
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return False
    (_, a, b), (_, c, d) = gate_up.shape, down.shape
    plain, turned = (a == 2 * d and b == c), (b == 2 * c and a == d)
    return turned and not plain


def is_concatenated(owner: nn.Module) -> bool:
    """Whether up rows follow gate rows in a stack of both, as they do where the owner does not say otherwise."""
    return getattr(owner, "is_concatenated", True) is not False


def expert_count(module: nn.Module) -> int:
    """The number of experts in a module's attributes; 0 if it has none."""
    for name in ("num_experts", "moe_num_experts", "num_local_experts", "n_experts", "n_routed_experts"):
        if type(count := getattr(module, name, None)) is int:
            return count
    return 0


def routers(model: nn.Module) -> dict[int, str]:
    """The router modules, by id, with the name of the experts they choose from.

    A router has a router's name, or its parent has; it has one matrix, with as many rows as there are experts beside
    it or beside its parent, in a stack or in a ModuleList.
    """
    found: dict[int, str] = {}
    for parent_name, parent in model.named_modules():
        counts = dict(expert_counts(parent))
        if not counts:
            continue
        for name, child in parent._modules.items():
            if name not in ROUTER_NAMES or child is None:
                continue
            for module in (child, *child.children()):
                outputs = {p.shape[0] for p in module._parameters.values() if p is not None and _is_matrix(p)}
                for experts, count in counts.items():
                    if outputs == {count}:
                        found[id(module)] = f"{parent_name}.{experts}" if parent_name else experts
    return found


def _is_matrix(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, nn.UninitializedParameter) and parameter.dim() == 2


def expert_counts(parent: nn.Module) -> Iterator[tuple[str, int]]:
    """The names of a module's experts, stacked or in a ModuleList, and their number."""
    for name, child in parent._modules.items():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield name, len(child)
        elif child is not None and name not in ROUTER_NAMES:
            if (said := expert_count(child)) > 1:
                yield name, said
            for stack in stacks(child):
                yield f"{name}.{stack}", child._parameters[stack].shape[0]  # type: ignore[union-attr]
    for stack in stacks(parent):
        yield stack, parent._parameters[stack].shape[0]  # type: ignore[union-attr]


ITSELF = "(the model itself)"  # the name in tables of a layer that is the whole model


def layer_name(module: str, parameter: str) -> str:
    """What a weight is called: as the module of this name, or as its parameter if that is not ``weight``."""
    return module if parameter == "weight" else f"{module}.{parameter}".strip(".")
