"""GPT-2 (Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models.pdf): a causal decoder.

The layer norms come before the blocks (https://arxiv.org/abs/1904.10509), the positions are learned.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._adaption import Prompt, attend_to_prompt
from ._attention import Context, split_heads
from ._cache import Memory
from ._call import begin, context_of
from ._causal import FULL, check_length, look_back, through
from ._config import check_heads, number_of_labels, read_fields, translated
from ._family import Options
from ._heads import class_names, decoder_family
from ._layers import Conv1D, Embed, LayerNorm, embed_tokens
from ._mirror import mirror_gpt2
from ._outputs import BaseModelOutput
from ._prefix import Past
from ._shadow import Shadow, with_shadow
from ._stack import layers


@dataclass(frozen=True)
class GPT2Config:
    """The keys of a GPT-2's config.json that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    num_labels: int = 2


_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}
_NO_EFFECT = (
    "n_ctx",
    "reorder_and_upcast_attn",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)
"""Of half precision in PyTorch, of the class with two heads, and one of the first release that no code reads."""


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> GPT2Config:
    """The `GPT2Config` of a config.json. Raises ValueError for what is not implemented, by name."""
    given = read_fields(GPT2Config, translated(raw, _NAMES), known=_NO_EFFECT, ignore=ignore)
    hidden = given.get("hidden_size", GPT2Config.hidden_size)
    inner = given.get("intermediate_size") or 4 * hidden
    config = GPT2Config(**{**given, "intermediate_size": inner, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


def attention_scales(config: GPT2Config) -> tuple[float, ...]:
    """What the scores of each layer are multiplied by."""
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5 if config.scale_attn_weights else 1.0
    return tuple(
        scale / (number + 1) if config.scale_attn_by_inverse_layer_idx else scale
        for number in range(config.num_hidden_layers)
    )


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, scale: float):
        self.c_attn = Conv1D(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.hidden_size)
        self.head_dim, self.scale = config.hidden_size // config.num_attention_heads, scale

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        query, key, value = self._split(x)
        y, memory = look_back(query, key, value, context, memory, scale=self.scale)
        y = self.c_proj(y)
        if context.adaption is not None:
            # As in PEFT, which here adds it after the output projection.
            y = y + attend_to_prompt(context.adaption, query, lambda rows: self._split(rows)[1:])
        return y, memory

    def _split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(split_heads(part, self.head_dim) for part in jnp.split(self.c_attn(x), 3, axis=-1))


class MLP(nnx.Module):
    def __init__(self, config: GPT2Config):
        self.c_fc = Conv1D(config.hidden_size, config.intermediate_size)
        self.c_proj = Conv1D(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(activation(self.act)(self.c_fc(x)))


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, scale: float):
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, scale)
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        y, memory = self.attn(self.ln_1(x), context, memory)
        x = x + y
        return x + self.mlp(self.ln_2(x)), memory


class GPT2Model(nnx.Module):
    """The bare decoder; `token_type_ids` are looked up in the table of the tokens."""

    def __init__(self, config: GPT2Config, options: Options):
        scales = attention_scales(config)
        self.wte = Embed(config.vocab_size, config.hidden_size)
        self.wpe = Embed(config.max_position_embeddings, config.hidden_size)
        self.h = layers(lambda number: Block(config, scales[number]), scales, options)
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.options, self.max_positions = options, config.max_position_embeddings

    @property
    def input_embedding(self) -> Embed:
        return self.wte

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        past_key_values: Past | None = None,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
        adaption_prompts: Mapping[int, Prompt] | None = None,
        shadow: Shadow | None = None,
    ) -> BaseModelOutput:
        embedded = x = embed_tokens(self.wte, input_ids, inputs_embeds, self.options)
        call = begin(x.shape[0], x.shape[1], attention_mask, position_ids, past_key_values, cache_length)
        check_length(call, position_ids, self.max_positions)
        x = x + self.wpe(call.positions, x.dtype)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids, x.dtype)
        context = context_of(call, {FULL: None})
        go = partial(
            through,
            self.h,
            x,
            call,
            context,
            self.ln_f,
            options=self.options,
            collect=output_hidden_states,
            adaption_prompts=adaption_prompts,
        )
        return with_shadow(
            shadow,
            embedded,
            lambda hook: go(hook=hook),
            input_ids=input_ids,
            past=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache_length=cache_length,
        )


GPT2 = decoder_family(
    "gpt2",
    read_config,
    GPT2Model,
    {**class_names("GPT2"), "causal-lm": "GPT2LMHeadModel"},
    prefix="transformer",
    qa_prefix="transformer",
    embedding="wte",
    token_head="classifier",
    inputs=("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    adapted_attention="attn",
    mirror=mirror_gpt2,
    unused=(r"attn\.bias$", r"attn\.masked_bias$"),
)
