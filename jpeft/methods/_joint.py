"""What the layers of one category have in common, for FRoD: joint decompositions, on the host in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._torch_random import Generator


def on_host(function: Callable[..., Any], shapes: Any, dtype: Any, *arrays: jax.Array) -> Any:
    """`function` of float64 arrays of numpy, at once or as a callback of what is traced; shapes: of its results."""

    def of_numpy(*given: Any) -> Any:
        found = function(*(np.asarray(array, np.float64) for array in given))
        return jax.tree.map(lambda result: np.asarray(result, dtype), found)

    if any(isinstance(array, Tracer) for array in arrays):
        results = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))
        return jax.pure_callback(of_numpy, results, *arrays, vmap_method="sequential")
    return jax.tree.map(jnp.asarray, of_numpy(*arrays))


def shared_basis(matrices: Sequence[np.ndarray], ridge: float) -> np.ndarray:
    """V (in, in), invertible, with  M_k' = V D_k U_k'  nearly the same for all layers, of M_k (out, in)."""
    stacked = np.concatenate(matrices)
    if stacked.shape[0] < stacked.shape[1]:
        return np.linalg.svd(stacked)[2].T
    q, r = np.linalg.qr(stacked)
    parts = np.split(q, np.cumsum([len(matrix) for matrix in matrices])[:-1])
    mean = sum(np.linalg.inv(part.T @ part + ridge * np.eye(len(r))) for part in parts) / len(parts)
    return r.T @ np.linalg.eigh(mean)[1]


def lengths_and_rows(v: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    """[l (in), U' (in, out)] with  w (in, out) = V diag(l) U'  and the rows of U' of length 1, or 0 where l is."""
    try:
        rows = np.linalg.solve(v, w)
    except np.linalg.LinAlgError:
        rows = np.linalg.pinv(v, rcond=1e-6) @ w
    lengths = np.linalg.norm(rows, axis=1)
    nonzero = lengths > 1e-12
    return [lengths, np.where(nonzero[:, None], rows / np.where(nonzero, lengths, 1)[:, None], 0)]


def off_diagonal(size: int, rate: float, generator: Generator) -> np.ndarray:
    """(2, count) rows and columns of entries of a (size, size) matrix, drawn as PyTorch draws them for PEFT."""
    most = size * (size - 1)
    count = min(int(size * size * rate), most)
    if rate > 0 and most:
        count = max(1, count)
    if not count:
        return np.zeros((2, 0), np.int32)
    rows, places = np.divmod(generator.randperm(most, count), size - 1)
    return np.stack([rows, places + (places >= rows)]).astype(np.int32)


def layer_number(path: str, otherwise: int) -> int:
    """The number of the block that a module is in."""
    names = path.split(".")
    after = names[names.index("layers") + 1 :][:1] if "layers" in names else []
    return next((int(name) for name in (*after, *names) if name.isdigit()), otherwise)


def category(path: str) -> str:
    """The part that a module plays in its block, as a name.

    >>> category("layers.0.q_proj"), category("layers.0.self_attn.q_proj"), category("layer.1.attention.output.dense")
    ('q_proj', 'self_attn_q_proj', 'attention_output')
    """
    *before, last = path.split(".")
    if not before or before[-1].isdigit():
        return last
    if [*before[-2:], last] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{before[-1]}_{last}"
