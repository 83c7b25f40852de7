"""What the benchmarks measure: a Llama-like decoder in plain JAX, and ways to train LoRA on it.

The decoder asks a `project` function for the products of one x with several weights, so that every way of computing
an adapted product runs in the same model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jpeft

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    scan: layers are one stack that `lax.scan` goes through, rematerialised; else a list. query_block: attention takes
    so many queries at a time and keeps no scores for the backward pass, as flash attention does; 0: all at once.
    """

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int
    scan: bool = False
    query_block: int = 0

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        wide, narrow = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        attention = dict.fromkeys(PROJECTIONS[:4], (self.hidden, self.hidden))
        return {**attention, "gate_proj": wide, "up_proj": wide, "down_proj": narrow}


def parameter_shapes(shape: Shape) -> dict[str, Any]:
    """The parameter tree, with a shape in place of each array."""

    def layer(lead: tuple[int, ...]) -> dict[str, Any]:
        projections = {name: {"kernel": (*lead, *kernel)} for name, kernel in shape.kernels.items()}
        norm = {"scale": (*lead, shape.hidden)}
        return {**projections, "input_layernorm": norm, "post_attention_layernorm": norm}

    return {
        "embed_tokens": {"embedding": (shape.vocabulary, shape.hidden)},
        "layers": layer((shape.layers,)) if shape.scan else [layer(()) for _ in range(shape.layers)],
        "norm": {"scale": (shape.hidden,)},
        "head": (shape.hidden, shape.vocabulary),
    }


def is_shape(value: Any) -> bool:
    return isinstance(value, tuple)


def random_parameters(shape: Shape, dtype: Any, seed: int = 0) -> dict[str, Any]:
    leaves, structure = jax.tree.flatten(parameter_shapes(shape), is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def initial(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
        # One axis: a norm's scale.
        array = jnp.ones(size) if len(size) == 1 else jax.random.normal(key, size) * size[-2] ** -0.5
        return array.astype(dtype)

    return jax.tree.unflatten(structure, [initial(key, size) for key, size in zip(keys, leaves, strict=True)])


Project = Callable[..., tuple[jax.Array, ...]]  # (x, *weights) -> the product of x with each weight
Constrain = Callable[[jax.Array], jax.Array]


def plain(x: jax.Array, *weights: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(x @ weight["kernel"] for weight in weights)


def decoder_loss(
    params: dict[str, Any],
    tokens: jax.Array,
    shape: Shape,
    project: Project = plain,
    constrain: Constrain = lambda x: x,
) -> jax.Array:
    """Mean cross-entropy of the next token. constrain: applied to each layer's result, to shard it."""

    def layer(x: jax.Array, weights: dict[str, Any]) -> tuple[jax.Array, None]:
        return constrain(_layer(x, weights, shape, project)), None

    x = constrain(params["embed_tokens"]["embedding"][tokens])
    if shape.scan:
        x, _ = lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params["layers"])
    else:
        for weights in params["layers"]:
            x, _ = layer(x, weights)
    logits = (_norm(x, params["norm"]) @ params["head"])[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _layer(x: jax.Array, weights: dict[str, Any], shape: Shape, project: Project) -> jax.Array:
    h = _norm(x, weights["input_layernorm"])
    q, k, v = project(h, *(weights[name] for name in PROJECTIONS[:3]))
    heads = (*x.shape[:2], shape.heads, -1)
    q, k = _rotated(q.reshape(heads)), _rotated(k.reshape(heads))
    attended = _attention(q, k, v.reshape(heads), shape.query_block)
    x = x + project(attended.reshape(x.shape), weights["o_proj"])[0]
    h = _norm(x, weights["post_attention_layernorm"])
    gate, up = project(h, weights["gate_proj"], weights["up_proj"])
    return x + project(jax.nn.silu(gate) * up, weights["down_proj"])[0]


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, block: int) -> jax.Array:
    if not block:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    starts = jnp.arange(0, q.shape[1], block)

    @jax.checkpoint
    def attend(start: jax.Array) -> jax.Array:
        own = lax.dynamic_slice_in_dim(q, start, block, 1)
        seen = jnp.arange(q.shape[1])[None] <= start + jnp.arange(block)[:, None]
        return jax.nn.dot_product_attention(own, k, v, mask=seen[None, None])

    return jnp.moveaxis(lax.map(attend, starts), 0, 1).reshape(q.shape)


def _norm(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype) * weights["scale"]


def _rotated(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


# Ways to compute an adapted product. A weight is {"kernel": (in, out), "lora_A": (r, in), "lora_B": (out, r)}; the
# scale is one, as in jpeft with lora_alpha = r.


def shifted(x: jax.Array, *weights: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The floor: the gradient of a shift of q, k, v asks for that of every activation, and of no weight."""
    products = zip(plain(x, *weights), weights, strict=True)
    return tuple(y + weight["shift"] if "shift" in weight else y for y, weight in products)


LowRank = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, A (r, in), B (out, r)) -> (x Aᵀ) Bᵀ


def beside(low_rank: LowRank) -> Project:
    """Each base product, and a low-rank one beside it."""

    def one(x: jax.Array, weight: dict[str, jax.Array]) -> jax.Array:
        change = low_rank(x, *(weight[name].astype(x.dtype) for name in ("lora_A", "lora_B")))
        return x @ weight["kernel"] + change

    return lambda x, *weights: tuple(one(x, weight) for weight in weights)


def as_written(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return (x @ a.T) @ b.T


def as_dots(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """All axes kept, the first factor contracted as it lies."""
    h = lax.dot_general(x, a, (((x.ndim - 1,), (1,)), ((), ())))
    return h @ b.T


def in_two_axes(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return as_dots(x.reshape(-1, x.shape[-1]), a, b).reshape(*x.shape[:-1], b.shape[0])


def small_first(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The thin factor as the left operand of both products: h is (r, rows)."""
    h = lax.dot_general(a, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
    return lax.dot_general(h, b, (((0,), (1,)), ((), ()))).reshape(*x.shape[:-1], b.shape[0])


@jax.custom_vjp
def hand_written(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return in_two_axes(x, a, b)


def _hand_written_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    rows = x.reshape(-1, x.shape[-1])
    h = rows @ a.T
    return (h @ b.T).reshape(*x.shape[:-1], b.shape[0]), (rows, a, b, h)


def _hand_written_backward(kept: Any, dy: jax.Array) -> Any:
    rows, a, b, h = kept
    dy_rows = dy.reshape(-1, dy.shape[-1])
    dh = dy_rows @ b
    return (dh @ a).reshape(*dy.shape[:-1], a.shape[1]), dh.T @ rows, (h.T @ dy_rows).T


hand_written.defvjp(_hand_written_forward, _hand_written_backward)


@jax.custom_vjp
def _second_product(h: jax.Array, b: jax.Array) -> jax.Array:
    return h @ b.T


def _second_product_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, b = kept
    rows = tuple(range(h.ndim - 1))
    return dy @ b, lax.dot_general(h, dy, ((rows, rows), ((), ()))).T


_second_product.defvjp(lambda h, b: (h @ b.T, (h, b)), _second_product_backward)


def thin_first(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """All axes kept, and the gradient of B as h by dy: autodiff takes dy by h, for which XLA on CPU transposes dy."""
    return _second_product(lax.dot_general(x, a, (((x.ndim - 1,), (1,)), ((), ()))), b)


def shared_first_factor(x: jax.Array, *weights: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The first factors of the weights that x meets, as one product."""
    rows = x.reshape(-1, x.shape[-1])
    h = lax.dot_general(rows, jnp.concatenate([w["lora_A"] for w in weights]).astype(x.dtype), (((1,), (1,)), ((), ())))
    parts = jnp.split(h, len(weights), axis=1)
    changes = [part @ w["lora_B"].astype(x.dtype).T for part, w in zip(parts, weights, strict=True)]
    return tuple(y + change.reshape(y.shape) for y, change in zip(plain(x, *weights), changes, strict=True))


def materialised(x: jax.Array, *weights: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(x @ (w["kernel"] + (w["lora_B"] @ w["lora_A"]).T.astype(x.dtype)) for w in weights)


# Ways to train. Each is (trainable tree, frozen tree, loss(trainable, frozen, tokens)).


@dataclasses.dataclass(frozen=True)
class Variant:
    """projected(gradient, trainable, frozen) -> the gradient that the optimizer gets."""

    trainable: Any
    frozen: Any
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    projected: Callable[[Any, Any, Any], Any] = lambda gradient, trainable, frozen: gradient


Loss = Callable[..., jax.Array]  # (params, tokens, project=...) -> loss


def _with(base: dict[str, Any], own: Any) -> dict[str, Any]:
    """The base tree with arrays added to its projections: own is {name: arrays} a layer, or one such for a stack."""

    def layer(weights: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        return {**weights, **{name: {**weights[name], **arrays} for name, arrays in own.items()}}

    layers = base["layers"]
    if isinstance(layers, dict):
        return {**base, "layers": layer(layers, own)}
    return {**base, "layers": [layer(*pair) for pair in zip(layers, own, strict=True)]}


def frozen_floor(base: dict[str, Any], loss: Loss, shape: Shape, zeros: Callable[..., Any]) -> Variant:
    """zeros: makes an array, or an abstract one, of a shape."""
    lead = (shape.layers,) if shape.scan else ()
    shifts = {name: {"shift": zeros((*lead, shape.kernels[name][1]))} for name in PROJECTIONS[:3]}
    # In a list of layers the shift of the first one is enough, and costs nothing.
    trainable = shifts if shape.scan else [shifts, *({} for _ in range(shape.layers - 1))]

    def of(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        shifts = jax.tree.map(lambda shift: shift.astype(frozen["embed_tokens"]["embedding"].dtype), trainable)
        return loss(_with(frozen, shifts), tokens, project=shifted)

    return Variant(trainable, base, of)


def full_fine_tuning(base: dict[str, Any], loss: Loss) -> Variant:
    return Variant(base, {}, lambda trainable, frozen, tokens: loss(trainable, tokens))


def by_jpeft(wrapped: jpeft.PeftParams, loss: Loss, added: Callable[[jpeft.PeftParams], Any] = lambda _: 0) -> Variant:
    """added: a term of the loss that the method asks for."""
    lifted = jpeft.lift(loss)
    trainable, frozen = jpeft.partition(wrapped)

    def of(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        whole = jpeft.combine(trainable, frozen)
        return lifted(whole, tokens) + added(whole)

    return Variant(trainable, frozen, of)


def by_hand(wrapped: jpeft.PeftParams, loss: Loss, project: Project) -> Variant:
    """The same adapters as jpeft's, in a model that is written for them."""
    own = wrapped.adapters["default"].weights
    layers = wrapped.base["layers"]
    if isinstance(layers, dict):
        trainable: Any = {name: dict(own[f"layers.{name}"]) for name in PROJECTIONS}
    else:
        trainable = [{name: dict(own[f"layers.{i}.{name}"]) for name in PROJECTIONS} for i in range(len(layers))]
    return Variant(
        trainable,
        wrapped.base,
        lambda trainable, frozen, tokens: loss(_with(frozen, trainable), tokens, project=project),
    )


def training_step(variant: Variant) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """(optimizer, jitted step): forward, backward and AdamW; trainable and optimizer state are donated."""
    optimizer = optax.adamw(1e-4)

    def step(trainable: Any, state: Any, frozen: Any, tokens: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(variant.loss)(trainable, frozen, tokens)
        gradient = variant.projected(gradient, trainable, frozen)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return optimizer, jax.jit(step, donate_argnums=(0, 1))
