"""ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning (Li et al., 2026, https://arxiv.org/abs/2604.19254).

    h <- block(h + alpha up(down(drop(h - s)))),   s <- (1 - g) s + g T(h),   g = sigmoid(G(h))

around each block of a decoder; s begins as what a small decoder beside it, the shadow, makes of the same tokens, and
the loss of that decoder's own predictions, times auxiliary_loss_weight, is added to the model's.
Of each block `shadow_down.default.weight (r, d)`, `shadow_up.default.weight (d, r)` and, of T and G, for u =
update_hidden_size or r, `shadow_update_{transform,gate}.default.{0,2}.{weight,bias}` of shapes (u, d), (u,), (d, u) and
(d,); of the model `shadow_backbone.default.*`, `shadow_projection.default.weight (d, shadow_hidden_size)` if that is
not d, and `shadow_head.default.weight (labels, d)` of a classifier. Costs 2 d r + 4 d u + 2 (u + d) parameters and
twice as many FLOPs a token for each block, and the shadow: those of one block for each of its layers.

The arrays act on no weight: a model has to call `jpeft.shadow_injection` and `jpeft.shadow_update` around its blocks.
Those of `jpeft_interop.models` do. It cannot be merged; PEFT's own refusal leaves its model without the shadow.
Where PEFT is not followed: layers_to_transform without target_modules chooses layers, where PEFT wraps all of them;
blocks that do not follow one another are refused, where PEFT fails in the forward pass. Not here: a pretrained
shadow_model, and PEFT's diffusion transformers (its diffusion_models.py).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._begin import Beginning, Tree
from .._config import FrozenMapping, PeftType, TaskType, TunerConfig
from .._contract import beside, fold_in_name, register
from .._shadow import DOWN, GATE, TRANSFORM, UP
from .._stacks import layer_paths
from ._blocks import blocks_of, shadow_tensors, width_of

BACKBONE, PROJECTION, HEAD = "shadow_backbone.default", "shadow_projection.default.weight", "shadow_head.default.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowConfig(TunerConfig):
    """What ShadowPEFT trains and where; PEFT's fields and defaults.

    target_modules: whole blocks, one after another; None: all. r: rank of the injection, at least 1. shadow_alpha: its
    factor. shadow_dropout: rate in [0, 1) on the difference of the states. init_weights: whether `shadow_up` begins as
    zeros, so that the model begins as it was. shadow_model: "mirror", a decoder of the model's own kind, with
    shadow_num_hidden_layers (None: 1) and, where they are not None, other sizes. share_embeddings: whether it reads the
    model's embeddings, if it is as wide, rather than its own. update_hidden_size: of T and G; None: r.
    auxiliary_loss_weight: at least 0. shadow_tensors: no field of PEFT, {name: (shape, mean, standard deviation)} of
    the shadow's tensors as they begin; None: as the model's first blocks have them. `jpeft_interop` says it for its
    models; files do not hold it. Raises ValueError for values out of range, and for another shadow_model.

    >>> ShadowConfig(r=4).shadow_alpha
    0.1
    """

    peft_type: PeftType | None = PeftType.SHADOW
    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    shadow_tensors: Mapping[str, tuple[tuple[int, ...], float, float]] | None = dataclasses.field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shadow_model != "mirror":
            raise ValueError(
                f"shadow_model is {self.shadow_model!r}; expected 'mirror': a shadow that was trained before is not "
                "implemented here, nor that of a diffusion transformer"
            )
        sizes = [name for name in SIZES if getattr(self, name) is not None]
        for name in ("r", *sizes):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
        if not 0.0 <= self.shadow_dropout < 1.0:
            raise ValueError(f"shadow_dropout is {self.shadow_dropout!r}; expected a rate in [0, 1)")
        if self.auxiliary_loss_weight < 0.0:
            raise ValueError(f"auxiliary_loss_weight is {self.auxiliary_loss_weight!r}; expected at least 0")
        if self.bias != "none":
            raise ValueError(f"bias is {self.bias!r}; expected 'none', as ShadowPEFT trains no biases of the model")


SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
    "update_hidden_size",
)


def begin(key: jax.Array, tree: Tree, config: ShadowConfig) -> Beginning:
    found = blocks_of(tree, config)
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=tuple(found.paths))
    width, tensors = width_of(tree), shadow_tensors(tree, found, config)
    weights = {group: _stacked(key, group, width, config) for group in found.groups}
    config = dataclasses.replace(config, shadow_tensors=FrozenMapping(tensors))
    shared = {f"{BACKBONE}.{name}": _drawn(fold_in_name(key, name), *tensor) for name, tensor in tensors.items()}
    narrow = config.shadow_hidden_size or width
    if narrow != width:
        shared[PROJECTION] = _linear(fold_in_name(key, PROJECTION), width, narrow)
    if config.task_type == TaskType.SEQ_CLS:
        shared |= _head(tree)
    return Beginning(config, {}, weights, shared)


def _stacked(key: jax.Array, group: str, width: int, config: ShadowConfig) -> dict[str, jax.Array]:
    """The arrays of a block, or of a stack of blocks, each with the values that it would have by itself."""
    paths, inner = layer_paths(group), config.update_hidden_size or config.r
    each = [_block(fold_in_name(key, path), width, config.r, inner) for path in paths or [group]]
    arrays = {name: jnp.stack([own[name] for own in each]) for name in each[0]} if paths else each[0]
    return {**arrays, UP: jnp.zeros_like(arrays[UP])} if config.init_weights else arrays


# One program for all blocks, which are alike.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _block(key: jax.Array, width: int, r: int, inner: int) -> dict[str, jax.Array]:
    keys = {name: fold_in_name(key, name) for name in (DOWN, UP, TRANSFORM, GATE)}
    arrays = {DOWN: _linear(keys[DOWN], r, width), UP: _linear(keys[UP], width, r)}
    for part in (TRANSFORM, GATE):
        for number, (outputs, inputs) in {0: (inner, width), 2: (width, inner)}.items():
            own = jax.random.split(jax.random.fold_in(keys[part], number))
            arrays[f"{part}.{number}.weight"] = _linear(own[0], outputs, inputs)
            arrays[f"{part}.{number}.bias"] = _linear(own[1], outputs, inputs)[:, 0]
    return arrays


def _linear(key: jax.Array, outputs: int, inputs: int) -> jax.Array:
    """As a linear layer of PyTorch begins, (out, in)."""
    return jax.random.uniform(key, (outputs, inputs), minval=-(inputs**-0.5), maxval=inputs**-0.5)


def _drawn(key: jax.Array, shape: tuple[int, ...], mean: float, deviation: float) -> jax.Array:
    return mean + deviation * jax.random.normal(key, shape)


def _head(tree: Tree) -> dict[str, jax.Array]:
    """A copy of the classifier, for the shadow to be judged by; PEFT has none for a classifier by another name."""
    for name in ("score", "classifier"):
        if name in tree.found and tree.found[name].layout is not None:
            return {HEAD: tree.weight(tree.found[name].site()).T}
    return {}


SHADOW = register(
    beside(
        what="ShadowPEFT's side state", config=ShadowConfig, begin=begin, dropout=lambda config: config.shadow_dropout
    )
)
