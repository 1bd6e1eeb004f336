"""What each matrix of a model is for, judged by shapes and by the path of the data; names only break ties."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..models.owners import CONVOLUTIONS, role_of
from ..models.selection import Holder, planned
from ..scaled import FP8GemmOptions
from ..weights import FP8Weight
from ..weights.sharding import held
from ..weights.structure import expert_counts, layer_name
from .flow import Passage, flow

Role = Literal[
    "embedder",
    "timestep",
    "modulation",
    "attention",
    "mlp",
    "router",
    "head",
    "final projection",
    "other",
]
# Attributes by which a module says that it splits its input among heads.
_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "head_dim")
_TIME = re.compile(r"^t$|^t_|time|guidance|sigma|noise")
_OTHER_CONDITION = re.compile(r"^y$|^y_|text|caption|context|class|label")


@dataclass(frozen=True)
class Matrix:
    """A matrix, or a stack of them: the module that owns it, its outputs ``n`` and its inputs ``k``."""

    name: str
    owner: str
    module: nn.Module
    n: int
    k: int
    experts: int = 0
    looked_up: bool = False
    multiplied: bool = True
    ties: tuple[str, ...] = ()


def roles(model: nn.Module, example_inputs: object = None) -> dict[str, Role]:
    """The role of each matrix of ``model``, by the name of its layer as in ``plan(model)``, embedding tables included.

    Without ``example_inputs``, roles follow from shapes and from where a matrix stands: four projections of one module
    are attention, two matrices of mirrored shapes an MLP, what stands before the first of several alike blocks embeds
    the input. With them the model runs once, and the path of the data decides: products with one row per sample that
    come from a scalar are the timestep's, those that scale and shift all tokens are modulation, and the last product
    before the output is the final projection. Works on patched models, too.

    Roles:
        ``embedder``: takes an input of the model to its width. ``timestep``: takes a scalar of each sample there.
        ``modulation``: makes scales and shifts from a vector of each sample. ``attention``, ``mlp``: in a block.
        ``router``: chooses experts. ``head``: makes the logits of a vocabulary or of classes. ``final projection``: the
        last product before any other output.

    Args:
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Example:
        >>> block = lambda: nn.ModuleDict({"up": nn.Linear(64, 256), "down": nn.Linear(256, 64)})
        >>> model = nn.ModuleDict({"first": nn.Linear(16, 64), "blocks": nn.ModuleList([block(), block()])})
        >>> list(roles(model).items())[:3]
        [('first', 'embedder'), ('blocks.0.up', 'mlp'), ('blocks.0.down', 'mlp')]
    """
    found = matrices(model)
    passages = {} if example_inputs is None else flow(model, example_inputs)
    judge = _Judge(model, found)
    decided: dict[str, Role] = {}
    for rule in _RULES:
        for name, role in rule(judge):
            decided.setdefault(name, role)
            judge.open.pop(name, None)
    static = {matrix.name: decided.get(matrix.name, "other") for matrix in found}
    return {matrix.name: _observed(matrix, static[matrix.name], passages, judge) for matrix in found}


def matrices(model: nn.Module) -> list[Matrix]:
    """All matrices that the model multiplies by or looks up, dense or in FP8, in the order of its modules."""
    steps, _ = planned(model, FP8GemmOptions(embeddings=True), None, {})
    places = [list(step.places) for step in steps]
    shared: dict[int, list[Holder]] = {}
    for path, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            weight = held(tensor)
            if isinstance(weight, FP8Weight):
                name = layer_name(path, parameter)
                role = role_of(module, parameter)
                if role is not None:
                    shared.setdefault(id(weight._home), []).append(Holder(name, module, parameter, role))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = [_matrix(sorted(each, key=lambda one: not one.role.multiplied)) for each in (*places, *shared.values())]
    return sorted((one for one in found if one is not None), key=lambda one: order.get(one.owner, 0))


def _matrix(places: list[Holder]) -> Matrix | None:
    place, ties = places[0], tuple(other.name for other in places[1:])
    weight = held(place.module._parameters.get(place.parameter))
    if weight is None or weight.dim() < 2:
        return None
    layout = weight._home.layout if isinstance(weight, FP8Weight) else place.role.layout
    shape = (weight.shape[0], weight.numel() // max(weight.shape[0], 1)) if layout is None else layout.shape
    return Matrix(
        name=place.name,
        owner=place.owner,
        module=place.module,
        n=shape[-2],
        k=shape[-1],
        experts=shape[0] if len(shape) == 3 else 0,
        looked_up=any(one.role.looked_up for one in places),
        multiplied=place.role.multiplied or not place.role.looked_up,
        ties=ties,
    )


class _Judge:
    """What the rules know of a model: its matrices, its width, its blocks, and which matrices have no role yet."""

    def __init__(self, model: nn.Module, found: list[Matrix]) -> None:
        self.model, self.all = model, found
        self.open = {matrix.name: matrix for matrix in found}
        self.order = {matrix.name: place for place, matrix in enumerate(found)}
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.inside = {path: [one for one in found if _within(one.owner, path)] for path in self.modules}
        self.blocks = set(self._blocks())
        sizes = Counter(size for one in found if one.multiplied and not one.experts for size in (one.n, one.k))
        self.width = max(sizes, key=lambda size: (sizes[size], size)) if sizes else 0
        self.vocabularies = {(one.n, one.k) for one in found if one.looked_up}
        self.outside = [one for one in found if one.multiplied and not self.in_block(one)]
        self.first_block = min((self.order[one.name] for one in found if self.in_block(one)), default=len(found))
        self.plain_norms = any(_is_plain_norm(module) for module in self.modules.values())

    def _blocks(self) -> Iterator[str]:
        for path, module in self.modules.items():
            if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
                continue
            paths = [f"{path}.{child}".strip(".") for child in module._modules]
            shapes = {one: sorted((m.n, m.k) for m in self.inside.get(one, ())) for one in paths}
            for one in paths:
                alike = sum(shapes[other] == shapes[one] for other in paths)
                own = module._modules[one.rpartition(".")[2]]
                repeated = isinstance(module, nn.ModuleList) and own in list(module._modules.values())
                if len(shapes[one]) > 1 and (alike > 1 or (repeated and len(shapes[one]) > 2)):
                    yield one

    def in_block(self, matrix: Matrix) -> bool:
        return any(_within(matrix.owner, block) for block in self.blocks)

    def groups(self) -> Iterator[tuple[nn.Module, list[Matrix]]]:
        """The modules from the innermost out that contain no block, with their matrices."""
        for path in sorted(self.modules, key=lambda path: -path.count(".") if path else 1):
            if not any(_within(block, path) and block != path for block in self.blocks):
                yield self.modules[path], self.inside[path]


_Rule = Callable[[_Judge], Iterator[tuple[str, Role]]]


def _routers(judge: _Judge) -> Iterator[tuple[str, Role]]:
    for path in judge.modules:
        counts = {count for _, count in expert_counts(judge.modules[path])}
        for one in judge.inside[path] if counts else ():
            near = one.owner.removeprefix(path).strip(".").count(".") < 2
            if one.k == judge.width and not one.experts and near and (one.n in counts or one.n == 1):
                yield one.name, "router"


def _tables(judge: _Judge) -> Iterator[tuple[str, Role]]:
    for one in judge.all:
        tied = one.looked_up and one.multiplied
        if tied or (one in judge.outside and one.k == judge.width and (one.n, one.k) in judge.vocabularies):
            yield one.name, "head"
        elif one.looked_up:
            yield one.name, "embedder"


def _modulations(judge: _Judge) -> Iterator[tuple[str, Role]]:
    """A multiple of the width, made from an activation in a module that has no other matrix, or without a partner."""
    narrow = {one.k for one in judge.all if one.n == judge.width != one.k}
    partners = narrow | {2 * k for k in narrow}
    for path, module in judge.modules.items():
        inside = judge.inside[path]
        if len(inside) != 1 or path == inside[0].owner or inside[0].experts:
            continue
        children = list(module.children())
        acts = any(not list(child.parameters()) and not _is_plain_norm(child) for child in children)
        first = not isinstance(module, nn.Sequential) or children[-1:] == [inside[0].module]
        if acts and first and _is_multiple(inside[0], judge) and (judge.plain_norms or inside[0].n not in partners):
            yield inside[0].name, "modulation"
    for one in judge.outside:
        if judge.plain_norms and one.k == judge.width and _is_multiple(one, judge) and one.n not in partners:
            yield one.name, "modulation"


def _attentions(judge: _Judge) -> Iterator[tuple[str, Role]]:
    for module, inside in judge.groups():
        own = [one for one in inside if _parent(judge, one) is module]
        heads = any(type(module.__dict__.get(name)) is int for name in _HEADS)
        if isinstance(module, nn.MultiheadAttention) or _projects(inside) or _packed(inside, heads):
            found = inside
        elif heads and not isinstance(module, nn.ModuleList) and len(own) > 2 and not list(_pairs(own)):
            found = own
        else:
            continue
        yield from ((one.name, "attention") for one in found if one.name in judge.open)


def _parent(judge: _Judge, matrix: Matrix) -> nn.Module:
    """The module that a matrix is a part of; a container of one matrix counts as that matrix."""
    path = matrix.owner.rpartition(".")[0]
    while isinstance(judge.modules[path], (nn.ModuleList, nn.Sequential)) and len(judge.inside[path]) == 1 and path:
        path = path.rpartition(".")[0]
    return judge.modules[path]


def _projects(inside: list[Matrix]) -> bool:
    """Whether four matrices are a query, a key and a value of equal shapes, and an output that reverses the query."""
    if len(inside) != 4 or any(one.experts for one in inside):
        return False
    for out in inside:
        rest = [one for one in inside if one is not out]
        for query in rest:
            key, value = (one for one in rest if one is not query)
            alike = (key.n, key.k) == (value.n, value.k) and key.n and query.n % key.n == 0
            if alike and (out.n, out.k) == (query.k, query.n):
                return True
    return False


def _packed(inside: list[Matrix], heads: bool) -> bool:
    """Whether two matrices are a packed projection to query, key and value, and an output."""
    if len(inside) != 2 or any(one.experts for one in inside):
        return False
    for packed, out in (inside, inside[::-1]):
        if packed.k == out.n and (packed.n == 3 * out.k or (heads and packed.n > out.k)):
            return True
    return False


def _mlps(judge: _Judge) -> Iterator[tuple[str, Role]]:
    for one in judge.all:
        if one.experts:
            yield one.name, "mlp"
    for module, inside in judge.groups():
        if module is judge.model and judge.blocks:
            continue
        left = [one for one in inside if one.name in judge.open]
        for name in _pairs([one for one in left if judge.in_block(one) or len(left) > 2]):
            yield name, "mlp"


def _pairs(inside: list[Matrix]) -> Iterator[str]:
    """Matrices that widen and those that narrow again, perhaps with two halves of which one is a gate."""
    for up in inside:
        for down in inside:
            halves = down.k in (up.n, up.n / 2) or down.k == up.n + up.k
            if up is not down and up.k == down.n and halves and up.n != up.k:
                yield up.name
                yield down.name


def _ends(judge: _Judge) -> Iterator[tuple[str, Role]]:
    """Embedders before the blocks, and the last matrix behind them."""
    ends = [one for one in judge.outside if one.name in judge.open]
    before = [one for one in ends if judge.order[one.name] < judge.first_block]
    modulated = any(role == "modulation" for _, role in _modulations(judge))
    behind = [one for one in ends if one not in before or not judge.blocks]
    last = next(iter([*(one for one in behind[::-1] if one.k == judge.width != one.n), *behind[::-1]]), None)
    for place, one in enumerate(ends):
        if one is last:
            classes = one.n != judge.width and not modulated
            yield one.name, "head" if classes and judge.blocks else "final projection"
        elif modulated and _is_of_time(one.name):
            yield one.name, "timestep"
        elif place == 0 or (judge.blocks and one.n == judge.width and (one in before or one.k != judge.width)):
            yield one.name, "embedder"


def _is_of_time(name: str) -> bool:
    for part in reversed(name.lower().split(".")):
        if _TIME.search(part) or _OTHER_CONDITION.search(part):
            return not _OTHER_CONDITION.search(part)
    return False


def _rest(judge: _Judge) -> Iterator[tuple[str, Role]]:
    """What is left in a block: square matrices are of attention, which may be split over modules, others of an MLP."""
    for one in judge.all:
        if judge.in_block(one) and one.name in judge.open and not isinstance(one.module, CONVOLUTIONS):
            yield one.name, "attention" if one.n == one.k == judge.width else "mlp"


_RULES: tuple[_Rule, ...] = (_routers, _tables, _modulations, _attentions, _mlps, _ends, _rest)


def _observed(matrix: Matrix, static: Role, passages: Mapping[str, Passage], judge: _Judge) -> Role:
    """The role after one forward pass has been observed; the static one where that shows nothing more."""
    seen = next((passages[name] for name in (matrix.name, *matrix.ties) if name in passages), None)
    if seen is None or not matrix.multiplied or static == "router" or matrix.experts:
        return static
    if seen.scored or seen.after_scores:
        return "attention"
    if seen.last and not judge.in_block(matrix):
        return "head" if static == "head" and (judge.vocabularies or seen.per_sample) else "final projection"
    if seen.per_sample and seen.broadcast and (judge.in_block(matrix) or _is_multiple(matrix, judge)):
        return "modulation"
    if seen.per_sample and seen.scalar:
        return "timestep"
    if (seen.first or seen.before_blocks) and not judge.in_block(matrix):
        return "embedder"
    if static in ("timestep", "modulation", "final projection", "head"):  # which the path of the data has not shown
        return "other"
    return static


def _is_multiple(matrix: Matrix, judge: _Judge) -> bool:
    return any(width and matrix.n % width == 0 and matrix.n // width > 1 for width in {judge.width, matrix.k})


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a norm without parameters of its own."""
    affine = getattr(module, "elementwise_affine", getattr(module, "affine", None))
    return affine is False and getattr(module, "weight", None) is None


def _within(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}.")
