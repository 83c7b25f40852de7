"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (Wan et al., 2025, arXiv:2512.23485).

    W' = V (S' + diag(l)) U',   W = V diag(l0) U'   for W (in, out)
(https://arxiv.org/abs/2512.23485)

`frod_V.<category> (in, in)` is of all layers that play one part, decomposed together; `frod_s_indices.<category>`
(2, n) and `frod_s_size.<category>` say which entries of S are not zero. `frod_lambda_l (in)`: l and
`frod_lambda_s_values (n)`: S train. `frod_U (out, in)` and l0 are solved for in float64 on the host, of V and the
weight, when an adapter begins or is read. Costs in + n parameters, n = sparse_rate in^2; 4 in^2 FLOPs more for each
token than the weight (2 in out further beside other adapters, and with dropout); in out numbers for each layer, as
many as its weight, in^2 for each category. Merged it is W + V (S' + diag(l - l0)) U': a fresh adapter changes no bit.
PEFT solves for U of a V of its own and then reads another V from the file: where the two differ, and be it in the sign
of a column, as LAPACK's may, it computes something else, until `frod_U` is set to what its
`_calculate_frod_u_and_lambda(V, W)` gives. Here U is of the V that is read. Without save_projection V follows from the
weights up to signs: our own files keep it, a file of PEFT's may mean another one. As in PEFT, of layers of one category
and number (those of an encoder and a decoder) the last alone shapes V.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._contract import Arrays, Base, Method, Site, dropped, fold_in_name, register, wide_dtype
from .._torch_random import Generator
from ._frod_config import FrodConfig
from ._joint import category, layer_number, lengths_and_rows, off_diagonal, on_host, shared_basis

SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


def uses(sites: Mapping[str, Site], config: FrodConfig) -> dict[str, dict[str, str]]:
    return {path: {name: f"{name}.{category(path)}" for name in SHARED} for path in sites}


def together(
    key: jax.Array, sites: Mapping[str, Site], config: FrodConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    members: dict[str, dict[int, str]] = {}
    for place, path in enumerate(sites):
        members.setdefault(category(path), {})[layer_number(path, place)] = path
    generator, shared = Generator(config.projection_prng_key), dict[str, jax.Array]()
    for name in sorted(members):
        layers = [weights[path]() for _, path in sorted(members[name].items())]
        sizes = sorted({site.in_features for path, site in sites.items() if category(path) == name})
        if len(sizes) > 1:
            raise ValueError(f"FRoD: all layers {name!r} share a basis, but have {sizes} inputs; expected one number")
        size = sizes[0]
        basis = on_host(
            lambda *own: shared_basis([w.T for w in own], config.regularization_alpha),
            (size, size),
            wide_dtype(layers[0].dtype),
            *layers,
        )
        shared[f"frod_V.{name}"] = basis.astype(layers[0].dtype)
        shared[f"frod_s_indices.{name}"] = jnp.asarray(off_diagonal(size, config.sparse_rate, generator))
        shared[f"frod_s_size.{name}"] = jnp.asarray(np.array([size, size], np.int32))
    return shared, {path: begin(key, path, shared, weights[path](), config) for path in sites}


def begin(key: jax.Array, path: str, shared: Arrays, w: jax.Array, config: FrodConfig) -> dict[str, jax.Array]:
    lengths, _ = decomposed(shared[f"frod_V.{category(path)}"], w)
    values = jnp.zeros(shared[f"frod_s_indices.{category(path)}"].shape[1])
    if not config.init_weights:
        key_l, key_s = jax.random.split(fold_in_name(key, path))
        lengths = lengths + 0.1 * jax.random.normal(key_l, lengths.shape, lengths.dtype)
        values = 0.1 * jax.random.normal(key_s, values.shape)
    return {"frod_lambda_l": lengths, "frod_lambda_s_values": values}


def decomposed(v: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(l0 (in), U (out, in)) of a canonical weight."""
    lengths, rows = on_host(lengths_and_rows, [w.shape[:1], w.shape], wide_dtype(w.dtype), v, w)
    return lengths, rows.T


def derive(p: Arrays, site: Site, config: FrodConfig, weight: Callable[[], jax.Array]) -> dict[str, jax.Array]:
    lengths, u = decomposed(p["frod_V"], weight())
    return {"frod_lambda_0": lengths, "frod_U": u}


def middle(p: Arrays, lengths: jax.Array) -> jax.Array:
    """(S + diag(lengths))', (in, in)."""
    rows, columns = p["frod_s_indices"]
    return jnp.diag(lengths).at[columns, rows].add(p["frod_lambda_s_values"].astype(lengths.dtype))


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    v, u, lengths = p["frod_V"], p["frod_U"], p["frod_lambda_l"]
    whole = base.alone and "rng" not in context
    inner = middle(p, lengths if whole else lengths - p["frod_lambda_0"].astype(lengths.dtype))
    h = base.apply(dropped(x, context), v)
    change = (h @ inner.astype(h.dtype)) @ u.T.astype(h.dtype)
    y = base(x)
    return change.astype(y.dtype) if whole else y + change.astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    wide = wide_dtype(w.dtype)
    lengths = p["frod_lambda_l"].astype(wide) - p["frod_lambda_0"].astype(wide)
    change = p["frod_V"].astype(wide) @ middle(p, lengths) @ p["frod_U"].T.astype(wide)
    return (w.astype(wide) + change).astype(w.dtype), b


FROD = register(
    Method(
        config=FrodConfig,
        together=together,
        uses=uses,
        derive=derive,
        forward=forward,
        merge=merge,
        dropout=lambda config: config.frod_dropout,
        frozen=frozenset(SHARED),
        derived=frozenset({"frod_U", "frod_lambda_0"}),
        unsaved=lambda config: frozenset() if config.save_projection else frozenset(SHARED),
        precious=frozenset({"frod_V"}),
    )
)
