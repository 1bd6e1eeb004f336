"""Fusing Linears that receive the same tensor, such as q, k and v, into one product."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..engines import PackedWeight
from ..errors import UnsupportedError
from ..scaled import Granularity, ScaledTensor
from ..weights import FP8Linear, FP8Weight, own_weights

# Names of children of one parent that may receive the same tensor.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_k", "to_v"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Fused:
    """The groups of layers that were fused, by name, and the reason for each group that was not.
    Example:
        >>> Fused(groups=(("q_proj", "k_proj"),), refused={}).groups
        (('q_proj', 'k_proj'),)
    """

    groups: tuple[tuple[str, ...], ...]
    refused: dict[tuple[str, ...], str]


def fuse_siblings(
    model: nn.Module, siblings: Sequence[Sequence[str]] = SIBLINGS, *, share_in_inference_mode: bool = False
) -> Fused:
    """Fuses FP8 Linears of one parent that receive the same tensor; patch the model first.

    The rows of their weights are concatenated in one FP8 weight with their scales, so nothing is quantized again.
    Fusing is verified, not assumed: in the first pass every layer runs alone and notes its input, and only layers that
    received the same tensor object, with an unchanged version counter, are fused. Later, a layer returns its part of
    the fused product only for that same object, unchanged; for any other input it runs alone, and its group is
    dissolved. Inside torch.compile every layer runs alone.

    For M > 1 the outputs are views of the fused one: their rows are not adjacent in memory.

    Args:
        siblings: names of children of one parent that may be fused.
        share_in_inference_mode: torch does not count writes to inference tensors. True promises that the model does
            not write to a tensor between the siblings' calls; otherwise layers run alone on inference tensors.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> block = torch.nn.ModuleDict({name: torch.nn.Linear(32, 16) for name in ("q_proj", "k_proj", "v_proj")})
        >>> fuse_siblings(enable_fp8_gemm(block)).groups
        (('q_proj', 'k_proj', 'v_proj'),)
    """
    groups: list[tuple[str, ...]] = []
    refused: dict[tuple[str, ...], str] = {}
    owners = Counter(id(weight) for module in model.modules() for _, weight in own_weights(module))
    for prefix, parent in model.named_modules():
        for names in siblings:
            found = [(name, child) for name, child in parent._modules.items() if name in names]
            members = [child for _, child in found if isinstance(child, FP8Linear)]
            if len(members) < 2 or any(isinstance(child, SiblingLinear) for child in members):
                continue
            full = tuple(
                f"{prefix}.{name}" if prefix else name for name, child in found if isinstance(child, FP8Linear)
            )
            tied = any(owners[id(member._parameters["weight"])] > 1 for member in members)
            reason = "the weight of one is tied to another layer's" if tied else _reason(members)
            if reason:
                refused[full] = reason
                continue
            group = Group(members=members, trusting=share_in_inference_mode)
            for index, member in enumerate(members):
                member.__dict__["_kind"] = type(member)
                member.__class__ = SiblingLinear
                member.__dict__["_place"] = (group, index)
            groups.append(full)
    return Fused(tuple(groups), refused)


def _reason(members: list[FP8Linear]) -> str:
    """Why layers cannot be fused; empty if they can."""
    first = members[0]
    if len({id(member) for member in members}) < len(members):
        return "they are one shared module"
    if any(type(member) is not FP8Linear for member in members):
        return "one is a subclass of FP8Linear"
    for name in ("in_features", "compute_dtype", "options", "scheme", "device"):
        values = [getattr(member, name) for member in members]
        if any(value != values[0] for value in values):
            return f"{name} differs: {', '.join(map(str, values))}"
    if first.scheme.static:
        return "each layer has its own static activation scale"
    rows = first.scheme.weight.rows
    if rows is not None and any(member.out_features % rows for member in members[:-1]):
        return f"blocks of {rows} rows would span two layers"
    return ""


class SiblingLinear(FP8Linear):
    """An FP8Linear that may return its part of a fused product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        place = self.__dict__.get("_place")
        y: torch.Tensor | None = None
        # Something else than a tensor is recorded by a symbolic trace, in which the layer is a leaf.
        if place is not None and isinstance(input, torch.Tensor) and not torch.compiler.is_compiling():
            group, index = place
            y = group.output(index, input)
        # Not super(): the group may just have dissolved, and this object may be an FP8Linear again.
        return FP8Linear.forward(self, input) if y is None else y

    @property
    def group(self) -> Group | None:
        """The layers that are fused with this one, once a pass has shown that they receive the same tensor."""
        place = self.__dict__.get("_place")
        return None if place is None else place[0]

    def revert(self) -> bool:
        self.leave()
        return FP8Linear.revert(self)  # not super(): leaving has changed the class

    def leave(self) -> None:
        """Leaves the group; the layer runs alone from now on."""
        if "_place" in self.__dict__:
            del self.__dict__["_place"]
            self.__class__ = self.__dict__.pop("_kind")


@dataclass(frozen=True, kw_only=True)
class _Given:
    """An input as it was received: the object, its version, and what else its product depends on."""

    tensor: weakref.ref[torch.Tensor]
    state: tuple[Any, ...]

    def matches(self, x: torch.Tensor, state: tuple[Any, ...]) -> bool:
        return self.tensor() is x and self.state == state


@dataclass(kw_only=True)
class Group:
    """The members of one fused product, their inputs in the first pass, and the parts not yet returned."""

    members: list[FP8Linear]
    trusting: bool
    seen: dict[int, _Given] = field(default_factory=dict)
    agreed: bool = False
    joined: FP8Linear | None = None
    sources: tuple[PackedWeight, ...] = ()
    waiting: tuple[_Given, dict[int, torch.Tensor]] | None = None
    bias: tuple[tuple[Any, ...], torch.Tensor | None] | None = None

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """A member's part of the fused product of ``x``; None if it has to run alone."""
        if not all(isinstance(member._parameters.get("weight"), FP8Weight) for member in self.members):
            return None  # one is paused
        if len(precisions := {member.home.precision for member in self.members}) > 1 or "original" in precisions:
            return None
        state = self._state(x)
        if state is None or x.device != self.members[0].device:
            return None
        if not self.agreed:
            self._observe(index, x, state)
            return None
        waiting = self.waiting
        if waiting is not None and index in waiting[1] and waiting[0].matches(x, state):
            y = waiting[1].pop(index)
            if not waiting[1]:
                self.waiting = None
            return self._counted(index, y)
        if waiting is not None and waiting[0].tensor() is not None and len(waiting[1]) < len(self.members):
            self._dissolve()  # a part was never requested: these layers do not receive the same tensor after all
            return None
        layer = self._joined(x)
        if layer is None:
            return None
        y = layer.forward(x)
        parts = dict(enumerate(y.split_with_sizes([member.out_features for member in self.members], -1)))
        mine = parts.pop(index)
        given = weakref.ref(x, self._forget)
        self.waiting = (_Given(tensor=given, state=state), parts)
        return self._counted(index, mine)

    def _forget(self, gone: weakref.ref[torch.Tensor]) -> None:
        """Frees the parts when the input tensor is freed, as nobody can request them any more."""
        if self.waiting is not None and self.waiting[0].tensor is gone:
            self.waiting = None

    def _state(self, x: torch.Tensor) -> tuple[Any, ...] | None:
        """What must not change between siblings; None if torch does not count writes to ``x``."""
        if x.is_inference():
            if not self.trusting:
                return None
            version = 0
        else:
            version = x._version
        stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (version, stream, autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    def _observe(self, index: int, x: torch.Tensor, state: tuple[Any, ...]) -> None:
        """The first pass: when every member was called, or one again, fuses those that received the same tensor."""
        if index not in self.seen:
            self.seen[index] = _Given(tensor=weakref.ref(x), state=state)
            if len(self.seen) < len(self.members):
                return
        most = Counter((id(given.tensor()), given.state) for given in self.seen.values() if given.tensor() is not None)
        agreed = []
        if most:
            tensor, common = most.most_common(1)[0][0]
            agreed = [
                place for place, given in self.seen.items() if (id(given.tensor()), given.state) == (tensor, common)
            ]
        for place, member in enumerate(self.members):
            if (place not in agreed or len(agreed) < 2) and isinstance(member, SiblingLinear):
                member.leave()
        self.members = [self.members[place] for place in sorted(agreed)]
        for place, member in enumerate(self.members):
            if "_place" in member.__dict__:
                member.__dict__["_place"] = (self, place)
        self.seen = {}
        self.agreed = len(self.members) > 1

    def _dissolve(self) -> None:
        self.waiting = None
        for member in self.members:
            if isinstance(member, SiblingLinear):
                member.leave()

    def _joined(self, x: torch.Tensor) -> FP8Linear | None:
        """The layer with all members' weights; rebuilt when one of them has changed."""
        sources = tuple(member.form(x.device) for member in self.members)
        if self.joined is None or any(a is not b for a, b in zip(sources, self.sources, strict=True)):
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            try:
                self.joined = join(self.members)
            except UnsupportedError:
                self._dissolve()
                return None
            share_memory(self.joined, self.members)
            self.sources = tuple(member.form(x.device) for member in self.members)
        self.joined._parameters["bias"] = self._bias()
        return self.joined

    def _bias(self) -> Any:
        """All biases concatenated; concatenated again only if one may have changed or requires a gradient."""
        biases = [member.bias for member in self.members]
        if all(bias is None for bias in biases):
            return None
        counted = all(bias is None or not bias.is_inference() for bias in biases)
        if torch.is_grad_enabled() or not counted:
            return joined_bias(self.members)
        state = tuple(None if bias is None else (id(bias), bias.device, bias._version) for bias in biases)
        if self.bias is None or self.bias[0] != state:
            self.bias = (state, joined_bias(self.members))
        return self.bias[1]

    def _counted(self, index: int, y: torch.Tensor) -> torch.Tensor:
        """Counts the call for the report, under the fused product's kernel."""
        assert self.joined is not None
        self.members[index].activity.count(self.joined.activity.latest)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """A copy starts observing anew: pending parts belong to the original's tensors."""
        twin = Group(members=[], trusting=self.trusting)
        memo[id(self)] = twin
        twin.members = [copy.deepcopy(member, memo) for member in self.members]
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": {}, "agreed": False, "joined": None, "sources": (), "waiting": None, "bias": None}


def join(members: Sequence[FP8Linear]) -> FP8Linear:
    """A layer that computes the concatenated outputs of ``members``: their FP8 bytes and scales, bit for bit."""
    first = members[0]
    weights = [member.scaled() for member in members]
    scheme = first.scheme.at(first.home.precision)
    if scheme.weight.rows is None:  # one scale per tensor becomes one per row
        scheme = replace(scheme, weight=Granularity(1, scheme.weight.cols))
        weights = [ScaledTensor(w.data, w.scale.expand(w.shape[0], -1).contiguous(), scheme.weight) for w in weights]
    weight = ScaledTensor(
        torch.cat([w.data.view(torch.uint8) for w in weights]).view(weights[0].data.dtype),
        torch.cat([w.scale for w in weights]),
        scheme.weight,
    )
    options = replace(first.options, scheme=scheme, engine=first.engine or first.options.engine)
    blank = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=first.compute_dtype)
    layer = FP8Linear.convert(blank, options, weight=weight)
    return layer.train(first.training)


def share_memory(joined: FP8Linear, members: Sequence[FP8Linear]) -> None:
    """Makes the members' FP8 bytes views of the fused ones, if the engine keeps those as plain rows."""
    data = joined.form(joined.device).data
    if tuple(data.shape) != (joined.out_features, joined.in_features) or not data.is_contiguous():
        return
    start = 0
    for member in members:
        own = member.scaled()
        member.home.take_bytes(ScaledTensor(data[start : start + member.out_features], own.scale, own.granularity))
        start += member.out_features


def joined_bias(members: Sequence[FP8Linear]) -> torch.Tensor | None:
    """All biases concatenated, zeros for a layer without one; None if none has one."""
    if all(member.bias is None for member in members):
        return None
    parts: list[torch.Tensor] = [
        torch.zeros(member.out_features, dtype=member.compute_dtype, device=member.device)
        if member.bias is None
        else member.bias
        for member in members
    ]
    return torch.cat(parts)
