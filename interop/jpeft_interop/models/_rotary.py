"""Rotary position embeddings (RoFormer, https://arxiv.org/abs/2104.09864) and the ways to stretch them.

Stretching: `linear` (position interpolation, https://arxiv.org/abs/2306.15595), `dynamic` (NTK-aware), `yarn`
(https://arxiv.org/abs/2309.00071), `llama3` (Llama 3.1, https://arxiv.org/abs/2407.21783), `longrope`
(https://arxiv.org/abs/2402.13753).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._config import refuse

_MEND = "load an edited copy of the config if you know better"


@dataclass(frozen=True)
class Rope:
    """The rotary settings of a model; `dim` features of each head are rotated, in pairs `(i, i + dim / 2)`."""

    dim: int
    max_positions: int
    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


def read_rope(
    raw: Mapping[str, Any],
    *,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10000.0,
    partial_rotary_factor: float = 1.0,
) -> Rope:
    """The `Rope` of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    `partial_rotary_factor` is the one that the family rotates by. Raises ValueError for a type, or a key of a
    type, that is not known here.

    >>> read_rope({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, head_dim=8, max_positions=64)
    ... # doctest: +ELLIPSIS
    Rope(dim=8, max_positions=64, rope_type='linear', rope_theta=500000.0, factor=2, ...)
    """
    given = {k: v for k, v in (raw.get("rope_scaling") or raw.get("rope_parameters") or {}).items() if v is not None}
    rope_type = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if rope_type not in _TYPES:
        refuse("rope_parameters", {"rope_type": rope_type}, f"known types: {', '.join(_TYPES)}", _MEND)
    kind = _TYPES[rope_type]
    given.setdefault("rope_theta", raw.get("rope_theta") or default_theta)
    stated = given.pop("partial_rotary_factor", raw.get("partial_rotary_factor") or partial_rotary_factor)
    if stated != partial_rotary_factor:
        refuse("rope_parameters", {"partial_rotary_factor": stated}, f"expected {partial_rotary_factor}", _MEND)
    if rope_type == "default":
        # Other types' keys stay behind in such configs, and have no effect there.
        given = {"rope_theta": given["rope_theta"]}
    if unknown := {k: v for k, v in given.items() if k not in {"rope_theta", *kind.required, *kind.optional}}:
        known = ", ".join(kind.required + kind.optional)
        refuse("rope_parameters", unknown, f"keys of {rope_type!r}: {known}", _MEND)
    if "original_max_position_embeddings" in kind.optional:
        given.setdefault("original_max_position_embeddings", max_positions)
        if raw.get("original_max_position_embeddings"):  # Phi-3 states it beside, and there it counts for more.
            given["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    if missing := [key for key in kind.required if key not in given]:
        raise ValueError(f"rope_parameters of rope_type {rope_type!r} must give {', '.join(missing)}; got {given}")
    dim = int(head_dim * partial_rotary_factor)
    return Rope(dim, max_positions, rope_type, **kind.completed(given, dim, max_positions))


def rotary_tables(rope: Rope, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `(batch, length, 1, dim)` of `positions (batch, length)`, computed in float32."""
    frequencies, scaling = _TYPES[rope.rope_type].frequencies(rope, positions)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return (jnp.cos(angles) * scaling).astype(dtype), (jnp.sin(angles) * scaling).astype(dtype)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first `dim` features of each head of `x (batch, length, heads, head_dim)`; the rest pass through."""
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    low, high = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-high, low], axis=-1) * sin
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


Frequencies = Callable[[Rope, jax.Array], tuple[Any, float]]
"""`(rope, positions) -> (inverse frequencies (dim / 2,), scaling of the cosines and sines)`."""


def _inverse_frequencies(rope: Rope) -> np.ndarray:
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return (1.0 / np.power(np.float32(rope.rope_theta), exponents)).astype(np.float32)


def _default(rope: Rope, positions: jax.Array) -> tuple[Any, float]:
    return _inverse_frequencies(rope), 1.0


def _linear(rope: Rope, positions: jax.Array) -> tuple[Any, float]:
    return _inverse_frequencies(rope) / np.float32(rope.factor), 1.0


def _dynamic(rope: Rope, positions: jax.Array) -> tuple[Any, float]:
    # The base grows with the longest position of the call, so that this one is not a constant of the model.
    length = jnp.maximum(positions.max() + 1, rope.max_positions).astype(jnp.float32)
    stretch = rope.factor * length / rope.max_positions - (rope.factor - 1.0)
    theta = rope.rope_theta * stretch ** (rope.dim / (rope.dim - 2))
    return theta ** (-np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)), 1.0


def _llama3(rope: Rope, positions: jax.Array) -> tuple[Any, float]:
    frequencies = _inverse_frequencies(rope)
    trained = rope.original_max_position_embeddings or rope.max_positions
    turns = trained * frequencies / np.float32(2 * math.pi)  # full turns within the length of pretraining
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / rope.factor + blend * frequencies).astype(np.float32), 1.0


def _yarn(rope: Rope, positions: jax.Array) -> tuple[Any, float]:
    trained = rope.original_max_position_embeddings or rope.max_positions

    def dimension_of(turns: float) -> float:
        return rope.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32.0), dimension_of(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3)
    interpolated = np.clip(ramp, 0.0, 1.0)
    frequencies = _inverse_frequencies(rope)
    blended = interpolated * frequencies / rope.factor + (1 - interpolated) * frequencies
    return blended.astype(np.float32), _yarn_scaling(rope)


def _yarn_scaling(rope: Rope) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _longrope(rope: Rope, positions: jax.Array) -> tuple[Any, float]:
    short, long = (np.asarray(factor, np.float32) for factor in (rope.short_factor, rope.long_factor))
    trained = rope.original_max_position_embeddings or rope.max_positions
    # All positions of a call turn alike: the keys of a cache that was filled by shorter calls stay as they are.
    factors = jnp.where(positions.max() + 1 > trained, long, short)
    scaling = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(trained))
    return _inverse_frequencies(rope) / factors, scaling if rope.attention_factor is None else rope.attention_factor


def _completed_longrope(given: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    factors = {name: tuple(given[name]) for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if len(values) != dim // 2:
            raise ValueError(f"rope_parameters hold {len(values)} numbers as {name}; expected {dim // 2}, one a pair")
    return {"factor": max_positions / given["original_max_position_embeddings"], **given, **factors}


@dataclass(frozen=True)
class _Type:
    """`completed(given, dim, max_positions)`: the settings with those that follow from others."""

    frequencies: Frequencies
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    completed: Callable[[Mapping[str, Any], int, int], Mapping[str, Any]] = lambda given, dim, max_positions: given


_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")

_TYPES: dict[str, _Type] = {
    "default": _Type(_default),
    "linear": _Type(_linear, ("factor",)),
    "dynamic": _Type(_dynamic, ("factor",)),
    "llama3": _Type(_llama3, ("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": _Type(_yarn, ("factor",), ("original_max_position_embeddings", *_YARN_OPTIONS)),
    "longrope": _Type(
        _longrope,
        ("short_factor", "long_factor"),
        ("original_max_position_embeddings", "factor", "attention_factor"),
        _completed_longrope,
    ),
}
