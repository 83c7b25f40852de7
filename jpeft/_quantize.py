"""`quantize`: leaves of a tree replaced by codes and scales, one after the other; `dequantize` undoes it."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from ._contract import INPUT, LINEAR, OUTPUT, STACK, VOCABULARY, WINDOW, is_quantised
from ._formats import FORMATS, Format, Plan, divisors, double_plan, encoded, imported_qwix, plan_of
from ._params import is_peft_params
from ._partitions import placed_along
from ._paths import WEIGHT_NAMES, last_name, leaves_by_path, map_leaves, parent
from ._patterns import matches
from ._quantized import Quantized, as_dense, gathered_over, is_abstract, is_quantized
from ._sites import Candidate, candidates
from ._stacks import restacked, unstacked
from ._targets import EXPERTS, OUTPUT_EMBEDDINGS, SEQ_CLS_HEADS

HEADS = frozenset(
    {*OUTPUT_EMBEDDINGS, *SEQ_CLS_HEADS, "qa_outputs", "cls", "classification_head", "head", "proj_out", "logits"}
)
"""Names of modules whose weights give a model's outputs; what is in them stays as it is, too."""

Names = str | Sequence[str]


def quantize(
    params: Any,
    format: str,
    *,
    block: int | str | None = None,
    double: bool | None = None,
    include: Names | None = None,
    exclude: Names = (),
    layouts: Mapping[str, str] | None = None,
    gather: Collection[str] = (),
    donate: bool = False,
) -> Any:
    """The same tree with weights quantised, `Quantized` in the place of each: frozen, for adapters to act on.

    params: a tree of arrays or of `jax.ShapeDtypeStruct`s, or `PeftParams`, whose base is quantised and whose adapters
    stay. format: "int8", "int4", "nf4" (QLoRA's) or "fp8" (e4m3). block: how many numbers along the input share a
    scale, or "channel" for all that go into one output; by default a channel in 8 bits, in 4 bits the divisor of the
    input's size nearest to 64. double: whether the scales become 8-bit numbers in turn, in blocks of 256 with their
    mean as an offset; by default those of "nf4". include: modules to quantise, as `target_modules` names them, instead
    of all linear layers and experts without output heads and routers; embeddings, convolutions, norms and biases stay.
    exclude: modules to leave out. layouts: as for `wrap`. donate: free each array once it is quantised, so that at its
    peak the tree is there once; `params` is of no use then. Without it, the tree and its quantised copy stay together.
    gather: mesh axes over which rows of the batch are split as well as weights (FSDP): there devices then exchange
    codes, where they would have to exchange the weights made of them; for leaves on a mesh, with `Auto` axes.
    Sharded leaves stay sharded. A linear layer is x W, (*stack, in, out), and its codes and scales have these axes.
    Raises ImportError without qwix, and ValueError for unknown formats and layouts, for a block that does not divide an
    input, for mesh axes that are not there, for leaves that are no floating-point numbers of 16 bits or more, or if no
    module is selected.
    QLoRA: https://arxiv.org/abs/2305.14314.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 8)), "bias": jnp.ones(8)}}
    >>> small = quantize(params, "int8")
    >>> small["dense"]["kernel"].array.qvalue.dtype, small["dense"]["bias"].dtype
    (dtype('int8'), dtype('float32'))
    >>> float(abs(dequantize(small)["dense"]["kernel"] - params["dense"]["kernel"]).max()) < 0.02
    True
    """
    if is_peft_params(params):
        known = {site.leaf: site.layout for adapter in params.adapters.values() for site in adapter.sites.values()}
        layouts = {**known, **(layouts or {})}
        options = {"block": block, "double": double, "include": include, "exclude": exclude, "gather": gather}
        options["donate"] = donate
        return dataclasses.replace(params, base=quantize(params.base, format, layouts=layouts, **options))
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of: {', '.join(FORMATS)}")
    _check_block(block)
    imported_qwix()
    leaves = leaves_by_path(params)
    selected = _selected(leaves, include, exclude, layouts)
    _check_gather(gather, {path: leaves[path] for path in selected})
    own = FORMATS[format]
    plans = {path: _plan(path, leaves[path], layout, own, block, double) for path, layout in selected.items()}
    quantised = {path: gathered_over(quantised_by(leaves[path], plan, donate), gather) for path, plan in plans.items()}
    return map_leaves(lambda path, leaf: quantised.get(path, leaf), params)


def dequantize(tree: Any) -> Any:
    """The same tree with the dense weight in the place of each quantised one; of `PeftParams`, the base's.

    >>> import jax, jpeft
    >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 8))}}
    >>> dequantize(jpeft.quantize(params, "nf4"))["dense"]["kernel"].shape
    (128, 8)
    """
    if is_peft_params(tree):
        return dataclasses.replace(tree, base=dequantize(tree.base))
    return map_leaves(lambda path, leaf: _dequantised(leaf), tree)


def requantised(path: str, leaf: Quantized, weight: Any) -> Quantized:
    """Another weight in the format of a leaf; raises ValueError for a leaf with zero points, which are not chosen."""
    if leaf.array.zero_point is not None:
        raise ValueError(
            f"{path!r} is quantised with zero points, in which jpeft does not quantise; expected requantize=False, and "
            "jpeft.quantize(merged, ...) for another format"
        )
    if is_abstract(leaf):
        return leaf
    return dataclasses.replace(quantised_by(weight, plan_of(leaf), False), gather=leaf.gather)


def _dequantised(leaf: Any) -> Any:
    if not is_quantized(leaf) or is_abstract(leaf) or isinstance(leaf.array.qvalue, Tracer):
        return as_dense(leaf)
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.are_all_axes_explicit:
        return as_dense(leaf)
    return jax.jit(as_dense, out_shardings=sharding)(leaf)


def _check_block(block: Any) -> None:
    if block in (None, "channel") or (isinstance(block, int) and not isinstance(block, bool) and block > 0):
        return
    raise ValueError(f"block is {block!r}; expected a number of 1 or more, 'channel', or None for the format's own")


def _check_gather(gather: Collection[str], leaves: Mapping[str, Any]) -> None:
    for path, leaf in leaves.items():
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        known = sharding.mesh.axis_names if isinstance(sharding, NamedSharding) else gather
        if not set(gather) <= set(known):
            raise ValueError(
                f"gather is {gather!r}, but {path!r} is on a mesh of the axes {known}; expected some of them"
            )


def _selected(
    leaves: Mapping[str, Any], include: Names | None, exclude: Names, layouts: Mapping[str, str] | None
) -> dict[str, str]:
    """{leaf path: layout} of what is quantised."""
    layers = unstacked(leaves)
    found = candidates(layers, layouts)
    routers = _routers(found)
    chosen: dict[str, str] = {}
    for path, candidate in found.items():
        kept = path in routers or not _is_linear(path, candidate) or not _is_wide(leaves, layers, candidate.leaf)
        if matches(path, exclude) or (kept if include is None else not matches(path, include)):
            continue
        _check_leaf(leaves, layers, candidate)
        chosen[candidate.leaf] = candidate.site().layout
    if not chosen:
        said = "" if include is None else f"include={include!r}, "
        raise ValueError(
            f"no module is selected to be quantised: {said}exclude={exclude!r}; the tree's modules are, for example: "
            f"{', '.join(list(found)[:8]) or 'none with a weight'}"
        )
    together = restacked(chosen, layers, "include and exclude select")
    return {path: own[0] if path in chosen else STACK + own[0] for path, own in together.items()}


def _is_linear(path: str, candidate: Candidate) -> bool:
    if HEADS & set(path.split(".")):
        return False
    # Of a kernel whose layout is unknown the error tells, rather than its size in memory.
    return candidate.kind == LINEAR or (candidate.kind is None and last_name(candidate.leaf) in WEIGHT_NAMES)


def _routers(found: Mapping[str, Candidate]) -> set[str]:
    """The layers beside stacked experts that choose among them."""
    stacks = [candidate for candidate in found.values() if EXPERTS in parent(candidate.leaf).split(".")]
    counts = {candidate.leaf.partition(f".{EXPERTS}.")[0]: candidate.shape[0] for candidate in stacks}
    return {path for path in found if found[path].shape[-1] == counts.get(parent(path))}


def _leaf(leaves: Mapping[str, Any], layers: Mapping[str, Any], path: str) -> Any:
    return leaves[path] if path in leaves else layers[path].leaf


def _is_wide(leaves: Mapping[str, Any], layers: Mapping[str, Any], path: str) -> bool:
    leaf = _leaf(leaves, layers, path)
    return not is_quantized(leaf) and not is_quantised(leaf.dtype) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _check_leaf(leaves: Mapping[str, Any], layers: Mapping[str, Any], candidate: Candidate) -> None:
    if not _is_wide(leaves, layers, candidate.leaf):
        leaf = _leaf(leaves, layers, candidate.leaf)
        what = "is quantised already" if is_quantized(leaf) else f"has dtype {leaf.dtype}"
        raise ValueError(
            f"{candidate.leaf!r} {what}; expected floating-point numbers of 16 bits or more: leave it out, or "
            "jpeft.dequantize it first"
        )


def _plan(path: str, leaf: Any, layout: str, own: Format, block: int | str | None, double: bool | None) -> Plan:
    inputs = [axis for axis, letter in enumerate(layout) if letter == INPUT]
    windows = [axis for axis, letter in enumerate(layout) if letter == WINDOW]
    outputs = [axis for axis, letter in enumerate(layout) if letter == OUTPUT]
    stack = [axis for axis, letter in enumerate(layout) if letter == STACK]
    if VOCABULARY in layout:  # each row is looked up by itself
        inputs, outputs = outputs, []
    wanted = own.block if block is None else None if block == "channel" else int(block)
    tiles = dict.fromkeys(range(leaf.ndim), 1)
    if wanted is None:
        tiles.update({axis: leaf.shape[axis] for axis in (*inputs, *windows)})
    else:
        tiles.update(_blocks(path, leaf.shape, inputs[::-1], wanted, exact=block is not None))
    scale = tuple(size // tiles[axis] for axis, size in enumerate(leaf.shape))
    plan = Plan(own.qtype, jnp.dtype(leaf.dtype), scale)
    wants_double = own.double if double is None else double
    return double_plan(plan, [*inputs[::-1], *windows, *outputs[::-1]], stack) if wants_double else plan


def _blocks(path: str, shape: Sequence[int], axes: Sequence[int], wanted: int, exact: bool) -> dict[int, int]:
    """The sizes of blocks along the input axes, the fastest one first, until a block has the wanted size."""
    tiles: dict[int, int] = {}
    room = wanted
    for axis in axes:
        size = shape[axis]
        nearest = min(divisors(size), key=lambda divisor: (max(divisor, room) / min(divisor, room), -divisor))
        if exact and nearest != min(room, size):
            raise ValueError(
                f"block={wanted} does not divide the input of {path!r}: axis {axis} of its shape {tuple(shape)} has "
                f"{size}; expected a divisor, such as {nearest}, block=None for the nearest one, or exclude the module"
            )
        tiles[axis] = nearest
        room = room // nearest
        if nearest < size or room <= 1:
            break
    return tiles


def quantised_by(leaf: Any, plan: Plan, donate: bool) -> Quantized:
    """A leaf, abstract or not, quantised by a plan; donate: it is freed."""
    encode = functools.partial(encoded, plan=plan)
    if isinstance(leaf, Tracer):
        mesh = jax.typeof(leaf).sharding.mesh
        return _on_explicit_axes(encode, leaf) if mesh.explicit_axes else encode(leaf)
    abstract = jax.eval_shape(_encode, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), plan)
    sharding = getattr(leaf, "sharding", None)
    placed = jax.tree.map(functools.partial(placed_along, sharding), abstract)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.tree.map(
            lambda array, own: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=own), abstract, placed
        )
    if not isinstance(sharding, NamedSharding):
        found = _encode(leaf, plan)
    elif sharding.mesh.are_all_axes_auto:
        found = _placing_encoder(plan, sharding, leaf.shape)(leaf)
    else:
        found = jax.jit(functools.partial(_on_explicit_axes, encode))(leaf)
    if donate and isinstance(leaf, jax.Array):
        jax.block_until_ready(found)
        leaf.delete()
    return found


_encode = jax.jit(encoded, static_argnums=1)


@functools.lru_cache(maxsize=128)
def _placing_encoder(plan: Plan, sharding: NamedSharding, shape: tuple[int, ...]) -> Any:
    # Kept, for the layers of a model have a few shapes, and each function would be compiled anew.
    abstract = jax.eval_shape(_encode, jax.ShapeDtypeStruct(shape, plan.dtype), plan)
    placed = jax.tree.map(functools.partial(placed_along, sharding), abstract)
    return jax.jit(functools.partial(encoded, plan=plan), out_shardings=placed)


def _on_explicit_axes(encode: Any, leaf: jax.Array) -> Quantized:
    sharding = jax.typeof(leaf).sharding
    shapes = jax.eval_shape(encode, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    placed = jax.tree.map(functools.partial(placed_along, sharding), shapes)
    computed: Any = jax.sharding.auto_axes(encode, axes=sharding.mesh.explicit_axes, out_sharding=placed)
    return computed(leaf)
