"""AdaMSS: Adaptive Multi-Subspace Approach (Zheng et al., 2025, https://openreview.net/forum?id=8ZdWmpYxT0).

    rows of group k of W':  W_k + B_k A_k N,   the last column of [W b] and N that of the bias, if there is one

for W (out, in) as in PyTorch: N (r, in [+ 1]) holds the first right singular vectors of [W b] and does not train; the
outputs are grouped by their rows of left ones. `adamss_A` (groups, q, r), `adamss_B` (out, q) in the order of the
groups, q = subspace_rank, and `adamss_newB` N; files hold A_k (rank of k, r) and B_k (outputs of k, rank of k). Which
outputs make a group is not in them: `adamss_labels` (out,) and the ranks, `adamss_ranks` (groups,), follow from W and b
(see `_clusters.py` for how surely) and are kept in a file beside PEFT's. Costs q (groups r + out) parameters and
r (in + 1) numbers that do not train, 2 groups q (in + out) FLOPs and groups q numbers of memory for each token, and
2 groups q r in FLOPs for each use.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import Arrays, Base, Method, Site, register, wide_dtype
from ._adamss_config import AdamssConfig as AdamssConfig
from ._clusters import approximate_vectors, clusters


def init(key: jax.Array, site: Site, config: AdamssConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    w, b = weight()
    matrix = w.astype(wide_dtype(w.dtype)).T
    if b is not None:
        matrix = jnp.concatenate([matrix, b.astype(matrix.dtype)[:, None]], axis=1)
    count, q = min(config.num_subspaces, site.out_features), config.subspace_rank
    u, v = approximate_vectors(matrix, min(config.r, *matrix.shape), config.random_seed)
    labels = clusters(u, count)
    of = (labels == jnp.arange(count, dtype=jnp.int32)[:, None]).astype(u.dtype)
    # What spans the rows of a group best are the first eigenvectors of their Gram matrix.
    with jax.default_matmul_precision("highest"):
        squares, vectors = jnp.linalg.eigh(jnp.einsum("ko,or,os->krs", of, u, u))
    ranks = jnp.minimum(of.sum(1).astype(jnp.int32), q)
    if config.use_dynamic_rank:
        large = squares > config.svd_threshold * squares[:, -1:]
        ranks = jnp.minimum(ranks, large.sum(1, dtype=jnp.int32))
    ranks = jnp.maximum(ranks, 1)
    own = jnp.swapaxes(vectors[:, :, ::-1][:, :, :q], 1, 2)
    own = jnp.pad(own, ((0, 0), (0, q - own.shape[1]), (0, 0))) * used(ranks, q, own.dtype)
    later = jnp.zeros((site.out_features, q))
    if config.init_weights is None:
        later = 0.01 * jax.random.normal(key, later.shape)
    found = {"adamss_A": own, "adamss_B": later, "adamss_newB": v.T}
    return {**found, "adamss_labels": labels, "adamss_ranks": ranks}


def used(ranks: jax.Array, q: int, dtype: Any) -> jax.Array:
    """(groups, q, 1): one for the ranks that a group has, zero for the others."""
    return (jnp.arange(q, dtype=jnp.int32) < ranks[:, None]).astype(dtype)[:, :, None]


def pair(p: Arrays) -> tuple[jax.Array, jax.Array]:
    """The factors (groups q, in [+ 1]) and (groups q, out) of the change."""
    a, b, labels = p["adamss_A"], p["adamss_B"], p["adamss_labels"]
    count, q, _ = a.shape
    a = a * used(p["adamss_ranks"], q, a.dtype)
    a = jnp.einsum("kqr,ri->kqi", a, p["adamss_newB"].astype(a.dtype)).reshape(count * q, -1)
    rows = jnp.zeros_like(b).at[jnp.argsort(labels, stable=True)].set(b)
    of = (labels == jnp.arange(count, dtype=labels.dtype)[:, None]).astype(b.dtype)
    spread = (of[:, None] * rows.T).reshape(count * q, -1)
    return a, p["scaling"].astype(spread.dtype) * spread


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = pair(p)
    # Where the layer has a bias, the engine puts the merged one in its place.
    y, h = base(x), base.apply(x, a[:, : site.in_features].T)
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    first, second = (factor.astype(w.dtype) for factor in pair(p))
    n = site.in_features
    return w + first[:, :n].T @ second, None if b is None else b + (first[:, n] @ second).astype(b.dtype)


ADAMSS = register(
    Method(
        config=AdamssConfig,
        init=init,
        forward=forward,
        merge=merge,
        frozen=frozenset({"adamss_newB"}),
        derived=frozenset({"adamss_labels", "adamss_ranks"}),
        precious=frozenset({"adamss_labels", "adamss_ranks"}),
        changes_bias=True,
        reads_bias=True,
    )
)
