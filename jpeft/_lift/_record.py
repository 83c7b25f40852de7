"""What happened to each adapted weight while a function was walked: the source of `explain` and of warnings."""

import dataclasses
from typing import Any

from .._contract import INPUT, STACK
from ._weight import UNKNOWN, AdaptedWeight, Axis, Term

LOW_RANK, LOOKUP, TRANSFORMED, REPLACED, UNUSED = "low-rank", "lookup", "transformed", "replaced", "unused"


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one adapted module: how it is computed, and by which primitive."""

    module: str
    adapter: str
    how: str
    primitive: str


def primitive_name(equation: Any | None) -> str:
    """What uses a weight; None stands for the end of the function, which returns it."""
    return "output" if equation is None else equation.primitive.name


class Record:
    """Collects uses; the only mutable thing in a walk, made anew for each trace."""

    def __init__(self) -> None:
        self._uses: dict[tuple[str, str, tuple[int, ...]], Use] = {}
        self._dropout: dict[tuple[str, str], dict[tuple[int, ...], int]] = {}
        self._kept: list[Any] = []
        self.roles: dict[str, dict[int, str]] = {}

    def keep(self, jaxpr: Any) -> None:
        """Hold a jaxpr, so that the identities of its equations stay unique."""
        self._kept.append(jaxpr)

    def use(self, weight: AdaptedWeight, how: str, place: tuple[int, ...], primitive: str, only: Term | None) -> None:
        for term in weight.terms if only is None else (only,):
            for site in term.sites:
                # A body that is traced again, and a merged weight that is used twice, say the same thing twice.
                self._uses[site.path, term.adapter, place] = Use(site.path, term.adapter, how, primitive)

    def dropout_index(self, term: Term, place: tuple[int, ...]) -> int:
        """Which use of a module this place is: each use of a weight drops other inputs."""
        seen = self._dropout.setdefault((term.site.path, term.adapter), {})
        return seen.setdefault(place, len(seen))

    def role(self, weight: AdaptedWeight, axis: Axis, role: str, *, lookup: bool = False) -> None:
        """Note what an axis of a leaf of unknown layout turned out to be; a lookup outranks a product."""
        if axis.role != UNKNOWN:
            return
        roles = self.roles.setdefault(weight.leaf, {})
        place = axis.place[0]
        if place not in roles or lookup or (role == STACK and roles[place] == INPUT):
            roles[place] = role

    def uses(self) -> list[Use]:
        return list(dict.fromkeys(self._uses.values()))

    def used(self) -> set[tuple[str, str]]:
        return {(use.adapter, use.module) for use in self._uses.values()}
