"""The order of modules in PyTorch models, in which PEFT counts layers and deals out what they share.

A parameter tree has no order of its own: JAX sorts the names. Methods whose modules depend on their places need the
order in which PyTorch registers them: numbers by value, and the parts of a block as models on the Hub list them.
Names alone do not tell XLM-RoBERTa, which has its heads before the encoder, from RoBERTa; nor RoBERTa without a head,
which has the types of tokens before their positions, from BERT. The order is that of RoBERTa and of BERT, then.
"""

import re
from collections.abc import Iterable

# Of the parts of one block.
_RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            ("text_model",),
            ("vision_model",),
            ("conv1",),
            ("conv2",),
            ("embeddings", "embed_tokens", "embed", "wte", "shared", "word_embeddings", "token_embedding", "embed_in"),
            ("token_type_embeddings after roberta",),
            ("patch_embeddings", "patch_embedding"),
            ("wpe", "embed_positions", "position_embeddings", "position_embedding"),
            ("token_type_embeddings",),
            ("project_out",),
            ("project_in", "embed_proj"),
            ("layers", "layer", "encoder", "transformer", "h", "block", "blocks"),
            ("rel_embeddings",),
            ("conv",),
            ("input_layernorm", "ln_1"),
            ("attention", "attn", "self_attn", "self_attention", "SelfAttention", "self"),
            ("encoder_attn", "EncDecAttention", "crossattention"),
            ("query_key_value", "c_attn", "query_proj"),
            ("q_proj", "query", "q", "q_lin"),
            ("k_proj", "key", "k", "k_lin", "key_proj"),
            ("v_proj", "value", "v", "v_lin", "value_proj"),
            ("q_proj after v_proj", "pos_key_proj"),
            ("pos_query_proj",),
            ("dense", "transform"),
            ("o_proj", "o", "out_lin"),
            ("qkv_proj",),
            ("out_proj", "relative_attention_bias"),
            ("mlp", "intermediate", "ffn", "DenseReluDense"),
            ("gate", "gate_proj", "gate_up_proj", "wi", "wi_0", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1", "w1"),
            ("experts",),
            ("up_proj", "wi_1"),
            ("output", "c_proj", "down_proj", "wo", "fc2", "fc_out", "dense_4h_to_h", "lin2", "w2"),
            ("decoder",),
            ("pooler", "w3"),
            ("visual_projection",),
            ("text_projection",),
            ("pre_classifier", "classification_head", "vocab_transform"),
            (
                "lm_head",
                "classifier",
                "score",
                "cls",
                "qa_outputs",
                "embed_out",
                "vocab_projector",
                "proj_out",
                "lm_predictions",
            ),
        ]
    )
    for name in names
}
_UNKNOWN, _HEADS = _RANKS["out_proj"] + 0.5, _RANKS["pooler"]

# The models with types of tokens, by the name under which a class with a head holds them.
_MODELS = {"bert", "deberta", "roberta"}

# Where attention lists the query after the value: OPT, BART, Whisper and CLIP; GPT-J and GPT-Neo.
_LATE_QUERY = re.compile(r"(^|\.)((encoder|decoder)\.layers|h)\.\d+\..*\.q_proj$")


def module_order(paths: Iterable[str]) -> list[str]:
    """Module paths in the order of the PyTorch model that they come from; of any part of its modules, too.

    Names that no table knows come between the parts of attention and the heads, by the alphabet.

    >>> module_order(["layers.10.q_proj", "layers.9.v_proj", "layers.9.q_proj", "layers.9.gate_proj"])
    ['layers.9.q_proj', 'layers.9.v_proj', 'layers.9.gate_proj', 'layers.10.q_proj']
    """
    return sorted(paths, key=lambda path: [_rank(path, name) for name in path.split(".")])


def uncertain(paths: Iterable[str]) -> list[list[str]]:
    """Groups of siblings, of which no table knows the order: it may be another in PyTorch.

    A head beside a name that is not known comes last, as in all models but XLM-RoBERTa.

    >>> uncertain(["bert.layers.0.q_proj", "bert.layers.0.v_proj", "classifier"]), uncertain(["left.up", "right.up"])
    ([], [['left', 'right']])
    """
    children: dict[str, dict[str, None]] = {}
    for path in paths:
        names = path.split(".")
        for count, name in enumerate(names):
            children.setdefault(".".join(names[:count]), {})[name] = None
    return [
        [f"{holder}.{name}" if holder else name for name in names]
        for holder, names in children.items()
        if _is_uncertain(holder, set(names))
    ]


def _is_uncertain(holder: str, names: set[str]) -> bool:
    names = {name for name in names if not name.isdigit()}
    ranks = [_rank(f"{holder}.{name}", name)[1] for name in names]
    unknown = _UNKNOWN in ranks and any(rank < _HEADS for rank in ranks if rank != _UNKNOWN)
    alike = len(set(ranks)) < len(ranks)
    types = {"position_embeddings", "token_type_embeddings"} <= names and not _MODELS & set(holder.split("."))
    return alike or unknown or types or ("roberta" in names and len(names) > 1)


def _rank(path: str, name: str) -> tuple[float, float, str]:
    if name.isdigit():
        return (0, int(name), "")
    if name == "q_proj" and _LATE_QUERY.search(path):
        name = "q_proj after v_proj"
    if name == "token_type_embeddings" and "roberta" in path.split("."):
        name = "token_type_embeddings after roberta"
    return (1, _RANKS.get(name, _UNKNOWN), name)
