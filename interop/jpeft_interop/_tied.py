"""The tensors that PEFT writes for an output layer that is tied to the table, with `ensure_weight_tying`.

There the output layer has an adapter of its own, whose factors are those of the table the other way round; here it has
none, and the table's adapter acts on both uses.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft._contract import EMBEDDING, method_of
from jpeft._params import Adapter
from jpeft._paths import last_name, parent
from jpeft._tokens import INPUT_EMBEDDINGS

from ._family import Family

HEAD = "lm_head"
PREFIX = "base_model.model."

# With one of these a model has an output layer, or none that the table could be tied to.
HEADS = (HEAD, "embed_out", "score", "classifier", "qa_outputs")


def tied_tensors(
    arrays: Mapping[str, Any], adapter: Adapter, leaves: Mapping[str, Any], family: Family
) -> dict[str, np.ndarray]:
    """{key of the output layer: tensor} that follow from the tensors of the table in a file; none if it is not tied.

    arrays: {key: tensor} of the file. leaves: of the base tree.

    >>> import jpeft
    >>> from ._family import FAMILIES
    >>> leaves = {"model.embed_tokens.embedding": np.ones((9, 4), np.float32)}
    >>> config = jpeft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    >>> adapter = jpeft.wrap(leaves, config).adapters["default"]
    >>> arrays = {"base_model.model.model.embed_tokens.lora_embedding_B": np.ones((4, 2))}
    >>> {key: tensor.shape for key, tensor in tied_tensors(arrays, adapter, leaves, FAMILIES["hf"]).items()}
    {'base_model.model.lm_head.lora_A.weight': (2, 4)}
    """
    table = _tied_table(adapter, leaves)
    if table is None:
        return {}
    module = PREFIX + family.module(table)
    sources = {
        "lora_A.weight": ("lora_embedding_B", True),
        "lora_B.weight": ("lora_embedding_A", True),
        "base_layer.weight": ("base_layer.weight", False),
        "weight": ("weight", False),
        "trainable_tokens_delta": ("trainable_tokens_delta", False),
    }
    found = {}
    for name, (source, turned) in sources.items():
        if (tensor := arrays.get(f"{module}.{source}")) is not None:
            whole = np.asarray(tensor)
            found[f"{PREFIX}{HEAD}.{name}"] = whole.T if turned else whole
    return found


def _tied_table(adapter: Adapter, leaves: Mapping[str, Any]) -> str | None:
    """The module of the table that an adapter ties to the output layer, if it does and the model has no other."""
    holders = [parent(leaf) for leaf in leaves]
    headless = not any(name in HEADS for holder in holders for name in holder.split("."))
    rows = method_of(adapter.config).rows is not None
    if not (getattr(adapter.config, "ensure_weight_tying", False) or rows) or not headless:
        return None
    adapted = [path for path, site in adapter.sites.items() if site.kind == EMBEDDING]
    adapted += [part.site.path for part in adapter.rows.values()] if rows else []
    tables = [path for path in (*adapted, *map(parent, adapter.replaced)) if last_name(path) in INPUT_EMBEDDINGS]
    # The bare model without the class that predicts tokens has the table at its root.
    return next((path for path in tables if parent(path)), None)
