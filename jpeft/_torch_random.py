"""PyTorch's random numbers on the CPU, in numpy: what files of PEFT leave out and rebuild from a seed.

PyTorch's generator is the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998), seeded with the low 32 bits of the
seed, and its distributions take the outputs one after the other:
uniform: the lowest 24 bits of an output, 53 of two for float64; bfloat16 and float16 are rounded from float32, as
PyTorch 2.13 does it (versions long before it took 8 and 11 bits for them, and gave other numbers).
normal: the Box-Muller transform; of 16 or more numbers in blocks of 16, of fewer in float64, two at a time.
randperm: the Fisher-Yates shuffle from the front, below 2³²/20 numbers; beyond that the inside-out one.
"""

import math
from typing import Any

import numpy as np

_CHUNK = 1 << 20
_LONG = (2**32 - 1) // 20
_BLOCK = 16


class Generator:
    """The numbers that `torch.Generator().manual_seed(seed)` gives, in the order in which they are drawn.

    seed: an integer of 64 bits, of which PyTorch uses the low 32.

    >>> generator = Generator(0)
    >>> first = generator.uniform((3,), 0.0, 1.0)
    >>> [round(float(value), 4) for value in first]  # torch.rand(3, generator=...)
    [0.4963, 0.7682, 0.0885]
    >>> [round(float(value), 4) for value in generator.uniform((2,), -1.0, 1.0)]
    [-0.7359, -0.3852]
    """

    def __init__(self, seed: int):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed} does not fit in 64 bits; expected -2**63 <= seed < 2**64")
        self._bits = np.random.MT19937()
        # numpy seeds this class in another way; RandomState does it as PyTorch.
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state
        self._spare: float | None = None
        self._owed = 0

    def _outputs(self, count: int) -> np.ndarray:
        """The next `count` outputs of 32 bits, as uint64."""
        for start in range(0, self._owed, _CHUNK):
            self._bits.random_raw(min(_CHUNK, self._owed - start), output=False)
        self._owed = 0
        return np.asarray(self._bits.random_raw(count), np.uint64)

    def _outputs64(self, count: int) -> np.ndarray:
        pairs = self._outputs(2 * count).reshape(count, 2)
        return (pairs[:, 0] << np.uint64(32)) | pairs[:, 1]

    def _unit(self, count: int, dtype: Any) -> np.ndarray:
        """Numbers in [0, 1), of dtype float64, or else of float32."""
        if dtype == np.float64:
            return (self._outputs64(count) & np.uint64(2**53 - 1)) * 2.0**-53
        return (self._outputs(count) & np.uint64(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)

    def uniform(self, shape: tuple[int, ...], low: float, high: float, dtype: Any = np.float32) -> np.ndarray:
        """`torch.empty(shape, dtype=dtype).uniform_(low, high)`; dtype: float64, float32, bfloat16 or float16.

        Exact but for float64, to 1 ulp; and to 1 ulp of `high - low` where PyTorch runs on a CPU without fused
        multiplication and addition.
        """
        dtype = np.dtype(dtype)
        unit = self._unit(math.prod(shape), dtype)
        start, end = (np.asarray(bound, unit.dtype) for bound in (low, high))
        # In float64, so that float32 is rounded once, as by a fused multiplication and addition.
        values = (unit.astype(np.float64) * np.float64(end - start) + np.float64(start)).astype(unit.dtype)
        rounded = values.astype(dtype)
        return np.where(rounded == end.astype(dtype), start.astype(dtype), rounded).reshape(shape)

    def normal(self, shape: tuple[int, ...], mean: float, std: float, dtype: Any = np.float32) -> np.ndarray:
        """`torch.empty(shape, dtype=dtype).normal_(mean, std)`; to 2 ulp. dtype: float64 or float32."""
        dtype = np.dtype(dtype)
        if dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype={dtype.name} of normal numbers; expected float32 or float64")
        count = math.prod(shape)
        if count < _BLOCK:
            return np.array([self._one() * std + mean for _ in range(count)], dtype).reshape(shape)
        unit = self._unit(count, dtype)
        whole = count - count % _BLOCK
        values = np.empty(count, np.float64)
        values[:whole] = _box_muller(unit[:whole])
        if count % _BLOCK:
            values[-_BLOCK:] = _box_muller(self._unit(_BLOCK, dtype))
        return (values * std + mean).astype(dtype).reshape(shape)

    def _one(self) -> float:
        """One normal number; every second one was made with the one before it, whatever else was drawn in between."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        first, second = (float(u) for u in self._unit(2, np.dtype(np.float64)))
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def kaiming_uniform(self, shape: tuple[int, ...], slope: float = 0.0, dtype: Any = np.float32) -> np.ndarray:
        """`torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=slope)`; shape (out, in, *window)."""
        fan = math.prod(shape[1:])
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1.0 + slope**2)) / math.sqrt(fan))
        return self.uniform(shape, -bound, bound, dtype)

    def randperm(self, n: int, count: int | None = None) -> np.ndarray:
        """`torch.randperm(n)[:count]` as int64, in memory of `count` numbers rather than `n`; exact."""
        count = n if count is None else count
        if not 0 <= count <= n:
            raise ValueError(f"count={count} numbers of a permutation of n={n}; expected 0 <= count <= n")
        return self._inside_out(n, count) if n >= _LONG else self._forward(n, count)

    def _forward(self, n: int, count: int) -> np.ndarray:
        swaps = min(count, max(n - 1, 0))
        at = np.arange(swaps, dtype=np.int64)
        chosen = at + (self._outputs(swaps) % (n - at).astype(np.uint64)).astype(np.int64)
        moved: dict[int, int] = {}
        found: list[int] = []
        for i, j in enumerate(chosen.tolist()):
            found.append(moved[j] if j in moved else j)
            moved[j] = moved.pop(i, i)
        if count > swaps:
            found.append(moved[swaps] if swaps in moved else swaps)
        # What the rest of the permutation takes is passed over when something else is drawn, if it ever is.
        self._owed += max(n - 1, 0) - swaps
        return np.asarray(found, np.int64)

    def _inside_out(self, n: int, count: int) -> np.ndarray:
        found = np.empty(count, np.int64)
        for start in range(0, n, _CHUNK):
            at = np.arange(start, min(start + _CHUNK, n), dtype=np.uint64)
            chosen = self._outputs64(len(at)) % (at + np.uint64(1))
            for i, j in zip(at[chosen < count].tolist(), chosen[chosen < count].tolist(), strict=True):
                if i < count:
                    found[i] = found[j]
                found[j] = i
        return found


def _box_muller(unit: np.ndarray) -> np.ndarray:
    """Normal numbers from as many uniform ones, in blocks of 16: the first 8 make radii, the others angles."""
    blocks = unit.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
    angle = blocks[:, 1] * blocks.dtype.type(2 * math.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def randperm(n: int, seed: int, count: int | None = None) -> np.ndarray:
    """`torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]` as int64; memory of `count` numbers.

    n: how many numbers there are, >= 0. count: how many of them are wanted, at most n; None: all.
    Raises ValueError for a count that is not in 0 ... n, and for a seed of more than 64 bits.

    >>> randperm(10, 0).tolist()
    [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    >>> randperm(10**8, 777, 3).tolist() == randperm(10**8, 777, 5).tolist()[:3]
    True
    """
    return Generator(seed).randperm(n, count)
