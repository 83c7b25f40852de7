"""Single rows of a lookup table that train: PEFT's `trainable_token_indices`, beside any method.

The rows that are stored are values, which stand in the place of the table's; not differences. Where the table is the
output layer too, they act there as well.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._config import PeftConfig
from ._contract import EMBEDDING, LINEAR, Arrays, Base, Method, Site
from ._paths import last_name
from ._sites import Candidate, canonical, checked_weight

INPUT_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "shared", "embed_in", "tok_embeddings")
"""What models call the table of their tokens, if they have others beside it."""

OUTPUT_LAYERS = ("lm_head", "embed_out", "decoder")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of one table that train. values: (rows, features). indices, site: which rows of which table; static."""

    values: Any
    indices: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    site: Site = dataclasses.field(metadata={"static": True})


def token_sites(found: Mapping[str, Candidate], config: Any) -> dict[str, tuple[Site, tuple[int, ...]]]:
    """{module path: (its site, the rows that train)} as `config.trainable_token_indices` says.

    found: the tree's `candidates`. Raises ValueError for a name that no module has, a list if the table of the tokens
    is not known, a module that is neither a table nor a linear layer, and rows that are not there or named twice.

    >>> import jpeft
    >>> from ._sites import candidates
    >>> found = candidates({"embed_tokens.embedding": jnp.ones((9, 4))})
    >>> config = jpeft.LoraConfig(target_modules=["q"], trainable_token_indices=[2, 3])
    >>> {path: indices for path, (site, indices) in token_sites(found, config).items()}
    {'embed_tokens': (2, 3)}
    """
    asked = getattr(config, "trainable_token_indices", None)
    if asked is None:
        return {}
    if not isinstance(asked, Mapping):
        return {path: (_site(found[path], asked), tuple(asked)) for path in [input_embedding(found)]}
    sites: dict[str, tuple[Site, tuple[int, ...]]] = {}
    for name, indices in asked.items():
        paths = [path for path in found if path.endswith(name)]
        tied = [path for path in sites if sites[path][1] == tuple(indices) and last_name(name) in OUTPUT_LAYERS]
        if not paths and not tied:
            raise ValueError(
                f"trainable_token_indices names {name!r}, which no module is called; the tables of the tree are: "
                f"{', '.join(_tables(found)) or 'none'} (a table that is the output layer too is named once)"
            )
        sites.update({path: (_site(found[path], indices), tuple(indices)) for path in paths})
    return sites


def table_sites(
    found: Mapping[str, Candidate], paths: list[str], indices: tuple[int, ...]
) -> dict[str, tuple[Site, tuple[int, ...]]]:
    """{module path: (its site, the rows that train)} of modules of which the same rows train.

    Raises ValueError as `token_sites` does.
    """
    odd = [path for path in paths if path not in found]
    if odd:
        raise ValueError(
            f"target_modules means {odd[0]!r}, which has no weight; the tables of the tree are: "
            f"{', '.join(_tables(found)) or 'none'}"
        )
    return {path: (_site(found[path], indices, "token_indices"), indices) for path in paths}


def _tables(found: Mapping[str, Candidate]) -> list[str]:
    return [path for path in found if found[path].kind == EMBEDDING]


def input_embedding(found: Mapping[str, Candidate], field: str = "trainable_token_indices", mend: str = "") -> str:
    """The table of the tokens; raises ValueError if it is not known which one that is. field, mend: for the message."""
    tables = _tables(found)
    named = [path for name in INPUT_EMBEDDINGS for path in tables if last_name(path) == name]
    if not named and len(tables) != 1:
        told = {"token_indices": "target_modules=[name]"}.get(field, f"{field}={{name: [...]}}")
        raise ValueError(
            f"{field} is {'not told' if mend else 'a list'}, but which table holds the tokens is not known among: "
            f"{', '.join(tables) or 'none'}; say it as {mend or told}"
        )
    return (named or tables)[0]


def _site(candidate: Candidate, indices: Any, field: str = "trainable_token_indices") -> Site:
    site = candidate.site()
    if site.kind not in (EMBEDDING, LINEAR) or site.stack or len(site.shape) != 2:
        raise ValueError(
            f"{field} means {site.leaf!r}, {site.kind} of shape {site.shape}; expected the table of a "
            "lookup, or a linear layer, by itself"
        )
    rows = site.in_features if site.kind == EMBEDDING else site.out_features
    wrong = [index for index in indices if not isinstance(index, int) or not 0 <= index < rows]
    if wrong or len(set(indices)) < len(indices) or not indices:
        raise ValueError(
            f"{field} for {site.leaf!r} of {rows} rows is {list(indices)!r}; expected rows that it "
            "has, at least one, each of them once"
        )
    return site


def initial_rows(
    leaf: Any, site: Site, indices: tuple[int, ...], dtype: Any, key: jax.Array | None = None
) -> TokenRows:
    """The rows as the table has them, or normal ones with a key; abstract if the table is."""

    def take(leaf: Any) -> jax.Array:
        if key is not None:
            features = site.out_features if site.kind == EMBEDDING else site.in_features
            return jax.random.normal(key, (len(indices), features), dtype)
        whole = canonical(checked_weight(leaf, site), site.layout)
        return (whole if site.kind == EMBEDDING else whole.T)[jnp.array(indices)].astype(dtype)

    values = jax.eval_shape(take, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else take(leaf)
    return TokenRows(values, indices, site)


@functools.cache
def row_method(indices: tuple[int, ...]) -> Method:
    """What such rows do to a module, as a method whose one array is "rows" (rows, features)."""
    order = sorted(range(len(indices)), key=indices.__getitem__)
    ascending = tuple(indices[place] for place in order)

    def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
        y, rows = base(x), p["rows"]
        if site.kind == LINEAR:
            return tied(p, x, y, site)
        if jnp.issubdtype(x.dtype, jnp.inexact):  # rows weighted and summed, as by a one-hot product
            at = jnp.array(indices)
            return base(x.at[..., at].set(0)) + (x[..., at] @ rows.astype(x.dtype)).astype(y.dtype)
        ids = jnp.clip(x, 0, site.in_features - 1)
        known = jnp.array(ascending, ids.dtype)
        place = jnp.clip(jnp.searchsorted(known, ids), 0, len(ascending) - 1)
        chosen = rows[jnp.array(order)][place].astype(y.dtype)
        return jnp.where((known[place] == ids)[..., None], chosen, y)

    def tied(p: Arrays, x: jax.Array, y: jax.Array, site: Site) -> jax.Array:
        own = x @ p["rows"].astype(x.dtype).T
        return y.at[..., jnp.array(indices)].set(own.astype(y.dtype), unique_indices=True)

    def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
        rows = p["rows"].astype(w.dtype)
        at = jnp.array(indices)
        return (w.at[at].set(rows) if site.kind == EMBEDDING else w.at[:, at].set(rows.T)), b

    return Method(
        config=PeftConfig,
        init=lambda key, site, config, weight: {},
        merge=merge,
        forward=forward,
        tied=tied,
        kinds=frozenset({EMBEDDING, LINEAR}),
    )


def check_tables(
    tokens: Mapping[str, tuple[Site, tuple[int, ...]]], sites: Mapping[str, Site], saved: Mapping[str, Any]
) -> None:
    """Raise ValueError if a table whose rows train is adapted or saved in full, too."""
    adapted = {site.leaf for site in sites.values()}
    for path, (site, _) in tokens.items():
        if site.leaf in adapted or site.leaf in saved:
            other = "target_modules" if site.leaf in adapted else "modules_to_save"
            raise ValueError(f"trainable_token_indices means {path!r}, and {other} does, too; name it in one of them")


def check_overlap(rows: Mapping[str, Mapping[str, TokenRows]]) -> None:
    """Raise ValueError if several adapters have the same row of a table. rows: {adapter: {leaf path: rows}}."""
    owners: dict[tuple[str, int], str] = {}
    for name, own in rows.items():
        for leaf, part in own.items():
            for index in part.indices:
                first = owners.setdefault((leaf, index), name)
                if first != name:
                    raise ValueError(
                        f"adapters {first!r} and {name!r} both have row {index} of {leaf!r} "
                        "(trainable_token_indices); expected one of them"
                    )
