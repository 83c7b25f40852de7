"""Orthogonal wavelets: their filters, made rather than listed, and one level of a transform with them.

Daubechies, Ten Lectures on Wavelets (1992): dbN has N zeros at pi and its other zeros inside the unit circle (6.4);
symN of the same power spectrum those that make its phase most nearly linear (8.1.1); coifN has 2 N moments of the
wavelet and 2 N - 1 of the scaling function that vanish (8.2).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ._sparse import drawn_places

FAMILIES = (
    *(f"db{n}" for n in range(1, 11)),
    *(f"sym{n}" for n in range(2, 11)),
    *(f"coif{n}" for n in range(1, 4)),
)
"""Those that PEFT has, too. Its tables lack further names that its configs take, and those that it has of coif4 and
coif5 are no wavelets: their filters are not orthogonal to their own shifts, and do not sum to the root of 2."""

# Of the two filters of a symlet, each the other reversed, tables have the one that comes late but for these.
_EARLY_SYMLETS = (2, 3, 7)


@functools.lru_cache(maxsize=64)
def scaling_filter(family: str) -> np.ndarray:
    """The low-pass filter of a reconstruction, float64; its sum is the root of 2. Raises ValueError for other names.

    >>> scaling_filter("db2").round(4).tolist()
    [0.483, 0.8365, 0.2241, -0.1294]
    """
    if family not in FAMILIES:
        raise ValueError(
            f"wavelet_family is {family!r}; expected one of {', '.join(FAMILIES)}: PEFT has no filter of the others "
            "that it names, and filters that are no wavelets for coif4 and coif5"
        )
    name, number = family.rstrip("0123456789"), int(family.lstrip("abcdefghijklmnopqrstuvwxyz"))
    return {"db": _daubechies, "sym": _symlet, "coif": _coiflet}[name](number)


def _zeros(number: int) -> list[tuple[complex, ...]]:
    """Zeros inside the unit circle, with their conjugates, of which one half of a power spectrum is made."""
    found: list[tuple[complex, ...]] = []
    terms = [math.comb(number - 1 + k, k) for k in range(number)]
    for y in np.roots(terms[::-1]):
        middle = 1 - 2 * y
        zero = middle + np.sqrt(middle**2 - 1 + 0j)
        zero = zero if abs(zero) < 1 else 1 / zero
        if abs(y.imag) < 1e-12:
            found.append((zero.real,))
        elif y.imag > 0:
            found.append((zero, np.conj(zero)))
    return found


def _of_zeros(number: int, zeros: list[tuple[complex, ...]]) -> np.ndarray:
    taps = np.poly([*[-1.0] * number, *itertools.chain.from_iterable(zeros)]).real
    return taps * math.sqrt(2) / taps.sum()


def _daubechies(number: int) -> np.ndarray:
    return _of_zeros(number, _zeros(number))


def _symlet(number: int) -> np.ndarray:
    groups = _zeros(number)
    choices = itertools.product(*((group, tuple(1 / zero for zero in group)) for group in groups))
    taps = min((_of_zeros(number, list(choice)) for choice in choices), key=_bend)
    late = np.arange(2 * number) @ taps > (number - 0.5) * taps.sum()
    return taps[::-1].copy() if late == (number in _EARLY_SYMLETS) else taps


def _bend(taps: np.ndarray) -> float:
    """How far the phase is from a line, at most, where the filter lets pass."""
    at = np.linspace(0.01, 0.9 * np.pi, 200)
    phase = np.unwrap(np.angle(np.exp(-1j * np.outer(at, np.arange(len(taps)))) @ taps))
    return float(np.abs(phase - (phase @ at) / (at @ at) * at).max())


def _coiflet(number: int) -> np.ndarray:
    """Newton's method, from the interpolating filter of Deslauriers and Dubuc, which has as many moments."""
    size, at = 6 * number, np.arange(-2 * number, 4 * number)
    odd = np.arange(1 - 2 * number, 2 * number, 2)
    taps = np.where(at == 0, 1.0, 0.0)
    taps[odd + 2 * number] = [np.prod(-odd[odd != k] / (k - odd[odd != k])) for k in odd]
    taps *= math.sqrt(0.5)
    powers = (at / (3 * number)) ** np.arange(2 * number)[:, None]
    moments = np.concatenate([powers, powers * (-1.0) ** at])
    wanted = np.eye(len(moments))[0] * math.sqrt(2)
    for _ in range(10):
        shifts = [np.concatenate([taps[2 * k :], np.zeros(2 * k)]) for k in range(size // 2)]
        slopes = [s + np.concatenate([np.zeros(2 * k), taps[: size - 2 * k]]) for k, s in enumerate(shifts)]
        missing = np.concatenate([np.eye(size // 2)[0] - np.array(shifts) @ taps, wanted - moments @ taps])
        taps = taps + np.linalg.lstsq(np.concatenate([slopes, moments]), missing)[0]
    return taps


def coefficients(family: str, size: int) -> int:
    """How many coefficients one level takes for `size` values: even, enough for the ends."""
    return -(-(size + len(scaling_filter(family)) - 2) // 2) * 2


@functools.lru_cache(maxsize=64)
def _taps(family: str) -> np.ndarray:
    """(window, average or difference, which of two values): of tap 2 k + q, k from the last one."""
    low = scaling_filter(family)
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    return np.stack([low, high]).reshape(2, -1, 2)[:, ::-1].swapaxes(0, 1)


def synthesis(family: str, size: int, c: jax.Array) -> jax.Array:
    """Values (..., size) of coefficients (..., those of the averages, then as many of the differences)."""
    taps, bands = _taps(family).astype(c.dtype), jnp.split(c, 2, axis=-1)
    count = bands[0].shape[-1] - len(taps) + 1
    # Multiples rather than products with matrices of two rows, which take much longer.
    terms = [
        [band[..., k : k + count] * tap[n, q] for k, tap in enumerate(taps) for n, band in enumerate(bands)]
        for q in range(2)
    ]
    pairs = jnp.stack([functools.reduce(jnp.add, own) for own in terms], axis=-1)
    return pairs.reshape(*c.shape[:-1], 2 * count)[..., :size]


def analysis(family: str, values: jax.Array) -> jax.Array:
    """The transpose of the synthesis: coefficients (..., `coefficients`) of values (..., size)."""
    taps, others = _taps(family).astype(values.dtype), [(0, 0)] * (values.ndim - 1)
    values = jnp.pad(values, [*others, (0, values.shape[-1] % 2)])
    pairs, last = (values[..., 0::2], values[..., 1::2]), len(taps) - 1
    terms = [
        [jnp.pad(pairs[0] * tap[n, 0] + pairs[1] * tap[n, 1], [*others, (k, last - k)]) for k, tap in enumerate(taps)]
        for n in range(2)
    ]
    return jnp.concatenate([functools.reduce(jnp.add, own) for own in terms], axis=-1)


@functools.lru_cache(maxsize=64)
def coefficient_places(n_in: int, n_out: int, count: int, seed: int, family: str) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) of the coefficients that train: those drawn for the weight, in the middle of C."""
    inputs, outputs = drawn_places(n_in, n_out, count, seed)
    all_in, all_out = coefficients(family, n_in), coefficients(family, n_out)
    inputs, outputs = inputs + (all_in - n_in) // 2, outputs + (all_out - n_out) // 2
    swapped = (inputs >= all_in // 2) != (outputs >= all_out // 2)
    turned = (inputs + all_in // 2) % all_in, (outputs + all_out // 2) % all_out
    return np.where(swapped, turned[0], inputs), np.where(swapped, turned[1], outputs)
