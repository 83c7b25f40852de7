"""What PEFT writes besides the adapter itself: embeddings of the base, untrained biases, tensors under a second name.

A file that comes from PEFT has them, so they are read; a file that was read is written with the same keys; and a
file that is written here for the first time has those that PEFT, reading it, does not report as unexpected.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jpeft._config import TunerConfig
from jpeft._params import Adapter
from jpeft._paths import BIAS_NAMES, last_name, parent
from jpeft._targets import saved_modules

from ._family import Family
from ._keys import PREFIX

# The names by which PEFT knows an embedding and an output layer.
EMBEDDINGS = ("embed_tokens", "lm_head")

# All names of input embeddings and of output layers in `transformers`' models that are here.
INPUTS = ("embed_tokens", "word_embeddings", "wte", "shared", "embed_in")
OUTPUTS = ("lm_head", "embed_out")

_SECOND = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<rest>.+\.)?bias")


def written_embeddings(adapter: Adapter) -> list[str]:
    """The leaves of adapted embeddings and output layers whose base weights PEFT writes beside the adapter's.

    It does so if a list of targets names one of them as such, or if a regular expression means one.
    """
    targets = getattr(adapter.config, "target_modules", None) or ()
    if getattr(adapter.config, "trainable_token_indices", None) is not None:
        return []  # whose point is a small file
    adapted = [site.leaf for path, site in adapter.sites.items() if last_name(path) in EMBEDDINGS]
    if isinstance(targets, str) or any(name in targets for name in EMBEDDINGS):
        return [leaf for leaf in adapted if leaf not in adapter.replaced]
    return []


def chosen_embeddings(
    adapter: Adapter, leaves: Mapping[str, Any], save_embedding_layers: bool | Literal["auto"]
) -> list[str]:
    """The leaves of embeddings and output layers whose base weights are to be written; raises ValueError."""
    if save_embedding_layers == "auto":
        return written_embeddings(adapter)
    if not isinstance(save_embedding_layers, bool):
        raise ValueError(f"save_embedding_layers is {save_embedding_layers!r}; expected True, False or 'auto'")
    if not save_embedding_layers:
        return []
    named = [leaf for leaf in leaves if last_name(parent(leaf)) in (*INPUTS, *OUTPUTS)]
    return [leaf for leaf in named if leaf not in adapter.replaced]


def possible_embeddings(leaves: Mapping[str, Any]) -> list[str]:
    """Leaves that a file may hold in full without its config saying so, as PEFT writes embeddings that were resized."""
    matrices = [path for path, leaf in leaves.items() if len(getattr(leaf, "shape", ())) == 2]
    return [path for path in matrices if "embed" in last_name(path) or last_name(parent(path)) in OUTPUTS]


def original_biases(adapter: Adapter, family: Family) -> dict[str, str]:
    """{key: leaf path} of the biases that bias="all" makes PEFT write although a module to save replaces them.

    >>> from ._family import FAMILIES
    >>> import jpeft, jax.numpy as jnp
    >>> params = {"query": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> config = jpeft.LoraConfig(target_modules=["query"], modules_to_save=["head"], bias="all")
    >>> original_biases(jpeft.wrap(params, config).adapters["default"], FAMILIES["hf"])
    {'base_model.model.head.original_module.bias': 'head.bias'}
    """
    config, found = adapter.config, {}
    if not isinstance(config, TunerConfig) or config.bias != "all":
        return {}
    for path in adapter.replaced:
        names = path.split(".")
        holders = [".".join(names[:count]) for count in range(1, len(names))]
        if last_name(path) in BIAS_NAMES and (saved := saved_modules(holders, config)):
            inner = names[len(saved[0].split(".")) : -1]
            key = ".".join([family.module(saved[0]), "original_module", *inner, family.leaf(names[-1])])
            found[PREFIX + key] = path
    return found


def second_names(keys: Iterable[str], family: Family) -> dict[str, str]:
    """{second key: key} for those of a file's tensors that the PyTorch model knows by two names."""
    keys, pairs = set(keys), [*family.tied, *(pair[::-1] for pair in family.tied)]
    return {PREFIX + second: PREFIX + first for first, second in pairs if PREFIX + first in keys}


def tied_copies(tensors: Iterable[str], whole: Iterable[str]) -> dict[str, str]:
    """{key of an output layer: key of the table} where a file holds the table in full and, tied to it, the layer.

    whole: keys of the weights that the model has itself.

    >>> tied_copies(["m.lm_head.weight", "m.wte.weight"], ["m.wte.weight"])
    {'m.lm_head.weight': 'm.wte.weight'}
    """
    names, own = list(tensors), set(whole)
    module = {name: name.removesuffix(".weight").split(".")[-1] for name in names if name.endswith(".weight")}
    tables = [name for name in module if name in own and module[name] in INPUTS]
    heads = [name for name in module if name not in own and module[name] in OUTPUTS]
    return {head: tables[0] for head in heads if len(tables) == 1}


def first_name(key: str, keys: Iterable[str]) -> str | None:
    """The key of the tensor that PEFT wrote once more as this one, if it did: biases of modules saved in full.

    >>> first_name("base_model.model.head.modules_to_save.bias", ["base_model.model.head.bias"])
    'base_model.model.head.bias'
    """
    found = _SECOND.fullmatch(key)
    if found is None:
        return None
    rest = found["rest"] or ""
    # Inside a module of modules the name of the adapter is still there.
    possible = (f"{found['module']}.{inner}bias" for inner in (rest, rest.partition(".")[2]))
    return next((name for name in possible if name in keys), None)
