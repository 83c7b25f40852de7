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

import jax

from .._begin import Beginning, Tree
from .._config import FrozenMapping, TaskType
from .._contract import beside, fold_in_name, register
from .._decoder_blocks import blocks_of, shadow_tensors
from ._shadow_arrays import arrays_of, linear
from ._shadow_config import ShadowConfig as ShadowConfig

BACKBONE, PROJECTION, HEAD = "shadow_backbone.default", "shadow_projection.default.weight", "shadow_head.default.weight"


def begin(key: jax.Array, tree: Tree, config: ShadowConfig) -> Beginning:
    found = blocks_of(tree, config)
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=tuple(found.paths))
    width = tree.token_table("the side state is as wide as the rows of").out_features
    tensors = shadow_tensors(tree, found, config)
    weights = {group: arrays_of(key, group, paths, width, config) for group, paths in found.groups.items()}
    config = dataclasses.replace(config, shadow_tensors=FrozenMapping(tensors))
    shared = {f"{BACKBONE}.{name}": _drawn(fold_in_name(key, name), *tensor) for name, tensor in tensors.items()}
    narrow = config.shadow_hidden_size or width
    if narrow != width:
        shared[PROJECTION] = linear(fold_in_name(key, PROJECTION), width, narrow)
    if config.task_type == TaskType.SEQ_CLS:
        shared |= _head(tree)
    return Beginning(config, {}, weights, shared)


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
