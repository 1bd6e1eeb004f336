"""The path of the data through a model: what one observed forward pass shows of each of its matrix products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ..models.batches import Batch, evaluating
from ..models.inputs import unfused
from ..models.multiplies import factors_of, multiply_adds
from ..models.observation import Observer
from ..weights import FP8Weight

aten = torch.ops.aten
_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math.default,
)
_SCALES = (aten.mul.Tensor, aten.mul_.Tensor, aten.add.Tensor, aten.add_.Tensor, aten.addcmul.default)
# What values are made from, besides products, whose names stand for themselves.
_INPUT, _SCALAR, _SCORES = "an input", "a scalar of each sample", "attention scores"


@dataclass
class Passage:
    """What one forward pass showed of the products with one matrix.

    Attributes:
        order: its place among all products.
        rows: the rows of its input, M, in the largest of its products; for stacks of experts, the rows of each.
        first: its input comes from an input of the model, through no other product.
        scalar: its input comes from one number for each sample, through no products but such as do, too.
        scored: its output became queries, keys or values of attention, with no other product between.
        after_scores: its input comes from attention, with no other product between.
        broadcast: its output scaled or shifted something larger.
        last: its output reached the model's output, with no later product between.
        per_sample: it has no more rows than there are samples, while other products have.
        before_blocks: it came before the first attention.
    """

    order: int
    rows: int
    first: bool = False
    scalar: bool = False
    scored: bool = False
    after_scores: bool = False
    broadcast: bool = False
    last: bool = False
    per_sample: bool = False
    before_blocks: bool = False


class _Tracer(Observer):
    """Follows values through the operations of a forward pass, by their storage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.passages: dict[str, Passage] = {}
        self.made: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}
        self.scores = 0

    def labels(self, tensors: Iterable[Any]) -> frozenset[str]:
        """What the values of these tensors were made from."""
        found: frozenset[str] = frozenset()
        for tensor in tensors:
            if (
                isinstance(tensor, torch.Tensor)
                and not isinstance(tensor, FP8Weight)
                and tensor.layout is torch.strided
            ):
                storage, labels = self.made.get(tensor.untyped_storage()._cdata, (None, found))
                if storage is not None and not storage.expired():  # type: ignore[no-untyped-call]
                    found |= labels
        return found

    def label(self, made: Any, labels: frozenset[str]) -> None:
        for tensor in tree_leaves(made):
            if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), labels)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, torch.Tensor)]
        before = self.labels(operands)
        y = super().__torch_dispatch__(func, types, args, kwargs)
        name = self.weight_of(func, args, operands, y)
        if name is not None:
            self.passed(name, before, multiply_adds(func, args, y))
            self.label(y, frozenset({name}))
        elif func in _ATTENTION or len(factors_of(func, args)) == 2:
            self.scored(before)
            self.label(y, frozenset({_SCORES}))
        else:
            if func in _SCALES and isinstance(y, torch.Tensor):
                for name in self.labels(one for one in operands if 1 < one.numel() < y.numel()):
                    if name in self.passages:
                        self.passages[name].broadcast = True
            self.label(y, before)
        return y

    def weight_of(self, func: Any, args: tuple[Any, ...], operands: list[torch.Tensor], y: Any) -> str | None:
        """The parameter that an operation multiplies by; None if it is not a product with one."""
        fp8 = next((one for one in operands if isinstance(one, FP8Weight)), None)
        if fp8 is not None:
            home = getattr(fp8._home, "source", None) or fp8._home
            return self.homes.get(id(home)) if multiply_adds(func, args, y) else None
        factors = [self.source(factor) for factor in factors_of(func, args) if isinstance(factor, torch.Tensor)]
        return next((name for name in factors if name is not None), None)

    def passed(self, name: str, before: frozenset[str], count: int) -> None:
        weight = self.weights.get(name, self.parameters.get(name))
        rows = 0 if weight is None else count // max(weight.numel(), 1)
        earlier = {one for one in before if one in self.passages}
        seen = self.passages.setdefault(name, Passage(order=len(self.passages), rows=0))
        seen.rows = max(seen.rows, rows)
        seen.first |= not earlier and bool(before & {_INPUT})
        seen.scalar |= not before & {_INPUT, _SCORES} and all(self.passages[one].scalar for one in earlier)
        seen.after_scores |= _SCORES in before and not earlier
        seen.before_blocks |= not self.scores

    def scored(self, before: frozenset[str]) -> None:
        names = [name for name in before if name in self.passages]
        self.scores += bool(names)
        for name in names:
            self.passages[name].scored = True


def flow(model: nn.Module, example_inputs: object) -> dict[str, Passage]:
    """Runs ``model`` once, in evaluation mode and without gradients, and says what became of each of its products, by
    the name of the layer.

    Raises:
        ValueError: there is no tensor among the inputs.
    """
    batch = Batch.of(example_inputs)
    inputs = [one for one in tree_leaves((batch.args, batch.kwargs)) if isinstance(one, torch.Tensor)]
    if not inputs:
        raise ValueError("example_inputs has no tensor")
    samples = max((one.shape[0] for one in inputs if one.dim()), default=1)
    tracer = _Tracer(model)
    for one in inputs:
        tracer.label(one, frozenset({_SCALAR if one.numel() <= samples and one.dim() < 2 else _INPUT}))
    with evaluating(model), unfused(), tracer:
        output = batch.run(model)
    reached = [name for name in tracer.labels(tree_leaves(output)) if name in tracer.passages]
    if reached:
        tracer.passages[max(reached, key=lambda name: tracer.passages[name].order)].last = True
    most = max((seen.rows for seen in tracer.passages.values()), default=0)
    for seen in tracer.passages.values():
        seen.per_sample = seen.rows <= samples < most
        seen.before_blocks &= tracer.scores > 0
    return {(name.removesuffix(".weight") if name != "weight" else ""): seen for name, seen in tracer.passages.items()}
