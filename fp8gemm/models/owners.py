"""Which parameters of a module are factors of matrix products, judging by the class and structure of the module.

Each kind of module is a row of ``KINDS``: a function of the module and a parameter's name that returns the ``Role`` of
that parameter in the module, or None. The first row that returns a role decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..weights import FP8Linear
from ..weights.geometry import Layout
from ..weights.structure import STACK_NAMES, expert_count, is_transposed, stacks
from .reading import uses

# Linears whose forward is nn.Linear's own; the second is nn.MultiheadAttention's out_proj.
PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear)
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
UNSEEN = "its use is unknown: enable_fp8_gemm(model, example_inputs=...) observes what the model does with it"


@dataclass(frozen=True)
class Role:
    """How a module uses one of its parameters.

    ``layout`` is how the parameter's memory is a matrix or a stack of matrices; None if it is not one. ``multiplied``
    means that the module multiplies by it, ``looked_up`` that it takes rows of it. ``reason`` says why it must stay
    dense, and ``by_name`` that a filter that names it overrides this. ``listed`` is False if the report should not list
    it.
    """

    layout: Layout | None = None
    multiplied: bool = False
    looked_up: bool = False
    reason: str = ""
    by_name: bool = False
    listed: bool = True


def role_of(module: nn.Module, name: str) -> Role | None:
    """How ``module`` uses the parameter ``name``; None if it certainly is not a matrix."""
    parameter = module._parameters[name]
    if parameter is None or isinstance(parameter, nn.UninitializedParameter):
        return None
    if not parameter.is_floating_point() and not isinstance(module, nn.Linear):
        return None
    for kind in KINDS:
        role = kind(module, name, parameter)
        if role is not None:
            return role
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear with its own forward, so that it may become an FP8Linear."""
    return type(module) in (*PLAIN, FP8Linear)


_Kind = Callable[[nn.Module, str, torch.Tensor], "Role | None"]


def _linear(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    if not isinstance(module, nn.Linear) or name != "weight" or parameter.dim() != 2:
        return None
    if is_plain_linear(module):
        return Role(Layout.of(parameter.shape), multiplied=True)
    return replace(_told(module, name, parameter), listed=True)


def _attention(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    if not isinstance(module, nn.MultiheadAttention) or name not in projections:
        return None
    if type(module).forward is nn.MultiheadAttention.forward:
        return Role(Layout.of(parameter.shape), multiplied=True)
    return _told(module, name, parameter)


def _convolution(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    """A convolution whose windows do not overlap is a matrix product of patches with ``[N, C * patch]``; if transposed,
    it produces patches, with ``[C, N * patch]``."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    if name != "weight":
        return Role(listed=False)
    size = f"{'x'.join(map(str, module.kernel_size))} convolution"
    if not is_patchwise(module):
        return Role(reason=f"a {size}, whose windows overlap or which has groups, padding, dilation or another forward")
    first, *rest = parameter.shape
    layout = Layout.of((first, math.prod(rest)), turned=module.transposed, folded=parameter.shape)
    return Role(layout, multiplied=True)


def is_patchwise(module: nn.Module) -> bool:
    """Whether each input element of a convolution is in at most one window, of all channels, without padding; for a
    transposed convolution, each output element."""
    if not isinstance(module, CONVOLUTIONS) or module.groups != 1:
        return False
    padding = module.padding
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    unpadded = unpadded and not any(module.output_padding)
    whole = module.kernel_size == module.stride and (set(module.dilation) == {1} or set(module.kernel_size) == {1})
    return unpadded and whole and _convolves(module)


def _convolves(module: nn.Module) -> bool:
    """Whether a convolution uses its weight as torch's own forward does, perhaps with other code around that."""
    kind, own = type(module), next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
    inner = [getattr(one, "_conv_forward", None) for one in (kind, own)]
    return inner[0] is inner[1] and (kind.forward is own.forward or uses(kind, "weight") == uses(own, "weight"))


def _bilinear(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    if type(module) is not nn.Bilinear or name != "weight":
        return None
    outputs, first, second = parameter.shape
    return Role(Layout.of((outputs * first, second), folded=parameter.shape), multiplied=True)


def _headed(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    """A projection with a separate dimension for heads, ``[C, heads, N]`` or ``[N, heads, C]``, as in XLNet."""
    found = uses(type(module), name) if parameter.dim() > 2 else None
    if found is None or not found.is_factor or found.folded < found.products:
        return None
    first, *rest = parameter.shape
    layout = Layout.of((first, math.prod(rest)), turned=found.turned > 0, folded=parameter.shape)
    return Role(layout, multiplied=True)


def _stack(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    """Experts ``[E, N, K]`` or ``[E, K, N]``, recognized by the forward's code, else by a known name."""
    if name not in stacks(module):
        return None
    seen = uses(type(module), name, stacked=True)
    turned = is_transposed(module, name)
    if name not in STACK_NAMES and seen is not None and seen.is_factor:
        return Role(Layout.of(parameter.shape, turned=seen.turned > 0), multiplied=True)
    layout = Layout.of(parameter.shape, turned=turned)
    if name in STACK_NAMES:
        return Role(layout, multiplied=True)
    reason = "a stack of matrices, perhaps not experts: a module_filter that names it converts it"
    return Role(layout, multiplied=True, reason=reason, by_name=True)


def _flat_stack(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    """Experts concatenated in a matrix ``[E * N, K]``, the last one ``[E * K, N]``, as in DBRX."""
    experts = expert_count(module)
    if parameter.dim() != 2 or name not in STACK_NAMES or experts < 2 or parameter.shape[0] % experts:
        return None
    rows, columns = parameter.shape[0] // experts, parameter.shape[1]
    if rows not in _numbers(module):
        return None
    layout = Layout.of((experts, rows, columns), turned=name in ("w2", "down_proj"), folded=parameter.shape)
    return Role(layout, multiplied=True)


def _numbers(module: nn.Module) -> set[int]:
    return {value for value in vars(module).values() if type(value) is int}


def _recurrent(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if parameter.dim() != 2:
        return Role(listed=False)
    return Role(reason=f"{type(module).__name__} runs torch's own recurrent kernels, which take dense weights")


def _torchs_own(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    """Norms, embedding bags and other torch modules that do not multiply by their parameters."""
    if type(module).__module__.startswith("torch.nn") and not isinstance(module, (nn.Embedding, nn.Linear)):
        bare = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        return Role(listed=bare and _large(parameter), reason=UNSEEN)
    return None


def _by_its_code(module: nn.Module, name: str, parameter: torch.Tensor) -> Role | None:
    if parameter.dim() != 2:
        return Role(listed=False)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return Role(listed=False, reason="an embedding that renormalizes its rows in place (max_norm)")
    role = _told(module, name, parameter)
    dull = isinstance(module, nn.Embedding) and not role.multiplied
    return replace(role, listed=False) if dull else role


def _told(module: nn.Module, name: str, parameter: torch.Tensor) -> Role:
    """What the source of the module's forward does with a parameter."""
    found, owner = uses(type(module), name), type(module).__name__
    if found is None:
        return Role(reason=f"the source of {owner} cannot be read; {UNSEEN}", listed=_large(parameter))
    if found.is_factor:
        return Role(Layout.of(parameter.shape, turned=found.turned > 0), multiplied=True)
    if found.is_table:
        return Role(Layout.of(parameter.shape), looked_up=True)
    if found.others:
        return Role(reason=f"{owner} does more than multiply by it: {found.others[0]}", listed=_large(parameter))
    if found.products:
        return Role(reason=f"{owner} multiplies by it and by its transpose, or also looks up its rows")
    return Role(reason=UNSEEN, listed=_large(parameter))


def _large(parameter: torch.Tensor) -> bool:
    """Whether it is large enough to be a matrix worth converting."""
    return parameter.dim() == 2 and min(parameter.shape) >= 16


KINDS: tuple[_Kind, ...] = (
    _linear,
    _attention,
    _convolution,
    _bilinear,
    _recurrent,
    _headed,
    _stack,
    _flat_stack,
    _torchs_own,
    _by_its_code,
)
