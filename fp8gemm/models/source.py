"""Analyzing one method's source: which expressions are a certain parameter, and what is done with them."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Protocol

from .syntax import (
    arguments_of,
    in_groups,
    is_constant,
    is_method,
    is_module,
    is_name,
    last_name,
    matrix_letters,
    one_by_one,
)
from .uses import Uses

# Attributes and methods of a tensor that do not read its values.
_ABOUT = {"shape", "dtype", "device", "ndim", "requires_grad", "is_meta", "is_cuda", "layout", "itemsize", "nbytes"} | {
    *("size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "data_ptr"),
}
_SAME = {"to", "type_as", "detach", "data", "float", "half", "bfloat16", "view_as", "requires_grad_", "cuda", "cpu"}
_TURNED = {"T", "mT", "t"}
_TURNS = {"t", "transpose", "swapaxes", "permute"}
_PARTS = {"chunk", "split", "tensor_split"}
# and their operands, of which the last two are multiplied
_PRODUCTS = {
    **{"matmul": ("input", "other"), "mm": ("input", "mat2"), "bmm": ("input", "mat2"), "mv": ("input", "vec")},
    **dict.fromkeys(("addmm", "addmm_"), ("input", "mat1", "mat2")),
    **dict.fromkeys(("baddbmm", "baddbmm_"), ("input", "batch1", "batch2")),
    **dict.fromkeys(("addmv", "addmv_"), ("input", "mat", "vec")),
}
_NEUTRAL = {"isinstance", "hasattr", "len", "has_torch_function", "has_torch_function_unary", "id", "type"}
_ATTENTION: dict[str, int | None] = {  # parameters of F.multi_head_attention_forward, and their positions
    **{"in_proj_weight": 5, "out_proj_weight": 11},
    **{"q_proj_weight": None, "k_proj_weight": None, "v_proj_weight": None},
}


@dataclass(frozen=True)
class _Weight:
    """An expression that is the parameter, or some of its rows; ``turned`` if it was transposed an odd number of
    times."""

    turned: bool = False
    several: bool = False  # a tuple of several of them
    stacked: bool = False  # a stack of matrices
    grouped: bool = False  # groups of rows of one matrix, as from ``view(groups, -1, K)``, or one of the groups


Names = dict[str, _Weight]


class Reader(Protocol):
    """The protocol of a reader that follows one parameter through the methods of a class."""

    kind: type
    parameter: str
    stacked: bool
    found: Uses

    def method(self, name: str, after: type, names: Names, *, above: bool = False) -> None: ...


class Method:
    """A method's statements in order, with the names that refer to the parameter."""

    def __init__(self, reader: Reader, owner: type, tree: ast.FunctionDef | ast.AsyncFunctionDef, names: Names) -> None:
        self.reader, self.owner, self.tree, self.names = reader, owner, tree, dict(names)
        self.itself = tree.args.args[0].arg
        self.found = reader.found

    def run(self) -> None:
        for statement in self.tree.body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = one_by_one(targets, node.value)
            for value, names in [(self.value(value), names) for value, names in pairs]:
                for target in names:
                    self.assign(target, value, node)
            return
        if isinstance(node, ast.For):
            self.loop(node)
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.stmt):
                self.statement(part)
            elif isinstance(part, ast.expr):
                self.consume(part)
            else:
                for inner in ast.walk(part):
                    if isinstance(inner, ast.stmt):
                        self.statement(inner)

    def loop(self, node: ast.For | ast.comprehension) -> None:
        if (weight := self.value(node.iter)) is not None:
            if not weight.several and not weight.stacked:
                self.other(node)
            self.assign(node.target, _Weight(weight.turned), node)

    def assign(self, target: ast.expr, weight: _Weight | None, node: ast.AST) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for one in target.elts:
                self.assign(one, None if weight is None else _Weight(weight.turned), node)
        elif isinstance(target, ast.Name):
            self.names.pop(target.id, None)
            if weight is not None:
                self.names[target.id] = weight
        elif weight is not None:
            self.other(node)
        else:
            self.consume(target)

    def other(self, node: ast.AST) -> None:
        text = ast.unparse(node)
        if text not in self.found.others:
            self.found.others.append(text if len(text) <= 80 else text[:77] + "...")

    def consume(self, node: ast.AST) -> None:
        """An expression in which any use of the parameter counts as another use."""
        if self.value(node) is not None and not isinstance(node, (ast.Name, ast.Attribute)):
            self.other(node)

    def value(self, node: ast.AST) -> _Weight | None:
        """Whether an expression is the parameter; uses inside of the expression are counted."""
        handler = getattr(self, f"_{type(node).__name__}", None)
        if handler is not None:
            found: _Weight | None = handler(node)
            return found
        self.parts(node)
        return None

    def parts(self, node: ast.AST, *, neutral: bool = False) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, (ast.expr, ast.keyword, ast.comprehension)) and self.value(part) and not neutral:
                self.other(node)

    def _Name(self, node: ast.Name) -> _Weight | None:
        return self.names.get(node.id)

    def _Attribute(self, node: ast.Attribute) -> _Weight | None:
        if is_name(node.value, self.itself):
            return _Weight(stacked=self.reader.stacked) if node.attr == self.reader.parameter else None
        weight = self.value(node.value)
        if weight is None or node.attr in _ABOUT:
            return None
        return self.derived(weight, node.attr, [], node)

    def derived(self, weight: _Weight, name: str, arguments: list[ast.expr], node: ast.AST) -> _Weight | None:
        """A view, or a cast, of the parameter."""
        if name in _SAME or (name in ("contiguous", "clone") and not weight.turned):
            return weight
        if name in _TURNED or (name in _TURNS and len(arguments) == 2):
            return replace(weight, turned=not weight.turned)
        if in_groups(name, arguments) and not (weight.turned or weight.stacked):
            return _Weight(stacked=True, grouped=True)
        if name == "unsqueeze" and not weight.stacked:
            return weight
        if (name in _PARTS and not weight.turned and not weight.stacked) or (name == "unbind" and weight.stacked):
            return _Weight(weight.turned, several=True)
        self.other(node)
        return None

    def _Subscript(self, node: ast.Subscript) -> _Weight | None:
        weight = self.value(node.value)
        self.consume(node.slice)
        if weight is None:
            return None
        if weight.several:
            return _Weight(weight.turned)
        if isinstance(node.slice, ast.Slice):
            if weight.stacked or not weight.turned:
                return weight
        elif weight.stacked and not isinstance(node.slice, ast.Tuple):
            return replace(weight, stacked=False)
        self.other(node)
        return None

    def _IfExp(self, node: ast.IfExp) -> _Weight | None:
        self.consume(node.test)
        found = [self.value(node.body), self.value(node.orelse)]
        return found[0] or found[1]

    def _ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        outside = dict(self.names)
        for generator in node.generators:
            self.loop(generator)
            for test in generator.ifs:
                self.consume(test)
        if self.value(node.elt) is not None:
            self.other(node)
        self.names = outside

    _GeneratorExp = _ListComp

    def _NamedExpr(self, node: ast.NamedExpr) -> _Weight | None:
        weight = self.value(node.value)
        self.names.pop(node.target.id, None)
        if weight is not None:
            self.names[node.target.id] = weight
        return weight

    def _Compare(self, node: ast.Compare) -> None:
        identity = all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)
        self.parts(node, neutral=identity)

    def _BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self.product(node.left, node.right, node)
        else:
            self.parts(node)

    def product(self, left: ast.expr, right: ast.expr, node: ast.AST) -> None:
        a, b = self.value(left), self.value(right)
        if a is not None and b is not None:
            self.other(node)
        elif a is not None:
            self.count(a, node, straight=not a.turned)
        elif b is not None:
            self.count(b, node, straight=b.turned)

    def multiplication(self, arguments: dict[int | str, ast.expr], name: str, node: ast.Call) -> None:
        """A product by its name, whose factors are removed from its arguments."""
        factors = list(enumerate(_PRODUCTS[name]))[-2:]
        keys = [key for factor in factors for key in factor if key in arguments]
        if len(keys) == 2:
            self.product(arguments.pop(keys[0]), arguments.pop(keys[1]), node)

    def count(self, weight: _Weight, node: ast.AST, *, straight: bool) -> None:
        """A product that contracts the last dimension of the parameter, or else the second to last."""
        if weight.grouped and not straight:
            self.other(node)  # over a part of its rows
        self.found.straight += straight
        self.found.turned += not straight

    def _Call(self, node: ast.Call) -> _Weight | None:
        name = last_name(node.func)
        if self.follows(node, name):
            return None
        if isinstance(node.func, ast.Attribute) and not is_module(node.func.value):
            if name in _PRODUCTS:
                return self.function(node, name, node.func.value)
            owner = self.value(node.func.value)
            if owner is not None and name in _ABOUT:
                return None
            if owner is not None:
                for argument in node.args:
                    self.consume(argument)
                return self.derived(owner, name, node.args, node)
        return self.function(node, name)

    def function(self, node: ast.Call, name: str, *before: ast.expr) -> _Weight | None:
        """A call by the name of its function; for a method, what it is called on comes ``before`` its arguments."""
        arguments = arguments_of(node, *before)
        if name == "getattr" and len(node.args) >= 2 and is_constant(node.args[1], self.reader.parameter):
            return _Weight() if is_name(node.args[0], self.itself) else None
        if name == "linear" and (weight := self.take(arguments, 1, "weight")) is not None:
            if weight.stacked:
                self.other(node)
            self.count(weight, node, straight=not weight.turned)
        elif name == "embedding" and (weight := self.take(arguments, 1, "weight")) is not None:
            self.lookup(weight, node)
        elif name in _PRODUCTS:
            self.multiplication(arguments, name, node)
        elif name in _TURNS and node.args and (weight := self.value(node.args[0])) is not None:
            return self.derived(weight, name, node.args[1:], node)
        elif name == "einsum" and len(node.args) == 3:
            self.einsum(node, arguments)
        elif name == "multi_head_attention_forward":
            for keyword, place in _ATTENTION.items():
                if (weight := self.take(arguments, place, keyword)) is not None:
                    self.count(weight, node, straight=True)
        for argument in arguments.values():
            if self.value(argument) is not None and name not in _NEUTRAL:
                self.other(node)
        return None

    def take(self, arguments: dict[int | str, ast.expr], place: int | None, keyword: str) -> _Weight | None:
        """The argument, removed from its place, if it is the parameter."""
        for key in (place, keyword):
            if key is not None and key in arguments and (weight := self.value(arguments[key])) is not None:
                del arguments[key]
                return weight
        return None

    def lookup(self, weight: _Weight, node: ast.Call) -> None:
        if weight.turned or any(keyword.arg is None for keyword in node.keywords):
            self.other(node)
        else:
            self.found.lookups += 1

    def einsum(self, node: ast.Call, arguments: dict[int | str, ast.expr]) -> None:
        found = [self.value(argument) for argument in node.args[1:]]
        if found == [None, None]:
            return
        place = 0 if found[0] is not None else 1
        weight = found[place]
        equation = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
        stacked = weight is not None and weight.stacked
        letters = matrix_letters(equation, place, stacked=stacked) if isinstance(equation, str) else None
        if weight is None or found[1 - place] is not None or letters is None:
            self.other(node)
        else:
            self.count(weight, node, straight=(letters == "last") != weight.turned)
            self.found.folded += len(str(equation).partition("->")[0].split(",")[place].strip()) > 2 + stacked
        del arguments[1], arguments[2]

    def follows(self, node: ast.Call, name: str) -> bool:
        """Whether a call is one of another method of the module, which is then read too."""
        function = node.func
        if not isinstance(function, ast.Attribute):
            return False
        owner = function.value
        above = isinstance(owner, ast.Call) and is_name(owner.func, "super")
        if above:
            after: type | None = self.owner
        elif is_name(owner, self.itself):
            after = self.reader.kind if is_method(self.reader.kind, name) else None
        elif node.args and is_name(node.args[0], self.itself):  # nn.Linear.forward(self, x)
            after = next((kind for kind in self.reader.kind.__mro__ if kind.__name__ == last_name(owner)), None)
        else:
            after = None
        if after is None:
            return False
        arguments = [self.value(argument) for argument in node.args]
        others = [self.value(keyword.value) for keyword in node.keywords]
        if any(weight is not None for weight in (*arguments, *others)):
            self.other(node)  # passed on to code that is not followed
        self.reader.method(name, after, {}, above=above)
        return True
