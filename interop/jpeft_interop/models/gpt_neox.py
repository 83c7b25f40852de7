"""GPT-NeoX (https://arxiv.org/abs/2204.06745) and Pythia (https://arxiv.org/abs/2304.01373): causal decoders.

Attention and feed-forward block stand side by side (both read what enters the layer), the positions are rotary and
turn a part of each head.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from ._activations import activation
from ._attention import Context
from ._cache import Memory
from ._call import begin, context_of
from ._causal import FULL, FeedForward, FusedAttention, through
from ._config import check_heads, number_of_labels, read_fields, translated
from ._family import Options
from ._heads import class_names, decoder_family
from ._layers import Embed, LayerNorm, embed_tokens
from ._outputs import BaseModelOutput
from ._prefix import Past
from ._rotary import Rope, read_rope, rotary_tables
from ._stack import layers


@dataclass(frozen=True)
class GPTNeoXConfig:
    """The keys of a GPT-NeoX's config.json that decide what is computed, with the defaults of `transformers`."""

    rope: Rope
    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    num_labels: int = 2


_NAMES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> GPTNeoXConfig:
    """The `GPTNeoXConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    raw = translated(raw, _NAMES)
    given = read_fields(GPTNeoXConfig, raw, implemented={"is_decoder": (False, True)}, known=_ROPE, ignore=ignore)
    sizes = {name: given.get(name, getattr(GPTNeoXConfig, name)) for name in ("hidden_size", "num_attention_heads")}
    check_heads(**sizes)
    rope = read_rope(
        raw,
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        max_positions=given.get("max_position_embeddings", GPTNeoXConfig.max_position_embeddings),
        partial_rotary_factor=rotated_part(raw),
    )
    config = GPTNeoXConfig(**{**given, "rope": rope, "num_labels": number_of_labels(raw)})
    activation(config.hidden_act)
    return config


def rotated_part(raw: Mapping[str, Any]) -> float:
    """How much of each head is rotated, wherever the config says it."""
    stated = (raw.get("rope_scaling") or raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    return stated or raw.get("partial_rotary_factor") or 0.25


class Layer(nnx.Module):
    def __init__(self, config: GPTNeoXConfig):
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = FusedAttention(config.hidden_size, config.num_attention_heads, bias=config.attention_bias)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.parallel = config.use_parallel_residual

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        y, memory = self.attention(self.input_layernorm(x), context, memory)
        y = x + y
        return y + self.mlp(self.post_attention_layernorm(x if self.parallel else y)), memory


class GPTNeoXModel(nnx.Module):
    """The bare decoder."""

    def __init__(self, config: GPTNeoXConfig, options: Options):
        self.embed_in = Embed(config.vocab_size, config.hidden_size)
        self.layers = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.options, self.rope = options, config.rope

    @property
    def input_embedding(self) -> Embed:
        return self.embed_in

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        past_key_values: Past | None = None,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        x = embed_tokens(self.embed_in, input_ids, inputs_embeds, self.options)
        call = begin(x.shape[0], x.shape[1], attention_mask, position_ids, past_key_values, cache_length)
        context = context_of(call, {FULL: None}, {FULL: rotary_tables(self.rope, call.positions, x.dtype)})
        return through(
            self.layers, x, call, context, self.final_layer_norm, options=self.options, collect=output_hidden_states
        )


GPT_NEOX = decoder_family(
    "gpt_neox",
    read_config,
    GPTNeoXModel,
    class_names("GPTNeoX"),
    prefix="gpt_neox",
    qa_prefix="gpt_neox",
    embedding="embed_in",
    token_head="classifier",
    # The name on disk; the module has been called lm_head since transformers 5.
    renames=((r"^embed_out\.", "lm_head."),),
    unused=(r"attention\.bias$", r"attention\.masked_bias$"),
)
