"""What a method is: a few pure functions over canonical shapes, and the module they act on.

A method sees one module at a time, without its stack axes, in canonical shapes:

    linear        x (..., in)            W (in, out)
    convolution   x (..., *space, in)    W (in, *window, out)
    embedding     x (...) of ids         W (in = vocabulary, out)

Everything else is the engine's: layouts, stacked layers, casts, control flow, sharding, merging, files.
There are three ways to write one, from the least code to the most freedom:

    low_rank   factors(p, site) -> (a, b)      the change of W is a b: a (rank, in, *window), b (rank, out)
    additive   delta(p, site) -> array of W's shape
    general    forward(p, x, base, site, context) -> y  and  merge(p, w, b, site) -> (w, b)

`p` holds the arrays that `init` returned, and `p["scaling"]`. `context` holds "config", what the method asks for of
each row of the batch (`row_inputs`), and in training, if it asks for it, "rng": a key for this one use of the module.
A method of the first kind never has its change of W built; the engine multiplies with the factors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._config import FrozenMapping, PeftConfig, PeftType
from ._paths import fold_in_name as fold_in_name

Arrays = Mapping[str, jax.Array]

LINEAR, EMBEDDING, CONVOLUTION = "linear", "embedding", "convolution"

STACK, INPUT, VOCABULARY, WINDOW, OUTPUT = "b", "i", "v", ".", "o"


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted module: static facts about its weight.

    path: module path. leaf, bias: paths of the weight and (if any) the bias in the base tree.
    layout: one letter an axis of the leaf: i input, v vocabulary (the rows of a lookup table), o output,
    '.' window of a convolution, b stack (layers, experts, fused parts). shape, dtype: the leaf's.
    """

    path: str
    leaf: str
    bias: str | None
    layout: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str:
        if VOCABULARY in self.layout:
            return EMBEDDING
        return CONVOLUTION if WINDOW in self.layout else LINEAR

    @property
    def stack(self) -> tuple[int, ...]:
        return self._sizes(STACK)

    @property
    def window(self) -> tuple[int, ...]:
        return self._sizes(WINDOW)

    @property
    def in_features(self) -> int:
        return math.prod(self._sizes(INPUT + VOCABULARY))

    @property
    def out_features(self) -> int:
        return math.prod(self._sizes(OUTPUT))

    def _sizes(self, letters: str) -> tuple[int, ...]:
        return tuple(size for letter, size in zip(self.layout, self.shape, strict=True) if letter in letters)


@dataclasses.dataclass(frozen=True)
class Base:
    """The product that a method changes, as a function: `base(x)` is x W, whatever W is made of.

    `base.apply(x, kernel)` is the same operation (product, convolution, lookup) with another canonical kernel
    `(in, *window, features)`. `base.project(a)` contracts rows `a (rank, in, *window)` with the base weight itself,
    whatever other adapters act on it: `(rank, out)`, float32 or wider. `base.weight()` is that weight, canonical.
    `base.alone`: whether no other adapter has acted on what `base(x)` gives.
    """

    call: Callable[[jax.Array], jax.Array]
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    project: Callable[[jax.Array], jax.Array]
    weight: Callable[[], jax.Array]
    alone: bool = True

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.call(x)


Init = Callable[[jax.Array, Site, Any, Callable[[], jax.Array]], dict[str, jax.Array]]
Together = Callable[
    [jax.Array, Mapping[str, Site], Any, Mapping[str, Callable[[], jax.Array]]],
    tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]],
]
Uses = Callable[[Mapping[str, Site], Any], Mapping[str, Mapping[str, str]]]
Derive = Callable[[Arrays, Site, Any, Callable[[], jax.Array]], dict[str, jax.Array]]
Factors = Callable[[Arrays, Site], tuple[jax.Array, jax.Array]]
Forward = Callable[[Arrays, jax.Array, Base, Site, Mapping[str, Any]], jax.Array]
Merge = Callable[[Arrays, jax.Array, jax.Array | None, Site], tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class RowInput:
    """What a call brings a method for each row of its batch, besides x.

    read(value) -> array (rows, ...), from what `with_context` was given; raises ValueError for what is no such array.
    plain: the entry of a row with which the method is the plain one of its config class; None if there is none.
    check(array, config): raises ValueError for entries that an adapter of this config has no use for, if they are known
    """

    read: Callable[[Any], jax.Array]
    plain: Any = None
    check: Callable[[jax.Array, Any], None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method as a value: its config class, its initial arrays, and its mathematics.

    init(key, site, config, weight) -> {name: array}; weight() is the canonical W, built on demand.
    Its arrays' shapes may depend on the number of the site's layer by a pattern of the config (`..._pattern`) alone.
    scaling(site, config) -> float. dropout(config) -> rate in [0, 1).
    frozen: names of arrays that do not train. derived: names of arrays that do not train either and follow from the
    weight that is adapted: files do not hold them, `derive`, or without one `init`, whatever its key is, makes them
    anew. unsaved(config): names of other arrays that files of this config do not hold, as they follow from the config
    alone. precious: names of derived or unsaved arrays that another machine may make otherwise: they are
    kept in a file of our own beside PEFT's. A name stands for those that begin with it and a dot, too.
    kinds: the kinds of module that it can act on.
    together(key, sites, config, weights) -> (shared, {path: {name: array}}), instead of `init`, for a method whose
    modules depend on one another: sites and weights by path, single modules in PyTorch's order; `shared` holds arrays
    that many modules use. uses(sites, config) -> {path: {name in p: name in shared}}; None: all, by their own names.
    ordered(config): whether files of this config name or leave out arrays by the places of the modules in that order.
    derive(p, site, config, weight) -> {name: array}: the derived arrays, of all the others.
    drops_lookups: whether dropout acts on what is looked up of the first factor of a table, which has no input to drop.
    changes_bias: whether merge returns another bias. reads_bias: whether the weight() of `init` is to give a pair, the
    weight and the bias (out,), or None where there is none. needs_base: whether merge is to get the base weight itself
    as `p["base"]`, beside `w`, into which other adapters may have been merged; needs_config: whether it is to get the
    config as `p["config"]`, for what the arrays' shapes do not tell.
    noisy(config): whether training needs a key besides that for dropout.
    ranked: what a key of the config's rank_pattern has after the path of a module.
    by_path: whether the shapes that init gives depend on more of the module's path than the patterns of the config.
    linear: whether forward is linear in x; where it is not, products with the transposed weight are refused.
    Where a model uses a table as its output layer, too: ties(config): whether the factors of the table act there;
    tied(p, x, y, site), without them: what y = x Wᵀ becomes; None: what it is.
    searched: fields of the config, patterns, whose keys may be found anywhere in a path (`_patterns.search_value`).
    row_inputs: {name: RowInput} that a call has to bring; a `forward` without factors finds the arrays in `context`.
    axes: {array: letters} of its axes, inputs (i), outputs (o), others (.), where `init` makes none to see them by.
    in_full: whether copies of the targeted modules train in their place; rows(config): which rows of the targeted
    tables do. A method with one of the two adapts no module: it is made by `without_sites`.
    begin(key, tree, config) -> `_begin.Beginning`: for a method whose places no target_modules tell, instead of `init`;
    tree: `_begin.Tree`. merge refuses, as `not_merged` does.
    prompt(p, config, context) -> (n, dim) or (rows, n, dim): what the ids that follow the vocabulary are looked up in.
    in_decoder: whether of an encoder-decoder's two prompts the second comes before the decoder's input.
    labels(config) -> (tokens, types): of a prompt that is a text itself, whose tokens are learned, too, where their
    type is a multiple of four above zero.
    prefix(p, config) -> (n, layers, 2, kv_heads, head_dim): keys and values that come before a text's own.
    folded(p, config) -> {name: array}: what files hold in place of arrays that an encoder makes it of; the arrays
    themselves are kept in a file of our own beside PEFT's. An adapter that does not train may have these alone.
    unfolded(p, config) -> {name: array}: arrays that fold to these, to train on where that file is absent; None: there
    is no way back.
    """

    config: type[PeftConfig]
    init: Init | None = None
    merge: Merge
    forward: Forward
    factors: Factors | None = None
    scaling: Callable[[Site, Any], float] = lambda site, config: 1.0
    dropout: Callable[[Any], float] = lambda config: 0.0
    kinds: frozenset[str] = frozenset({LINEAR})
    frozen: frozenset[str] = frozenset()
    derived: frozenset[str] = frozenset()
    unsaved: Callable[[Any], frozenset[str]] = lambda config: frozenset()
    precious: frozenset[str] = frozenset()
    together: Together | None = None
    uses: Uses | None = None
    ordered: Callable[[Any], bool] = lambda config: False
    derive: Derive | None = None
    drops_lookups: bool = False
    changes_bias: bool = False
    reads_bias: bool = False
    needs_base: bool = False
    needs_config: bool = False
    noisy: Callable[[Any], bool] = lambda config: False
    ranked: str = ""
    by_path: bool = False
    linear: bool = True
    ties: Callable[[Any], bool] = lambda config: False
    tied: Callable[[Arrays, jax.Array, jax.Array, Site], jax.Array] | None = None
    searched: frozenset[str] = frozenset()
    row_inputs: Mapping[str, RowInput] = FrozenMapping()
    axes: Mapping[str, str] = FrozenMapping()
    in_full: bool = False
    rows: Callable[[Any], tuple[int, ...]] | None = None
    begin: Callable[[jax.Array, Any, Any], Any] | None = None
    prompt: Callable[[Arrays, Any, Mapping[str, Any]], jax.Array] | None = None
    in_decoder: bool = False
    labels: Callable[[Any], tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    prefix: Callable[[Arrays, Any], jax.Array] | None = None
    folded: Callable[[Arrays, Any], dict[str, jax.Array]] | None = None
    unfolded: Callable[[Arrays, Any], dict[str, jax.Array]] | None = None

    @property
    def has_sites(self) -> bool:
        """Whether it adapts modules, and does not train parts of the base themselves."""
        return not self.in_full and self.rows is None

    @property
    def selects(self) -> bool:
        """Whether its modules are those that the config's target_modules name."""
        return self.has_sites and self.begin is None

    @property
    def fixed(self) -> frozenset[str]:
        """Names of all arrays that do not train."""
        return self.frozen | self.derived

    def trains(self, name: str) -> bool:
        """Whether the array of this name trains."""
        return not _among(name, self.fixed)

    def in_files(self, name: str, config: Any) -> bool:
        """Whether PEFT's files hold the array of this name."""
        return not _among(name, self.derived | self.unsaved(config))

    def is_kept_apart(self, name: str, config: Any) -> bool:
        """Whether the array of this name is kept in a file of our own beside PEFT's."""
        return _among(name, self.precious) and not self.in_files(name, config)


def _among(name: str, names: frozenset[str]) -> bool:
    return name in names or name.partition(".")[0] in names


def low_rank(*, factors: Factors, **fields: Any) -> Method:
    """A method whose change of the weight is a product of two thin factors."""

    def delta(p: Arrays, site: Site) -> jax.Array:
        a, b = factors(p, site)
        return jnp.tensordot(a, b, axes=(0, 0))

    method = additive(delta=delta, **fields)
    return dataclasses.replace(method, factors=factors)


def additive(*, delta: Callable[[Arrays, Site], jax.Array], forward: Forward | None = None, **fields: Any) -> Method:
    """A method that adds an array to the weight. forward: a way that does without the array, if there is one."""

    def with_array(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
        y = base(x)
        return y + base.apply(dropped(x, context), delta(p, site)).astype(y.dtype)

    def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
        change = delta(p, site)
        wide = wide_dtype(w.dtype)
        return (w.astype(wide) + change.astype(wide)).astype(w.dtype), b

    return Method(forward=forward or with_array, merge=merge, **fields)


def without_sites(**fields: Any) -> Method:
    """A method that trains a part of the base itself, which `in_full` or `rows` says; the engine puts it in place."""
    return Method(
        forward=lambda p, x, base, site, context: base(x),
        merge=lambda p, w, b, site: (w, b),
        kinds=frozenset(),
        **fields,
    )


def beside(*, what: str, **fields: Any) -> Method:
    """A method that changes no weight, and so has nothing to merge. what: what it brings, for the message."""

    def refused(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
        raise ValueError(not_merged(what, f" at {site.path!r}"))

    return Method(forward=lambda p, x, base, site, context: base(x), merge=refused, **{"kinds": frozenset(), **fields})


def not_merged(what: str, where: str = "") -> str:
    """Why an adapter cannot be merged, for an error."""
    return (
        f"{what}{where} is no change of a weight, so that no merged weight stands for it; expected it beside the base, "
        "or an adapter that merges, such as LoRA"
    )


def dropped(x: jax.Array, context: Mapping[str, Any]) -> jax.Array:
    """The input of `forward` with entries dropped at the method's rate and the rest scaled up; without a key itself."""
    rate = method_of(context["config"]).dropout(context["config"])
    if "rng" not in context or not rate:
        return x
    kept = jax.random.bernoulli(context["rng"], 1.0 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))


def project(a: jax.Array, w: jax.Array) -> jax.Array:
    """Rows (rank, in, *window) contracted with a canonical weight (in, *window, out): (rank, out), in w's precision."""
    wide = wide_dtype(w.dtype)
    return jnp.tensordot(a.astype(w.dtype), w, axes=w.ndim - 1, preferred_element_type=wide)


def wide_dtype(dtype: Any) -> Any:
    """The type that weights are merged in: float32, or the weight's own type if that is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def is_quantised(dtype: Any) -> bool:
    """Whether what has this dtype is no weight yet, but codes that become one when their scale is applied.

    >>> is_quantised(jnp.int8), is_quantised(jnp.float8_e4m3fn), is_quantised(jnp.bfloat16)
    (True, True, False)
    """
    return not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits <= 8


def wider(first: Any, second: Any) -> Any:
    """The narrowest dtype that holds both, under strict dtype promotion, too, where JAX will not say.

    >>> wider(jnp.bfloat16, jnp.float32)
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


_METHODS: dict[type[PeftConfig], list[tuple[Callable[[Any], bool], Method]]] = {}


def _always(config: PeftConfig) -> bool:
    return True


def register(method: Method, *, applies: Callable[[Any], bool] | None = None) -> Method:
    """Make a method known under its config class; `jpeft/methods` does this on import.

    applies: for a variant, the configs of its class that mean it, rather than the method that was registered first.
    """
    known = _METHODS.setdefault(method.config, [])
    if applies is None:
        known[:] = [*(entry for entry in known if entry[0] is not _always), (_always, method)]
    else:
        known.insert(0, (applies, method))
    return method


def method_of(config: PeftConfig) -> Method:
    """The method that a config belongs to; raises TypeError for a config of no known method."""
    found = next((method for applies, method in _METHODS.get(type(config), ()) if applies(config)), None)
    if found is None:
        known = ", ".join(sorted(cls.__name__ for cls in _METHODS))
        raise TypeError(f"{type(config).__name__} is not the config of a known method; expected one of: {known}")
    return found


def merged(
    method: Method, config: Any, p: Arrays, w: jax.Array, b: jax.Array | None, site: Site
) -> tuple[jax.Array, jax.Array | None]:
    """The weight and the bias that a method merges into these, with what it asks for besides its arrays."""
    asked = {"config": config} if method.needs_config else {}
    return method.merge({**p, **asked}, w, b, site)


def is_plain(method: Method) -> bool:
    """Whether a method is the one of its config class that means no variant of it."""
    return any(known is method and applies is _always for applies, known in _METHODS.get(method.config, ()))


def config_classes() -> dict[PeftType, type[PeftConfig]]:
    """The config classes of the methods that PEFT has, by PEFT's names for them."""
    kinds = {cls: cls.__dataclass_fields__["peft_type"].default for cls in _METHODS}
    return {kind: cls for cls, kind in kinds.items() if kind is not None}


def config_class(peft_type: PeftType) -> type[PeftConfig]:
    """The config class of a method by PEFT's name for it, for code that makes adapters of that method."""
    return config_classes()[peft_type]
