"""Recognizing einsums that are matrix products or products with a stack of experts, and arranging their operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class BatchedEinsum:
    """Rearranges x of an einsum to ``[E, M, K]``, and the product ``[E, M, N]`` to the einsum's output."""

    x_letters: str
    y_letters: str
    expert: str
    contracted: str
    made: str
    sizes: tuple[int, ...] = ()

    @property
    def rest(self) -> str:
        return "".join(letter for letter in self.x_letters if letter not in (self.expert, self.contracted))

    def input(self, x: torch.Tensor, *, experts: int) -> torch.Tensor:
        if self.expert not in self.x_letters:  # every expert gets all tokens
            x = x.expand(experts, *x.shape)
            letters = self.expert + self.x_letters
        else:
            letters = self.x_letters
        x = x.permute([letters.index(letter) for letter in self.expert + self.rest + self.contracted])
        self.sizes = tuple(x.shape[1:-1])
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def output(self, y: torch.Tensor) -> torch.Tensor:
        y = y.reshape(y.shape[0], *self.sizes, y.shape[-1])
        letters = self.expert + self.rest + self.made
        return y.permute([letters.index(letter) for letter in self.y_letters])


def letters_of(equation: str, place: int) -> tuple[str, str, str] | None:
    """The subscripts of the operand at ``place``, of the other operand and of the output; None unless the equation has
    two operands and an explicit output."""
    inputs, arrow, y = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    return (operands[place], operands[1 - place], y) if arrow and len(operands) == 2 else None


def batched_operands(equation: str, stack_position: int, *, stack_is_transposed: bool) -> BatchedEinsum | None:
    """The plan for an equation of two operands, one of them a stack; None if it is not a batched matrix product.

    It is one if the stack's subscripts are expert, output and contracted (``enk``, or ``ekn`` for a transposed stack),
    x has the contracted subscript and not the output one, and y has expert, output and all other subscripts of x.
    """
    letters = letters_of(equation, stack_position)
    if letters is None or "." in equation:
        return None
    w, x, y = letters
    if len(w) != 3 or len(set(w)) != 3 or len(set(x)) != len(x):
        return None
    expert, made, contracted = (w[0], w[2], w[1]) if stack_is_transposed else (w[0], w[1], w[2])
    plan = BatchedEinsum(x_letters=x, y_letters=y, expert=expert, contracted=contracted, made=made)
    fits = contracted in x and made not in x and sorted(y) == sorted(expert + made + plan.rest)
    return plan if fits else None


@dataclass(frozen=True)
class FoldedEinsum:
    """Rearranges x of an einsum to ``[..., K]``, and the product ``[..., N]`` to the einsum's output, for a weight
    whose K or N consists of several dimensions."""

    x_letters: str
    y_letters: str
    contracted: str
    made: str

    @property
    def rest(self) -> str:
        return "".join(letter for letter in self.x_letters if letter not in self.contracted)

    def input(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute([self.x_letters.index(letter) for letter in self.rest + self.contracted])
        return x.flatten(len(self.rest))

    def output(self, y: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        y = y.reshape(*y.shape[:-1], *sizes)
        return y.permute([(self.rest + self.made).index(letter) for letter in self.y_letters])


def folded_operands(equation: str, place: int) -> tuple[FoldedEinsum, bool] | None:
    """The plan for an equation whose operand at ``place`` is a matrix of its first dimension and all others flattened,
    and whether the first dimension is contracted; None if it is not such a product."""
    letters = letters_of(equation, place)
    if letters is None or "." in equation or len(letters[0]) < 2:
        return None
    w, x, y = letters
    if len(set(w)) != len(w) or len(set(x)) != len(x):
        return None
    for contracted, made in ((w[1:], w[0]), (w[0], w[1:])):
        rest = set(x) - set(contracted)
        if set(contracted) <= set(x) and not set(w) & rest and sorted(y) == sorted((*rest, *made)):
            return FoldedEinsum(x, y, contracted, made), contracted == w[0]
    return None
