"""What a module's source says about one of its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Uses:
    """How a forward uses a parameter, according to its source.

    ``straight`` counts products with it as ``[N, K]``, ``turned`` as ``[K, N]`` (transposed), and ``lookups`` how often
    its rows are looked up; ``others`` lists all other uses. ``folded`` counts products with a parameter of more
    dimensions, which is a matrix of its first dimension and the others flattened.
    """

    straight: int = 0
    turned: int = 0
    lookups: int = 0
    folded: int = 0
    others: list[str] = field(default_factory=list)

    @property
    def products(self) -> int:
        return self.straight + self.turned

    @property
    def is_factor(self) -> bool:
        """Whether it is only multiplied by, and always in the same orientation."""
        return (self.straight > 0) != (self.turned > 0) and not self.lookups and not self.others

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up and it is not used otherwise."""
        return self.lookups > 0 and not self.products and not self.others
