"""The decoder that Llama made common: rotary positions, root-mean-square norms, gated feed-forward blocks.

A family is a function that makes its layer from these parts, and another that reads its config.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

from ._activations import activation
from ._adaption import Prompt, attend_to_prompt
from ._attention import Context, attend, remember, split_heads
from ._cache import Memory
from ._call import begin, context_of
from ._causal import through
from ._config import number_of_labels, read_fields
from ._family import Options
from ._layers import Embed, GatedMLP, Linear, RMSNorm, embed_tokens, scaled
from ._outputs import BaseModelOutput
from ._prefix import Past
from ._rotary import Rope, apply_rotary, read_rope, rotary_tables
from ._shadow import Shadow, with_shadow
from ._stack import layers

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DecoderConfig:
    """The keys of a config.json that decide what is computed.

    `ropes`: the rotary settings of each kind of attention, `layer_types` the kind of each layer. `attention_scale`
    multiplies the scores, `embedding_scale` the embeddings; the two `softcapping`s bound scores and logits.
    `mlp_types`: "dense" or "sparse" for each layer.
    """

    ropes: tuple[tuple[str, Rope], ...]
    layer_types: tuple[str, ...]
    mlp_types: tuple[str, ...]
    head_dim: int
    num_key_value_heads: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    attention_scale: float | None = None
    embedding_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    num_labels: int = 2
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True


ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
FAMILY_KEYS = (
    "ropes",
    "layer_types",
    "mlp_types",
    "attention_output_bias",
    "attention_scale",
    "embedding_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
"""Fields that a config.json may give only if they are among the defaults of the family; others do not have them."""
ROTATION = {"rope_interleaved": (False,), "is_causal": (True,)}


def read_decoder(
    raw: Mapping[str, Any],
    ignore: Collection[str],
    *,
    defaults: Mapping[str, Any],
    accepted: Mapping[str, tuple[Any, ...]] | None = None,
    known: Collection[str] = (),
    derived: Mapping[str, Any] | None = None,
    rope: Callable[..., Rope] = read_rope,
) -> DecoderConfig:
    """The `DecoderConfig` of a config.json.

    `defaults`: of the family, where the file is silent. `accepted`: keys, and the values for which the family is
    implemented. `known`: keys that the family reads itself, or knows to have no effect. `derived`: fields that the
    family has computed from them; without `layer_types` all layers are alike, with a window if there is one. `rope`:
    reads the rotary settings. Raises ValueError for what is not implemented, by name, and sizes that do not fit.
    """
    raw = {**defaults, **raw}
    foreign: dict[str, tuple[Any, ...]] = {key: (None,) for key in FAMILY_KEYS if key not in defaults}
    implemented = {**ROTATION, **foreign, **(accepted or {})}
    given = read_fields(DecoderConfig, raw, implemented=implemented, known=(*ROPE_KEYS, *known), ignore=ignore)
    given = {key: value for key, value in given.items() if key not in foreign}
    given |= {"num_labels": number_of_labels(raw), **(derived or {})}
    hidden, heads, depth = given["hidden_size"], given["num_attention_heads"], given["num_hidden_layers"]
    groups = given.get("num_key_value_heads") or heads
    head_dim = given.get("head_dim") or hidden // heads
    if hidden % heads and not given.get("head_dim"):
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is unset"
        )
    if heads % groups:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    activation(given.get("hidden_act", "silu"))
    windowed = given.get("sliding_window") is not None
    types = tuple(given.get("layer_types") or (SLIDING if windowed else FULL,) * depth)
    _check_types(types, depth, windowed)
    ropes = tuple(
        (kind, rope(_rotary_keys(raw, kind), head_dim=head_dim, max_positions=given["max_position_embeddings"]))
        for kind in dict.fromkeys(types)
    )
    sizes = {"ropes": ropes, "layer_types": types, "head_dim": head_dim, "num_key_value_heads": groups}
    return DecoderConfig(**{"mlp_types": ("dense",) * depth, **given, **sizes})


def _rotary_keys(raw: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The config as it is for layers of one kind, by which `rope_parameters` may be divided."""
    given = raw.get("rope_parameters") or {}
    if not {FULL, SLIDING} & given.keys():
        return raw
    if kind not in given:
        raise ValueError(f"rope_parameters is given by kind of layer, but not for {kind}, which layer_types holds")
    return {**raw, "rope_parameters": given[kind]}


def _check_types(types: tuple[str, ...], depth: int, windowed: bool) -> None:
    if len(types) != depth:
        raise ValueError(f"layer_types has {len(types)} entries, but num_hidden_layers is {depth}")
    if unknown := set(types) - {FULL, SLIDING}:
        raise ValueError(f"layer_types holds {', '.join(sorted(unknown))}; expected {FULL} or {SLIDING}")
    if SLIDING in types and not windowed:
        raise ValueError(f"layer_types holds {SLIDING}, but the config has no sliding_window")


class Attention(nnx.Module):
    """Self-attention with rotary positions; `norm(features)` makes the norms of each head's queries and keys."""

    def __init__(self, config: DecoderConfig, kind: str, *, norm: Callable[[int], nnx.Module] | None = None):
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden, config.num_key_value_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden, bias=config.attention_output_bias)
        self.q_norm = None if norm is None else norm(head_dim)
        self.k_norm = None if norm is None else norm(head_dim)
        self.rotated = RotaryAttention(config, kind)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        head_dim = self.rotated.head_dim
        query, key, value = (split_heads(layer(x), head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        y, memory = self.rotated(query, key, value, context, memory)
        if context.adaption is not None:
            y = y + attend_to_prompt(context.adaption, self.rotated.rotate(query, context), self._of_prompt)
        return self.o_proj(y), memory

    def _of_prompt(self, rows: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(split_heads(layer(rows), self.rotated.head_dim) for layer in (self.k_proj, self.v_proj))


class RotaryAttention:
    """What lies between the projections: rotation, cache, scores. It has no parameters."""

    def __init__(self, config: DecoderConfig, kind: str):
        self.kind, self.head_dim = kind, config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None]:
        key, value, memory = remember(memory, context, self.rotate(key, context), value)
        query, mask = self.rotate(query, context), context.masks[self.kind]
        return attend(query, key, value, mask, scale=self.scale, softcap=self.softcap), memory

    def rotate(self, x: jax.Array, context: Context) -> jax.Array:
        """Queries or keys `(batch, length, heads, head_dim)` at their positions."""
        return apply_rotary(x, *context.rotary[self.kind])


def gated_mlp(config: DecoderConfig) -> GatedMLP:
    """The feed-forward block of a config."""
    return GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)


class PreNormLayer(nnx.Module):
    """Attention and a feed-forward block, each on the normed input and added to it."""

    def __init__(
        self,
        config: DecoderConfig,
        self_attn: nnx.Module,
        mlp: nnx.Module,
        *,
        norm: Callable[..., nnx.Module] = RMSNorm,
    ):
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        y, memory = self.self_attn(self.input_layernorm(x), context, memory)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), memory


class Decoder(nnx.Module):
    """The bare decoder: embedding, layers, final norm. `layer(config, number)` makes one layer."""

    def __init__(
        self,
        config: DecoderConfig,
        options: Options,
        *,
        layer: Callable[[DecoderConfig, int], nnx.Module],
        norm: Callable[..., nnx.Module] = RMSNorm,
    ):
        kinds = tuple(zip(config.layer_types, config.mlp_types, strict=True))
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size)
        self.layers = layers(lambda number: layer(config, number), kinds, options)
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.config, self.options = config, options

    @property
    def input_embedding(self) -> Embed:
        return self.embed_tokens

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        past_key_values: Past | None = None,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
        adaption_prompts: Mapping[int, Prompt] | None = None,
        shadow: Shadow | None = None,
    ) -> BaseModelOutput:
        config = self.config
        x = embed_tokens(self.embed_tokens, input_ids, inputs_embeds, self.options)
        x = scaled(x, self.embed_tokens, input_ids, inputs_embeds, config.embedding_scale)
        call = begin(x.shape[0], x.shape[1], attention_mask, position_ids, past_key_values, cache_length)
        windows = {kind: config.sliding_window if kind == SLIDING else None for kind, _ in config.ropes}
        rotary = {kind: rotary_tables(rope, call.positions, x.dtype) for kind, rope in config.ropes}
        context = context_of(call, windows, rotary)
        go = partial(
            through,
            self.layers,
            x,
            call,
            context,
            self.norm,
            options=self.options,
            collect=output_hidden_states,
            adaption_prompts=adaption_prompts,
        )
        return with_shadow(
            shadow,
            x,
            lambda hook: go(hook=hook),
            input_ids=input_ids,
            past=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache_length=cache_length,
        )
