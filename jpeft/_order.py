"""The order of modules in PyTorch models, in which PEFT counts layers and deals out what they share.

A parameter tree has no order of its own: JAX sorts the names. Methods whose modules depend on their places need the
order in which PyTorch registers them: numbers by value, and the parts of a block as models on the Hub list them.
"""

from collections.abc import Iterable

from ._paths import parent

# Of the parts of one block. Where the output projection is called `out_proj`, models list the query after the value.
_RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            ("embeddings", "embed_tokens", "wte", "shared", "word_embeddings"),
            ("patch_embeddings", "patch_embedding", "wpe", "embed_positions", "position_embeddings"),
            ("token_type_embeddings",),
            ("layers", "layer", "encoder", "h", "block", "blocks"),
            ("decoder",),
            ("input_layernorm", "ln_1"),
            ("attention", "attn", "self_attn", "self_attention", "SelfAttention", "self"),
            ("encoder_attn", "EncDecAttention", "crossattention"),
            ("query_key_value", "c_attn", "qkv_proj", "query_proj"),
            ("q_proj", "query", "q", "q_lin"),
            ("k_proj", "key", "k", "k_lin", "key_proj"),
            ("v_proj", "value", "v", "v_lin", "value_proj"),
            ("q_proj after v_proj",),
            ("o_proj", "out_proj", "o", "out_lin"),
            ("mlp", "intermediate", "ffn", "DenseReluDense"),
            ("gate", "gate_proj", "gate_up_proj", "wi", "wi_0", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1", "w1"),
            ("experts",),
            ("up_proj", "wi_1"),
            ("output", "c_proj", "down_proj", "wo", "fc2", "fc_out", "dense_4h_to_h", "lin2", "w2"),
            ("pooler", "w3"),
            ("lm_head", "classifier", "score", "cls", "qa_outputs", "embed_out"),
        ]
    )
    for name in names
}


def module_order(paths: Iterable[str]) -> list[str]:
    """Module paths in the order of the PyTorch model that they come from.

    Names that no table knows come between the parts of attention and the heads, by the alphabet.

    >>> module_order(["layers.10.q_proj", "layers.9.v_proj", "layers.9.q_proj", "layers.9.gate_proj"])
    ['layers.9.q_proj', 'layers.9.v_proj', 'layers.9.gate_proj', 'layers.10.q_proj']
    """
    paths = list(paths)
    out_projections = {parent(path) for path in paths if path.endswith("out_proj")}
    return sorted(paths, key=lambda path: [_rank(path, name, out_projections) for name in path.split(".")])


def _rank(path: str, name: str, late_query: set[str]) -> tuple[float, float, str]:
    if name.isdigit():
        return (0, int(name), "")
    late = name == "q_proj" and parent(path) in late_query
    return (1, _RANKS.get("q_proj after v_proj" if late else name, 13.5), name)
