"""The pair of trees: the caller's base parameters, and the adapters beside them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ._config import PeftConfig
from ._contract import Site


class Sites(Mapping[str, Site]):
    """The adapted modules of one adapter by path: static metadata that hashes once."""

    def __init__(self, sites: Mapping[str, Site]):
        self._sites = dict(sites)
        self._hash = hash(tuple(self._sites.items()))

    def __getitem__(self, path: str) -> Site:
        return self._sites[path]

    def __iter__(self):
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Sites) and self._sites == other._sites)

    def __repr__(self) -> str:
        return f"Sites({', '.join(self._sites)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter: small arrays by module path, in the names, shapes and orientation of PEFT's files.

    weights: {module path: {parameter name: array of shape (*stack, ...)}}.
    shared: parameters that many modules use. replaced: {leaf path: full trainable copy of that leaf}.
    scaling: {module path: array of shape (*stack,)}, kept as arrays so that another alpha does not recompile.
    config, sites: static. rows: {leaf path: single rows of a table that train}.
    """

    weights: dict[str, dict[str, Any]]
    shared: dict[str, Any]
    replaced: dict[str, Any]
    scaling: dict[str, Any]
    config: PeftConfig = dataclasses.field(metadata={"static": True})
    sites: Sites = dataclasses.field(metadata={"static": True})
    rows: dict[str, Any] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rng:
    """A PRNG key as plain numbers, so that optimizers can pass over it like over any other leaf."""

    data: jax.Array
    implementation: str = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(key: jax.Array) -> "Rng":
        return Rng(jax.random.key_data(key), str(jax.random.key_impl(key)))

    def key(self) -> jax.Array:
        return jax.random.wrap_key_data(self.data, impl=self.implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PeftParams:
    """Base parameters with adapters beside them: what `wrap` returns and a lifted function takes.

    base: the caller's tree, untouched. adapters: {name: Adapter}. active: the names in use (static), applied in
    this order. context: what a call needs besides its inputs, set by `with_context`.
    """

    base: Any
    adapters: dict[str, Adapter]
    active: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    context: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_peft_params(value: Any) -> bool:
    return isinstance(value, PeftParams)
