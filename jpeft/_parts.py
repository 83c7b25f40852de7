"""What methods without sites train: modules in full, and single rows of tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._contract import Method, Site
from ._paths import last_name
from ._sites import Candidate
from ._targets import is_all_linear, targeted_modules
from ._tokens import OUTPUT_LAYERS, input_embedding, table_sites


def with_named_targets(config: Any, method: Method, leaves: Mapping[str, Any], found: Mapping[str, Candidate]) -> Any:
    """The config with the names of modules where it leaves them to the tree, as files have to say them.

    A table that is the output layer, too, acts there as well: a name of that layer means nothing more and is left out.

    >>> import jax.numpy as jnp, jpeft
    >>> from jpeft._contract import method_of
    >>> from jpeft._sites import candidates
    >>> leaves, config = {"wte.embedding": jnp.ones((9, 4))}, jpeft.TrainableTokensConfig(token_indices=[1])
    >>> with_named_targets(config, method_of(config), leaves, candidates(leaves)).target_modules
    'wte'
    """
    if method.rows is not None and config.target_modules is None:
        return dataclasses.replace(config, target_modules=input_embedding(found, "token_indices"))
    if method.rows is not None and isinstance(config.target_modules, tuple):
        names = tuple(name for name in config.target_modules if not _is_tied(name, found))
        return dataclasses.replace(config, target_modules=names or config.target_modules)
    if method.in_full and is_all_linear(config):
        return dataclasses.replace(config, target_modules=tuple(targeted_modules(leaves, found, config)))
    return config


def leaves_in_full(leaves: Mapping[str, Any], found: Mapping[str, Candidate], config: Any) -> list[str]:
    """The leaves of the modules that a method trains in full; raises ValueError as `targeted_modules` does."""
    modules = targeted_modules(leaves, found, config)
    return [path for path in leaves if any(path.startswith(f"{module}.") for module in modules)]


def rows_of(
    method: Method, leaves: Mapping[str, Any], found: Mapping[str, Candidate], config: Any
) -> dict[str, tuple[Site, tuple[int, ...]]]:
    """{module path: (its site, the rows that train)} of a method that trains rows; nothing of another one."""
    if method.rows is None:
        return {}
    return table_sites(found, targeted_modules(leaves, found, config), method.rows(config))


def as_they_are(method: Method, config: Any) -> bool:
    """Whether rows of tables begin as the tables have them: always beside a method with sites."""
    return method.rows is None or bool(getattr(config, "init_weights", True))


def _is_tied(name: str, found: Mapping[str, Candidate]) -> bool:
    return last_name(name) in OUTPUT_LAYERS and not any(path.endswith(name) for path in found)
