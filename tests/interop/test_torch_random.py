"""The random numbers of PyTorch's CPU generator, made here and by PyTorch."""

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jpeft._torch_random import Generator, randperm  # noqa: E402

SEEDS = (0, 1, 777, 2**31 + 5, 2**40 + 3, -7)
DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FRONT = [11440646, 199500216, 10121607, 3119241]
SHAPES = ((5,), (3,), (16,), (3, 7), (0,), (2,), (33, 1, 11), (7,))


def seeded(seed):
    return torch.Generator().manual_seed(seed), Generator(seed)


def numpy(tensor):
    return tensor.double().numpy()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", (0, 1, 2, 5, 1000, 70_000))
def test_randperm(n, seed):
    theirs = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    ours = randperm(n, seed)
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, theirs)
    for count in {0, n // 3, max(n - 1, 0)}:
        np.testing.assert_array_equal(randperm(n, seed, count), theirs[:count])


def test_the_beginning_of_a_permutation_needs_no_whole_one():
    # What torch.randperm(214748363), the longest that is shuffled from the front, begins with.
    assert randperm(214_748_363, 777, 4).tolist() == FRONT


def test_a_long_permutation_is_shuffled_inside_out(monkeypatch):
    # torch.randperm does so from 214748364 on, where it takes half a minute; the form itself does not depend on n.
    monkeypatch.setattr("jpeft._torch_random._LONG", 0)
    monkeypatch.setattr("jpeft._torch_random._CHUNK", 7)
    outputs = np.random.RandomState(5).randint(0, 2**32, size=(40, 2), dtype=np.uint64).tolist()
    whole: list[int] = []
    for i, (high, low) in enumerate(outputs):
        j = (high * 2**32 + low) % (i + 1)
        whole.append(whole[j] if j < i else i)
        whole[j] = i
    assert sorted(whole) == list(range(40))
    for count in (0, 1, 11, 40):
        assert randperm(40, 5, count).tolist() == whole[:count]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bounds", ((0.0, 1.0), (-0.258, 0.258), (1.0, 1.5)), ids=str)
def test_uniform(name, bounds):
    theirs, ours = seeded(3)
    for shape in (*SHAPES, (5000,)):
        expected = numpy(torch.empty(shape, dtype=getattr(torch, name)).uniform_(*bounds, generator=theirs))
        found = ours.uniform(shape, *bounds, DTYPES[name])
        assert (found.dtype, found.shape) == (np.dtype(DTYPES[name]), shape)
        # To one unit of the last place; a sum near zero has that of the bounds, if the CPU does not fuse.
        unit = float(ml_dtypes.finfo(DTYPES[name]).eps)
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=unit, atol=abs(bounds[0]) * 2**-23)


@pytest.mark.parametrize("name", ("float32", "float64"))
def test_normal_in_blocks_and_in_pairs(name):
    theirs, ours = seeded(3)
    for shape in (*SHAPES, (5003,)):
        expected = numpy(torch.empty(shape, dtype=getattr(torch, name)).normal_(0.2, 0.7, generator=theirs))
        found = ours.normal(shape, 0.2, 0.7, DTYPES[name])
        assert (found.dtype, found.shape) == (np.dtype(DTYPES[name]), shape)
        unit = float(np.finfo(DTYPES[name]).eps)
        np.testing.assert_allclose(found, expected, rtol=2 * unit, atol=2 * unit)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("slope", (0.0, 5**0.5))
def test_kaiming_uniform(name, slope):
    theirs, ours = seeded(11)
    for shape in ((4, 7), (5, 1, 3), (2, 3, 2, 2)):
        empty = torch.empty(shape, dtype=getattr(torch, name))
        expected = numpy(torch.nn.init.kaiming_uniform_(empty, a=slope, generator=theirs))
        np.testing.assert_allclose(ours.kaiming_uniform(shape, slope, DTYPES[name]).astype(float), expected, rtol=1e-6)


def test_draws_of_all_kinds_follow_one_another():
    theirs, ours = seeded(9)
    for _ in range(2):
        np.testing.assert_array_equal(ours.randperm(50, 3), torch.randperm(50, generator=theirs).numpy()[:3])
        # An odd number of normal ones leaves one over for the next time.
        np.testing.assert_allclose(ours.normal((3,), 0, 1), torch.randn(3, generator=theirs).numpy(), rtol=2.4e-7)
        np.testing.assert_allclose(ours.uniform((4,), 0, 1), torch.rand(4, generator=theirs).numpy(), rtol=2.4e-7)
        np.testing.assert_allclose(ours.normal((2, 9), 0, 1), torch.randn(2, 9, generator=theirs).numpy(), rtol=1e-6)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"seed=18446744073709551616 does not fit in 64 bits"):
        Generator(2**64)
    with pytest.raises(ValueError, match=r"count=6 numbers of a permutation of n=5; expected 0 <= count <= n"):
        randperm(5, 0, 6)
    with pytest.raises(ValueError, match="dtype=float16 of normal numbers; expected float32 or float64"):
        Generator(0).normal((3,), 0, 1, np.float16)
