"""Configs of smaller models of the same kind."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ._config import check_heads


@dataclass(frozen=True)
class Sizes:
    """Sizes of a smaller model; those that are None are the larger one's."""

    layers: int
    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None


def mirror_decoder(config: Any, sizes: Sizes) -> Any:
    """A `DecoderConfig` of these sizes. As in PEFT, heads keep their width, and those of the keys their number.

    Raises ValueError for a number of heads that the keys cannot be shared among.
    """
    heads = sizes.heads or config.num_attention_heads
    if heads % config.num_key_value_heads:
        raise ValueError(
            f"shadow_num_attention_heads is {heads}, which is no multiple of the model's num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    kinds, hidden = _first(config.layer_types, sizes.layers), sizes.hidden or config.hidden_size
    # Where there is one, it is the root of the width.
    scale = None if config.embedding_scale is None else config.embedding_scale * (hidden / config.hidden_size) ** 0.5
    return dataclasses.replace(
        config,
        num_hidden_layers=sizes.layers,
        hidden_size=hidden,
        embedding_scale=scale,
        num_attention_heads=heads,
        intermediate_size=sizes.intermediate or config.intermediate_size,
        layer_types=kinds,
        mlp_types=_first(config.mlp_types, sizes.layers),
        ropes=tuple((kind, rope) for kind, rope in config.ropes if kind in kinds),
    )


def mirror_divided(config: Any, sizes: Sizes) -> Any:
    """`mirror_decoder` for families whose heads divide the width, whatever it is; raises ValueError as that does.

    Raises ValueError, too, if they do not, and for heads of another width where the model rotates some features of a
    head alone, or each by a factor of its own.
    """
    hidden, heads = sizes.hidden or config.hidden_size, sizes.heads or config.num_attention_heads
    check_heads(hidden, heads)
    head_dim, ropes = hidden // heads, [rope for _, rope in config.ropes]
    if head_dim != config.head_dim and any(r.dim != config.head_dim or r.short_factor for r in ropes):
        raise ValueError(
            f"the shadow's {heads} heads would divide {hidden} features, and the rotary settings are for heads of "
            f"{config.head_dim}; expected shadow_hidden_size={heads * config.head_dim}, or another "
            "shadow_num_attention_heads"
        )
    if head_dim != config.head_dim:
        own = tuple((kind, dataclasses.replace(rope, dim=head_dim)) for kind, rope in config.ropes)
        config = dataclasses.replace(config, head_dim=head_dim, ropes=own)
    return mirror_decoder(config, sizes)


def mirror_gpt2(config: Any, sizes: Sizes) -> Any:
    """A `GPT2Config` of these sizes; the feed-forward blocks stay four times as wide, if they are.

    Raises ValueError for heads that do not divide the width.
    """
    hidden, heads = sizes.hidden or config.hidden_size, sizes.heads or config.num_attention_heads
    check_heads(hidden, heads)
    usual = config.intermediate_size == 4 * config.hidden_size
    return dataclasses.replace(
        config,
        num_hidden_layers=sizes.layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=sizes.intermediate or (4 * hidden if usual else config.intermediate_size),
    )


def _first(kinds: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The kinds of so many layers; more than there are of the kind of the last."""
    return (kinds + kinds[-1:] * count)[:count]
