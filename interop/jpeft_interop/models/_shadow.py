"""A shadow network (ShadowPEFT) as an input of a decoder: run before its layers, its state carried along with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import PeftParams, ShadowConfig, TaskType, shadow_injection, shadow_update
from jpeft._params import Rng
from jpeft._paths import fold_in_name
from jpeft._stacks import layer_paths
from jpeft.methods.shadow import BACKBONE, HEAD, PROJECTION

from ._blueprint import Blueprint, Params, blueprint
from ._cache import Cache, Memory
from ._hook import Hook
from ._leaves import Leaf, listed, nest, tensors_of
from ._mirror import Sizes
from ._outputs import BaseModelOutput
from ._parameters import normal, ones, zeros

SHADOW = "shadow"
"""The name of the input."""

IN_CACHE = "shadow/"
"""What the names of the shadow's layers begin with in a cache."""

RNG = "rng"
"""What a layer's key is called among its arrays."""

SHARED_TABLE = "embed_tokens"
"""The one table that a shadow goes without if it reads the model's embeddings; of others PEFT keeps an idle copy."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shadow:
    """What a decoder is given of a shadow.

    `layers`: the arrays around each of the decoder's layers, by number, and where there is dropout a key. `params`: of
    the shadow's own decoder. `projection (hidden, own hidden)`: None if they are equal. `head (labels, hidden)`: of a
    classifier. Static: `network`, the shadow's decoder; `shares`, whether it reads the model's embeddings; `scored`,
    whether its own predictions count, with the weight `auxiliary_loss_weight`.
    """

    layers: Mapping[int, Mapping[str, Any]]
    params: Params
    projection: jax.Array | None
    head: jax.Array | None
    network: Blueprint = field(metadata={"static": True})
    alpha: float = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})
    shares: bool = field(metadata={"static": True})
    scored: bool = field(metadata={"static": True})
    auxiliary_loss_weight: float = field(metadata={"static": True})


@lru_cache(maxsize=64)
def network_of(base: Blueprint, sizes: Sizes) -> Blueprint:
    """The shadow's decoder, a bare one of the model's own family; raises ValueError for a family that has none."""
    family = base.family
    if family.mirror is None:
        raise ValueError(
            f"ShadowPEFT goes along the blocks of a decoder, which {base.architecture.name} is not, or not of a kind "
            "that is implemented; expected a model of: gemma, gemma2, gemma3_text, gpt2, llama, mistral, olmo2, phi3, "
            "qwen2, qwen3"
        )
    config = family.mirror(base.config, sizes)
    return blueprint(family, family.architectures["base"], config, replace(base.options, scan_layers=False))


def sizes_of(config: ShadowConfig) -> Sizes:
    """The sizes that a config gives the shadow."""
    return Sizes(
        config.shadow_num_hidden_layers or 1,
        config.shadow_hidden_size,
        config.shadow_num_attention_heads,
        config.shadow_intermediate_size,
    )


def stored_leaves(base: Blueprint, config: ShadowConfig) -> dict[str, Leaf]:
    """The parameters of the shadow's decoder by the names of their tensors in a file."""
    network = network_of(base, sizes_of(config))
    kept = [leaf for path, leaf in network.leaves.items() if not (_shares(base, config) and _is_shared(path))]
    return {name: leaf for leaf in kept for name in tensors_of(leaf)}


def first_tensors(base: Blueprint, config: ShadowConfig) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """{name: (shape, mean, standard deviation)} of the tensors that the shadow's decoder begins with."""
    std = base.config.initializer_range
    first: dict[Any, tuple[float, float]] = {ones: (1.0, 0.0), zeros: (0.0, 0.0), normal: (0.0, std)}
    return {name: (tensors_of(leaf)[name], *first[leaf.initial]) for name, leaf in stored_leaves(base, config).items()}


def _shares(base: Blueprint, config: ShadowConfig) -> bool:
    return config.share_embeddings and config.shadow_hidden_size in (None, base.config.hidden_size)


def _is_shared(path: str) -> bool:
    return path.split(".")[0] == SHARED_TABLE


def shadow_of(base: Blueprint, params: PeftParams) -> Shadow | None:
    """The shadow among the active adapters, for a model of this blueprint; None if there is none.

    Raises ValueError if it is not the only one, for a model that has no shadow, and for tensors of other names or
    shapes than such a model's shadow has.
    """
    names = [name for name in params.active if isinstance(params.adapters[name].config, ShadowConfig)]
    if not names:
        return None
    if len(params.active) > 1:
        raise ValueError(
            f"the active adapters are {', '.join(params.active)}, and {names[0]!r} is a shadow, which acts alone; "
            f"expected jpeft.set_adapter(params, {names[0]!r})"
        )
    adapter, rng = params.adapters[names[0]], params.context.get("rng")
    config: Any = adapter.config
    key = rng.key() if rng is not None and config.shadow_dropout else None
    layers: dict[int, dict[str, Any]] = {}
    for path, arrays in adapter.weights.items():
        stacked = layer_paths(path) is not None
        for index, layer in enumerate(layer_paths(path) or [path]):
            own: dict[str, Any] = {name: array[index] for name, array in arrays.items()} if stacked else dict(arrays)
            if key is not None:
                own[RNG] = Rng.of(fold_in_name(key, f"{names[0]}/{layer}"))
            layers[int(layer.rpartition(".")[2])] = own
    return Shadow(
        layers=layers,
        params=_params(base, config, adapter.shared),
        projection=adapter.shared.get(PROJECTION),
        head=adapter.shared.get(HEAD),
        network=network_of(base, sizes_of(config)),
        alpha=config.shadow_alpha,
        dropout=config.shadow_dropout,
        shares=_shares(base, config),
        scored=config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS),
        auxiliary_loss_weight=config.auxiliary_loss_weight,
    )


def _params(base: Blueprint, config: ShadowConfig, shared: Mapping[str, jax.Array]) -> Params:
    leaves = stored_leaves(base, config)
    given = {name[len(BACKBONE) + 1 :]: array for name, array in shared.items() if name.startswith(f"{BACKBONE}.")}
    shapes = {name: tensors_of(leaf)[name] for name, leaf in leaves.items()}
    wrong = [f"{name} is missing" for name in shapes if name not in given]
    wrong += [f"{name} is unexpected" for name in given if name not in shapes]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, expected {shapes[name]}"
        for name in shapes
        if name in given and tuple(given[name].shape) != shapes[name]
    ]
    if wrong:
        raise ValueError(
            f"the shadow does not fit a {base.architecture.name} of these sizes: {listed(wrong)}; expected an adapter "
            "that was made for this very model"
        )
    pieces = {leaf.path: leaf.alternatives[0][0] for leaf in leaves.values()}
    return nest({path: given[piece.name].transpose(piece.axes) for path, piece in pieces.items()})


def with_shadow(
    shadow: Shadow | None,
    x: jax.Array,
    go: Callable[[Hook | None], BaseModelOutput],
    *,
    input_ids: jax.Array | None,
    past: Any,
    **inputs: Any,
) -> BaseModelOutput:
    """What `go(hook)`, the rest of a decoder, gives with a shadow around its layers, or without one.

    `x`: the embedded tokens, without positions. `input_ids`: what they are, if the decoder was given that. `past`: its
    cache. `inputs`: the others that the shadow's decoder is given, too.
    """
    if shadow is None:
        return go(None)
    side = _run(shadow, x, input_ids, _own_cache(past), inputs)
    state = side.last_hidden_state
    if shadow.projection is not None:
        state = (state.astype(shadow.projection.dtype) @ shadow.projection.T).astype(x.dtype)
    output = go(Hook(state, shadow.layers, _before(shadow.alpha, shadow.dropout), shadow_update))
    return replace(output, shadow_state=state, past_key_values=_joined(output.past_key_values, side.past_key_values))


def _before(alpha: float, dropout: float) -> Callable[[Mapping[str, Any], jax.Array, jax.Array], jax.Array]:
    def before(own: Mapping[str, Any], x: jax.Array, state: jax.Array) -> jax.Array:
        rng = own[RNG].key() if RNG in own else None
        return shadow_injection(own, x, state, alpha=alpha, rng=rng, dropout=dropout)

    return before


def _run(
    shadow: Shadow,
    x: jax.Array,
    input_ids: jax.Array | None,
    past: Cache | None,
    inputs: Mapping[str, Any],
) -> BaseModelOutput:
    # In the dtype that the model computes in, whatever that of the adapter is.
    params = jax.tree.map(lambda array: array.astype(x.dtype), shadow.params)
    width = shadow.network.config.hidden_size
    if shadow.shares and f"{SHARED_TABLE}.embedding" in shadow.network.leaves:
        params[SHARED_TABLE] = {"embedding": jnp.zeros((1, width), x.dtype)}
    decoder = nnx.merge(shadow.network.graphdef, params)
    if not shadow.shares and input_ids is not None:
        x = decoder.input_embedding(input_ids)
        scale = getattr(shadow.network.config, "embedding_scale", None)
        x = x if scale is None else x * jnp.asarray(scale, x.dtype)
    if x.shape[-1] != width:
        raise ValueError(
            f"the shadow is {width} wide and inputs_embeds are {x.shape[-1]}; expected input_ids, of which it has a "
            "table of its own"
        )
    return decoder(inputs_embeds=x, past_key_values=past, **inputs)


def _own_cache(past: Any) -> Cache | None:
    if past is None:
        return None
    own: dict[str, Memory] = {
        name.removeprefix(IN_CACHE): memory
        for name, memory in getattr(past, "layers", {}).items()
        if name.startswith(IN_CACHE)
    }
    if not own:
        raise ValueError(
            "past_key_values hold nothing of the shadow; expected those that a call with the shadow returned"
        )
    return Cache(own, past.mask, past.length)


def _joined(cache: Cache | None, own: Cache | None) -> Cache | None:
    if cache is None or own is None:
        return cache
    return replace(cache, layers={**cache.layers, **{f"{IN_CACHE}{name}": m for name, m in own.layers.items()}})
