"""Mixture-of-experts by structure: which parameters are stacks of experts, which way round, and which Linears route."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Names under which models keep stacks of experts' matrices; others are converted where a filter names them.
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
    """The names of a module's own floating 3-D parameters of at least two matrices with both sides of 16 or more."""
    for name, parameter in module._parameters.items():
        if parameter is None or isinstance(parameter, nn.UninitializedParameter) or parameter.dim() != 3:
            continue
        if parameter.dtype.is_floating_point and parameter.shape[0] > 1 and min(parameter.shape[1:]) >= 16:
            yield name


def is_transposed(owner: nn.Module, name: str) -> bool:
    """Whether a stack is ``[E, K, N]``: what the owner says (transformers' experts do), else what the shapes say.

    A fused gate and up makes twice what down takes: ``[E, 2I, H]`` with ``[E, H, I]``, or transposed ``[E, H, 2I]``
    with ``[E, I, H]``. Where nothing tells, ``[E, N, K]`` as ``nn.Linear`` has it.
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


def expert_count(module: nn.Module) -> int:
    """How many experts a module says that it has; 0 where it does not say."""
    for name in ("num_experts", "moe_num_experts", "num_local_experts", "n_experts", "n_routed_experts"):
        if type(count := getattr(module, name, None)) is int:
            return count
    return 0


def routers(model: nn.Module) -> dict[int, str]:
    """The modules that choose experts, by id, with the experts they choose from: one output each, beside them.

    A router is named as one, or is the child of what is named so, has one matrix, and stands beside, or beside the
    parent of, as many experts as that has rows: a stack, or a ModuleList.
    """
    found: dict[int, str] = {}
    for parent_name, parent in model.named_modules():
        counts = dict(_expert_counts(parent))
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


def _expert_counts(parent: nn.Module) -> Iterator[tuple[str, int]]:
    """What a module has that looks like experts, and how many."""
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
