"""How a model's parameters are split over a mesh whose axes are called "data", "fsdp" and "tp", by what they do.

Of a layer that widens the stream of activations, such as the projection to queries, the outputs are split over "tp";
of one that brings it back, such as the projection of the attention's result, the inputs: between the two each device
has heads, or hidden features, of its own. The other axis is split over "fsdp", and "data" splits no parameter.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from jpeft._paths import last_name, parent
from jpeft._specs import Rules, stack_of

DATA, FSDP, TENSOR = "data", "fsdp", "tp"

MEANINGS = (DATA, FSDP, TENSOR)
"""The mesh axes that these rules know."""


def has_meaning(mesh: Mesh) -> bool:
    """Whether all axes of a mesh are among those that these rules know."""
    return set(mesh.axis_names) <= set(MEANINGS)


@dataclass(frozen=True)
class Role:
    """What a layer does, as the mesh axes of the last axes of its weight, and that of its bias.

    `heads`: its features are those of attention heads, and "tp" splits them between heads alone; "key_value" for the
    fewer heads of keys and values.
    """

    weight: tuple[str | None, ...]
    bias: str | None = None
    heads: str | None = None


COLUMN = Role((FSDP, TENSOR), bias=TENSOR)
ROW = Role((TENSOR, FSDP))
QUERIES = dataclasses.replace(COLUMN, heads="all")
KEYS_VALUES = dataclasses.replace(COLUMN, heads="key_value")
ATTENTION_OUTPUT = dataclasses.replace(ROW, heads="all")
TABLE = Role((TENSOR, FSDP))
PLACES = Role((None, FSDP))
ALONE = Role((FSDP, None))
WINDOWS = Role((None, FSDP))
LOGITS = COLUMN
WHOLE = Role(())

ROLES: tuple[tuple[str, Role], ...] = (
    (r"\w*[nN]orm\w*|ln_\w+", WHOLE),
    (r"cls_token|mask_token|class_embedding|logit_scale|lambda1|relative_attention_bias", WHOLE),
    (r"embed_tokens|word_embeddings|token_embedding|shared|wte|embed_in", TABLE),
    (r"embed_positions|position_embeddings?|token_type_embeddings|rel_embeddings|wpe", PLACES),
    (r"final_logits_bias|cls\.predictions|lm_predictions\.lm_head|vocab_projector", LOGITS),
    (r"lm_head|lm_head\.decoder|predictions\.decoder|proj_out", LOGITS),
    (r"score|qa_outputs|classifier|pre_classifier|vocab_transform|(text|visual)_projection", ALONE),
    (r"(pooler|transform|lm_head|classifier|classification_head)\.(dense|out_proj)", ALONE),
    (r"embed_proj|project_in|project_out|mlp\.gate", ALONE),
    (r"patch_embeddings\.projection|patch_embedding|encoder\.conv\d|conv\.conv", WINDOWS),
    (r"q_proj|query|query_proj|pos_query_proj|pos_key_proj|q_lin|\w*Attention\.q", QUERIES),
    (r"c_attn|query_key_value|qkv_proj", QUERIES),
    (r"k_proj|v_proj|key|value|key_proj|value_proj|k_lin|v_lin|\w*Attention\.[kv]", KEYS_VALUES),
    (r"o_proj|\w*attn\.out_proj|attn\.c_proj|out_lin|\w*attention\.(output\.)?dense|\w*Attention\.o", ATTENTION_OUTPUT),
    (r"gate_proj|up_proj|gate_up_proj|fc1|c_fc|lin1|wi|wi_\d|intermediate\.dense|dense_h_to_4h|weights_in", COLUMN),
    (r"down_proj|fc2|mlp\.c_proj|lin2|wo|output\.dense|dense_4h_to_h|weights_out", ROW),
)
"""The role of a layer by the last names of its path; the first that fits counts."""


BIASES = ("bias", "final_logits_bias")


def role_of(path: str) -> Role | None:
    """The role of the layer that a parameter belongs to; None if the table does not know it.

    >>> role_of("model.layers.0:12.self_attn.k_proj.bias") == KEYS_VALUES, role_of("model.some.kernel")
    (True, None)
    """
    _, layer = stack_of(path)
    module = parent(layer) if last_name(layer) in ("kernel", "bias", "embedding", "scale") else layer
    return next((role for pattern, role in ROLES if re.search(rf"(^|\.)({pattern})$", module)), None)


def default_rules(mesh: Mesh, config: Any) -> Rules:
    """`(path, shape) -> spec` for the models of a config, over a mesh whose axes these rules know.

    An axis that does not divide into equal parts, or "tp" into whole heads, stays whole.
    """
    counts = {"all": math.gcd(*_heads(config)), "key_value": math.gcd(*_heads(config, key_value=True))}

    def rules(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        role = role_of(path)
        if role is None:
            return PartitionSpec()
        wanted = (role.bias,) if last_name(path) in BIASES else role.weight
        wanted = wanted[max(0, len(wanted) - len(shape)) :]
        entries: list[Any] = [None] * (len(shape) - len(wanted))
        for size, name in zip(shape[len(entries) :], wanted, strict=True):
            whole = role.heads is not None and name == TENSOR and counts[role.heads] % mesh.shape.get(TENSOR, 1)
            entries.append(None if name not in mesh.axis_names or size % mesh.shape[name] or whole else name)
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    return rules


def _heads(config: Any, *, key_value: bool = False) -> Iterator[int]:
    """The numbers of heads that a config gives, also those of its towers; of keys and values where they differ."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    key_values = fields.get("num_key_value_heads")
    for name, value in fields.items():
        if dataclasses.is_dataclass(value):
            yield from _heads(value, key_value=key_value)
        elif name in ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"):
            yield key_values if key_value and key_values is not None else value
