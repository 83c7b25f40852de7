"""Optimizers that know the two factors of LoRA, as optax transforms over wrapped parameters.

    LoRA+       B learns faster than A by a fixed ratio                             https://arxiv.org/abs/2402.12354
    LoRA-FA     A stays; B follows the projection of the full gradient              https://arxiv.org/abs/2308.03303
    Riemannian  each factor's gradient times the inverse Gram matrix of the other   https://arxiv.org/abs/2402.02347

They take the gradients of `jpeft.value_and_grad`, with the wrapped parameters, or those by the trainable half of
`jpeft.partition`, with that half. State is kept for what trains alone.
"""

import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._contract import CONVOLUTION, LINEAR, Site
from ._optimizer_tree import FROZEN, Pair, marked, on_pairs
from ._params import PeftParams
from ._paths import BIAS_NAMES, last_name
from ._sites import NORMALIZATION_NAMES
from ._train import trainable_mask

Rate = float | jax.Array | Callable[[Any], Any]
Optimizer = Callable[..., optax.GradientTransformation]

A, B, B_NO_DECAY, LOOKUP = "A", "B", "B, no decay", "lookup"


def create_loraplus_optimizer(
    optimizer_cls: Optimizer,
    *,
    lr: Rate,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: Rate = 1e-6,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: an optax optimizer with a learning rate of its own for each kind of parameter.

    optimizer_cls: such as `optax.adamw`, called with a rate, with `weight_decay` if it has one, and `kwargs`.
    lr: rate, or schedule, of LoRA's A and of other arrays with two axes or more. loraplus_lr_ratio: at least 1; LoRA's
    B and arrays with one axis learn with lr times it. loraplus_lr_embedding: rate of both factors of lookup tables.
    loraplus_weight_decay: of all but biases and the gains of normalisation layers.
    Raises ValueError for a ratio below 1, and for a weight decay that `optimizer_cls` has no argument for.
    https://arxiv.org/abs/2402.12354

    >>> import jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> tx = create_loraplus_optimizer(optax.sgd, lr=0.1, loraplus_lr_ratio=16.0)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    >>> {name: round(float(u.mean()), 3) for name, u in updates.adapters["default"].weights["query"].items()}
    {'lora_A': -0.1, 'lora_B': -1.6}
    """
    if not loraplus_lr_ratio >= 1:
        raise ValueError(f"loraplus_lr_ratio is {loraplus_lr_ratio!r}; expected a number of at least 1")
    decays = "weight_decay" in inspect.signature(optimizer_cls).parameters
    if loraplus_weight_decay and not decays:
        raise ValueError(
            f"loraplus_weight_decay is {loraplus_weight_decay!r}, but optimizer_cls={optimizer_cls!r} has no argument "
            "weight_decay; expected 0, or an optimizer such as optax.adamw"
        )

    def group(rate: Rate, weight_decay: float) -> optax.GradientTransformation:
        return optimizer_cls(rate, **({"weight_decay": weight_decay} if decays else {}), **kwargs)

    faster = _times(lr, loraplus_lr_ratio)
    groups: dict[Hashable, optax.GradientTransformation] = {
        A: group(lr, loraplus_weight_decay),
        LOOKUP: group(loraplus_lr_embedding, loraplus_weight_decay),
        B: group(faster, loraplus_weight_decay),
        B_NO_DECAY: group(faster, 0.0),
        FROZEN: optax.set_to_zero(),
    }
    return optax.partition(groups, _labels)


def _times(rate: Rate, factor: float) -> Rate:
    return (lambda step: rate(step) * factor) if callable(rate) else rate * factor


def _labels(params: PeftParams) -> PeftParams:
    """The tree with the name of its group at each leaf."""
    return marked(params, lambda site, name, axes: _group(name, axes), _group_of_replaced)


def _group(name: str, axes: int) -> str:
    if name.startswith("lora_embedding_"):
        return LOOKUP
    if "lora_B" in name or axes == 1:
        return B_NO_DECAY if "bias" in name else B
    return A


def _group_of_replaced(path: str, axes: int) -> str:
    if last_name(path) in (*BIAS_NAMES, *NORMALIZATION_NAMES):
        return B_NO_DECAY
    return B if axes == 1 else A


def create_lorafa_optimizer(
    *,
    lr: Rate,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    correct_bias: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA: AdamW in which LoRA's A never moves and B follows the gradient that fits the full one best.

    B's gradient is multiplied by the pseudo-inverse of A A^T and divided by the square of the scaling, which is each
    module's own; the arithmetic is in float32 or wider. lr: rate, or schedule. weight_decay: times lr, applied to what
    the step has made of the parameter, as in PEFT. b1, b2 in [0, 1), eps, correct_bias: of Adam. Lookup tables, whose A
    begins at zero, and everything else that trains follow plain AdamW. No state is kept for A, and under `jit` its
    gradient is not computed. Raises ValueError for values out of range, and if `update` gets no parameters.
    https://arxiv.org/abs/2308.03303

    >>> import jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["query"]))
    >>> tx = create_lorafa_optimizer(lr=0.1)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    >>> {name: bool(u.any()) for name, u in updates.adapters["default"].weights["query"].items()}
    {'lora_A': False, 'lora_B': True}
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}; expected a number in [0, 1)")
    for name, value in (("eps", eps), ("weight_decay", weight_decay), ("lr", lr)):
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{name} is {value!r}; expected a number of at least 0")

    def label(site: Site | None, name: str, axes: int) -> str:
        return FROZEN if name == "lora_A" else B

    adam = _decayed_adam(lr, weight_decay, b1, b2, eps, correct_bias)
    groups: dict[Hashable, optax.GradientTransformation] = {B: adam, FROZEN: optax.set_to_zero()}
    return optax.chain(
        on_pairs(_projected, kinds=(LINEAR, CONVOLUTION)),
        optax.partition(groups, lambda params: marked(params, label, lambda path, axes: B)),
    )


def _projected(pair: Pair) -> tuple[jax.Array, jax.Array]:
    gram = pair.a @ _transposed(pair.a)
    return pair.grad_a, (pair.grad_b @ _damped_inverse(gram, 1e-8)) / pair.scaling**2


class _AdamState(NamedTuple):
    count: jax.Array
    mu: Any
    nu: Any


def _decayed_adam(
    lr: Rate, weight_decay: float, b1: float, b2: float, eps: float, correct_bias: bool
) -> optax.GradientTransformation:
    # PEFT's, which is not optax.adamw: eps is added before the bias is corrected, and the decay comes after the step.
    def init(params: Any) -> _AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _AdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: _AdamState, params: Any = None) -> tuple[Any, _AdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        rate = jnp.asarray(lr(state.count) if callable(lr) else lr, jnp.float32)
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        corrected = jnp.sqrt(1 - b2**steps) / (1 - b1**steps)
        size = jnp.asarray(rate * corrected if correct_bias else rate)

        def moved(m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            step = -size.astype(m.dtype) * m / (jnp.sqrt(v) + eps)
            return step - (rate * weight_decay).astype(m.dtype) * (p.astype(m.dtype) + step) if weight_decay else step

        return jax.tree.map(moved, mu, nu, params), _AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def create_riemannian_optimizer(
    optimizer_cls: Optimizer, *, lr: Rate, reg: float = 1e-2, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer for LoRA whose gradients are scaled by the inverse Gram matrices of the factors.

    A's gradient becomes (B^T B + reg I)^-1 times it, B's becomes it times (A A^T + reg I)^-1, in float32 or wider; so
    in linear layers, and everything else that trains is updated as it is. optimizer_cls: such as `optax.adamw`,
    called with lr, a rate or a schedule, and `kwargs`. reg: at least 0.
    Raises ValueError for a negative reg, if `update` gets no parameters, and in `init` if no pair of factors trains.
    https://arxiv.org/abs/2402.02347

    >>> import jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["query"]))
    >>> tx = create_riemannian_optimizer(optax.sgd, lr=0.1)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    >>> float(updates.adapters["default"].weights["query"]["lora_A"][0, 0])  # B is zero: 0.1 / reg
    -10.0
    """
    if not reg >= 0:
        raise ValueError(f"reg is {reg!r}; expected a number of at least 0")

    def preconditioned(pair: Pair) -> tuple[jax.Array, jax.Array]:
        left = _damped_inverse(_transposed(pair.b) @ pair.b, reg)
        right = _damped_inverse(pair.a @ _transposed(pair.a), reg)
        return left @ pair.grad_a, pair.grad_b @ right

    return optax.chain(
        on_pairs(preconditioned, kinds=(LINEAR,), required=True),
        optax.masked(optimizer_cls(lr, **kwargs), trainable_mask),
    )


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _damped_inverse(gram: jax.Array, damping: float) -> jax.Array:
    size = gram.shape[-1]
    damped = gram + damping * jnp.eye(size, dtype=gram.dtype)
    # A pseudo-inverse: a factor may have lost some of its rank. The cutoff is PyTorch's.
    return jnp.linalg.pinv(damped, rtol=size * float(jnp.finfo(gram.dtype).eps), hermitian=True)
