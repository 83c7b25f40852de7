"""What the tables of cases are made of, and the comparison of a lifted function with the merged weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft._contract import CONVOLUTION, EMBEDDING, method_of
from jpeft._lift import _products
from jpeft._paths import leaves_by_path
from jpeft._wrap import completed

TOLERANCE = 1e-10

# What is compiled here runs once, on arrays of a few numbers.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function of a parameter tree with everything needed to call it; layouts None means: infer them."""

    function: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    layouts: Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a use of weights, and how `explain` calls it.

    build: makes the problem; it runs where float64 is on. how: with a method that has factors. general: with one that
    has none. forward_only: JAX itself cannot differentiate the function backwards. no_gradient: the function stops the
    gradient of its weights. core: every method runs it, not only those that run all rows.
    """

    name: str
    build: Callable[[], Problem]
    how: tuple[str, ...] = ("low-rank",)
    general: tuple[str, ...] = ("transformed",)
    forward_only: bool = False
    no_gradient: bool = False
    core: bool = False


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One method: its config class, the options that are tested, and what sets it apart.

    file: its file in jpeft/methods, or None for a toy of the tests. factors: whether it is a product of thin factors.
    thorough: whether it runs every row, on behalf of methods written in the same way. linear: whether it adapts linear
    layers alone. neutral: whether a fresh adapter changes nothing; exact: whether merged it does so to the last bit
    (what cancels is otherwise not rounded alike). dormant: arrays that train only with
    a key. biased: whether only layers with a bias can be merged. mergeable: whether any can; if not, what is
    compared with merged weights is left to tests of its own. collective: whether what
    a module begins with depends on which others there are. context: what `with_context` has to bring for two rows.
    misfits: cases whose layers have sizes that the method refuses with these options. apart: {case: what `explain`
    says of it instead}. flat: {case: arrays without an influence on its outputs}. reads: whether a fresh adapter
    depends on the values of the weight.
    """

    name: str
    file: str | None
    config: Callable[..., Any]
    options: Mapping[str, Any]
    factors: bool = False
    thorough: bool = False
    linear: bool = False
    neutral: bool = True
    exact: bool = True
    dormant: frozenset[str] = frozenset()
    biased: bool = False
    misfits: frozenset[str] = frozenset()
    apart: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flat: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    mergeable: bool = True
    collective: bool = False
    reads: bool = False
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def runs(self, case: Case) -> bool:
        kinds = method_of(self.config(**self.options)).kinds
        named = {"lookup": EMBEDDING, "convolution": CONVOLUTION}
        left_out = [name for name, kind in named.items() if kind not in kinds]
        able = case.name not in {*left_out, *self.misfits} and (case.name == "with bias" or not self.biased)
        return self.mergeable and able and (self.thorough or case.core)

    def expected(self, case: Case) -> set[str]:
        if case.name in self.apart:
            return {self.apart[case.name]}
        return set(case.how if self.factors else case.general)


def random_like(tree: Any, seed: int, scale: float = 0.3) -> Any:
    """Random arrays in place of floating-point ones (or of their shapes), float64 where that is on."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_shape)
    return jax.tree.unflatten(structure, [_random(leaf, seed + index, scale) for index, leaf in enumerate(leaves)])


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf)


def _random(leaf: Any, seed: int, scale: float) -> Any:
    shape = leaf if _is_shape(leaf) else leaf.shape
    if not _is_shape(leaf) and not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype=jnp.result_type(float))


def adapted(problem: Problem, row: MethodRow, **options: Any) -> jpeft.PeftParams:
    """The problem's parameters with every module adapted, and random weights in the adapter."""
    layouts = problem.layouts
    if layouts is None:
        layouts = jpeft.infer_layouts(problem.function, problem.params, *problem.args)
    config = row.config(**{"target_modules": ".*", **row.options, **options})
    # Made of shapes alone and then filled: initial values are not what is tested, and they take long to compile.
    shapes = jax.eval_shape(lambda params: params, problem.params)
    wrapped = jpeft.wrap(shapes, config, layouts=layouts, dtype=jnp.result_type(float))
    adapters = random_like(wrapped.adapters, 100)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapters)):
        # Integers are places, for which no random numbers stand.
        begun = jpeft.wrap(problem.params, config, layouts=layouts).adapters
        adapters = jax.tree.map(lambda a, b: b if isinstance(a, jax.ShapeDtypeStruct) else a, adapters, begun)
    return with_derived(dataclasses.replace(wrapped, base=problem.params, adapters=adapters))


def with_derived(wrapped: jpeft.PeftParams) -> jpeft.PeftParams:
    """The same parameters with arrays that follow from the base as they should be, not random."""
    leaves = leaves_by_path(wrapped.base)
    return dataclasses.replace(
        wrapped, adapters={name: _with_derived(adapter, leaves) for name, adapter in wrapped.adapters.items()}
    )


def _with_derived(adapter: jpeft.Adapter, leaves: Mapping[str, Any]) -> jpeft.Adapter:
    method, config = method_of(adapter.config), adapter.config
    held = {
        path: {name: array for name, array in arrays.items() if method.in_files(name, config)}
        for path, arrays in adapter.weights.items()
    }
    shared = {name: array for name, array in adapter.shared.items() if method.in_files(name, config)}
    bare = dataclasses.replace(adapter, weights=held, shared=shared)
    return completed(bare, adapter, leaves, jnp.result_type(float))


def on_merged(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a lifted function has to equal."""
    return lambda wrapped, *args, **kwargs: function(jpeft.merge(wrapped), *args, **kwargs)


def results(function: Callable[..., Any], wrapped: jpeft.PeftParams, args: tuple[Any, ...], forward_only=False) -> Any:
    """(outputs, derivative by every trainable leaf, derivative by every floating-point argument)."""
    trainable, frozen = jpeft.partition(wrapped)
    total = jnp.zeros(())
    floating = [index for index, arg in enumerate(args) if jnp.issubdtype(arg.dtype, jnp.floating)]

    def scalar(trainable: Any, own: list[Any]) -> tuple[Any, Any]:
        given = list(args)
        for index, arg in zip(floating, own, strict=True):
            given[index] = arg
        outputs = function(jpeft.combine(trainable, frozen), *given)
        parts = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sin(part).sum().astype(total.dtype) for part in parts), total), outputs

    primals = (trainable, [args[index] for index in floating])
    if forward_only:
        tangents = random_like(primals, 900)
        _, derivative, outputs = jax.jvp(scalar, primals, tangents, has_aux=True)
        return outputs, derivative, []
    (_, outputs), (by_weights, by_args) = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(*primals)
    return outputs, by_weights, by_args


def all_results(
    monkeypatch: Any, problem: Problem, wrapped: Any, platforms: tuple[str, ...] = ("cpu",), forward_only: bool = False
) -> list[Any]:
    """The results of the lifted function on each platform, and those on the merged tree; in one compilation."""
    function = problem.function

    def compute(wrapped: Any, args: Any) -> list[Any]:
        found = []
        for platform in platforms:
            with monkeypatch.context() as patch:
                patch.setattr(_products, "on_one_cpu", lambda *arrays, platform=platform: platform == "cpu")
                found.append(results(jpeft.lift(function), wrapped, args, forward_only))
        return [*found, results(on_merged(function), wrapped, args, forward_only)]

    return jax.jit(compute, compiler_options=QUICKLY)(wrapped, problem.args)


def assert_close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    """Equal structures, dtypes and shapes, and equal values up to rounding."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if not jnp.issubdtype(ours.dtype, jax.dtypes.extended):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def smallest_gradient(by_weights: Any, dormant: frozenset[str] = frozenset()) -> float:
    """The largest entry of the leaf whose gradient is smallest: zero if one has none. dormant: names to pass over."""
    leaves = jax.tree.leaves_with_path(by_weights)
    return min(float(jnp.abs(leaf).max()) for path, leaf in leaves if getattr(path[-1], "key", None) not in dormant)
