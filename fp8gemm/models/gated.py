"""Gated MLPs, ``down(silu(gate(x)) * up(x))``: fuses the activation function with the quantization for ``down``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..weights import FP8Linear
from .siblings import Fused

Names = tuple[str, str, str]  # of the children gate, up and down


def fuse_gated(model: nn.Module) -> Fused:
    """Lets every gated MLP of ``model`` pass gate and up directly to its last layer; patch the model first.

    That layer then computes ``silu(gate) * up`` in float32 and quantizes it in one launch, if its engine quantizes
    activations (Triton's does, beyond 64 tokens); the model's own code would round the product twice. In all other
    cases the model's own code runs: few tokens, other engines, gradients, autocast, hooks on the layers, and
    torch.compile (which fuses the same by itself).

    MLPs are not recognized by name: a module's forward is traced and must be exactly this formula.

    Returns:
        The (gate, up, down) of each MLP, and for every other module with three FP8 layers, why it was not fused.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> class Mlp(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        ...     def forward(self, x):
        ...         return self.down(F.silu(self.gate(x)) * self.up(x))
        >>> fuse_gated(enable_fp8_gemm(Mlp())).groups
        (('gate', 'up', 'down'),)
    """
    groups: list[tuple[str, ...]] = []
    refused: dict[tuple[str, ...], str] = {}
    for prefix, module in model.named_modules():
        children = [name for name, child in module.named_children() if isinstance(child, FP8Linear)]
        if len(children) != 3 or hasattr(type(module), "_fp8gemm_plain"):
            continue
        names, reason = _formula_of(module)
        full = tuple(f"{prefix}.{name}" if prefix else name for name in names or children)
        if names is None:
            refused[full] = reason
        else:
            kind: Any = type(module)
            module.__class__ = gated_class(kind, names)
            groups.append(full)
    return Fused(tuple(groups), refused)


def split_gated(model: nn.Module) -> None:
    """Restores the code of every MLP that ``fuse_gated`` changed."""
    for module in model.modules():
        plain = getattr(type(module), "_fp8gemm_plain", None)
        if plain is not None:
            module.__class__ = plain


def last_layer(module: nn.Module) -> FP8Linear | None:
    """The layer to which a fused gated MLP passes gate and up; None for any other module."""
    names = getattr(type(module), "_fp8gemm_names", None)
    last = None if names is None else module._modules[names[2]]
    return last if isinstance(last, FP8Linear) else None


class _Tracer(fx.Tracer):
    """Traces into everything except FP8 layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FP8Linear)


def _formula_of(module: nn.Module) -> tuple[Names | None, str]:
    """The children gate, up and down if the module's forward is ``down(silu(gate(x)) * up(x))``, else why it is not."""
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # of any kind: tracing runs the module's code on proxies
        return None, f"its forward cannot be traced: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    nodes = [node for node in graph.nodes if node.users or node.op != "placeholder"]
    if sorted(node.op for node in nodes) != [*["call_function"] * 2, *["call_module"] * 3, "output", "placeholder"]:
        return None, f"its forward has {len(nodes)} steps and is not down(silu(gate(x)) * up(x))"
    x: Any = next(node for node in nodes if node.op == "placeholder")
    down: Any = next(node for node in nodes if node.op == "output").args[0]
    product: Any = _input(down)
    if product is None or product.target not in (operator.mul, torch.mul) or len(product.args) != 2:
        return None, "the input of its last layer is not a product"
    activations = [factor for factor in product.args if getattr(factor, "target", None) is F.silu]
    if len(activations) != 1 or not activations[0].args:
        return None, "its activation function is not silu"
    gate = activations[0].args[0]
    up = next(factor for factor in product.args if factor is not activations[0])
    if _input(gate) is not x or _input(up) is not x:
        return None, "the input of its first two layers is not the module's input"
    return (str(gate.target), str(up.target), str(down.target)), ""


def _input(node: Any) -> Any:
    """The argument of a layer's call; None if ``node`` is not such a call."""
    called = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return node.args[0] if called else None


@cache
def gated_class(base: Any, names: Names) -> type[nn.Module]:
    """A subclass of ``base``, of the same name, that passes gate and up to the last layer where this is possible."""

    @wraps(base.forward)  # others ask for its signature
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gate, up, down = (module._modules[name] for name in names)
        alone = len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        if alone and isinstance(down, FP8Linear) and not any(map(_observed, _inside(module, (gate, up)))):
            assert gate is not None
            assert up is not None
            return down.gated(gate(args[0]), up(args[0]))
        return base.forward(module, *args, **kwargs)

    return renamed_subclass(
        base, {"forward": forward, "_fp8gemm_plain": base, "_fp8gemm_names": names}, _rebuild, base, names
    )


def renamed_subclass(base: Any, members: dict[str, Any], rebuild: Callable[..., Any], *key: Any) -> type[Any]:
    """A subclass of ``base`` with its name and module; pickle recreates an instance by ``rebuild(*key)``."""

    def reduce(instance: Any, protocol: Any) -> Any:
        get_state = getattr(instance, "__getstate__", None)  # Python 3.11 and newer define it for every object
        return (rebuild, key, instance.__dict__ if get_state is None else get_state())

    own = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**members, **own})


def _rebuild(base: Any, names: Names) -> nn.Module:
    kind = gated_class(base, names)
    return kind.__new__(kind)


def _inside(module: nn.Module, called: tuple[nn.Module | None, ...]) -> list[nn.Module]:
    """The children whose own call is skipped."""
    return [child for child in module.children() if child not in called]


def _observed(child: nn.Module) -> bool:
    """Whether a child has hooks on its call."""
    hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks)
    return any(map(len, hooks)) or "forward" in vars(child)
