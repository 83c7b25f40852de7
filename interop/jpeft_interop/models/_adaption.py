"""Adaption prompts (LLaMA-Adapter) as an input of a decoder: the layer that each is for, and what attention adds."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft._adaption import ADAPTION_PROMPTS, adaption_attention
from jpeft._stacks import layer_paths

from ._family import Family
from ._leaves import Leaf

Prompt = Mapping[str, jax.Array]
"""`adaption_prompt (1, n, hidden)` and `adaption_gate (1,)` of one attention, as PEFT's files have them."""

TAKERS = "gpt2, llama, mistral"
"""The families whose attention takes adaption prompts: those that PEFT has them for."""


def attentions(leaves: Mapping[str, Leaf], name: str) -> dict[str, int]:
    """The paths of the layers' attention modules, which have this name, and the layers' numbers."""
    found: dict[str, int] = {}
    for leaf in leaves:
        place = re.match(rf"(?:.*\.)?\d+(?::\d+)*\.{name}(?=\.)", leaf)
        if place is not None:
            for path in layer_paths(place[0]) or [place[0]]:
                found[path] = int(path.split(".")[-2])
    return found


def check_takes_prompts(family: Family) -> str:
    """The name of a layer's attention; raises TypeError for a family whose attention takes no prompts."""
    if family.adapted_attention is None:
        raise TypeError(
            f"the attention of a {family.model_type} model takes no adaption prompts; expected a model of: {TAKERS}"
        )
    return family.adapted_attention


def by_layer(given: Mapping[str, Prompt], leaves: Mapping[str, Leaf], family: Family, config: Any) -> dict[int, Prompt]:
    """The prompts of a model, of these parameters, family and config, by the numbers of their layers.

    Raises TypeError for a family whose attention takes none, ValueError for a path that is no layer's attention, and
    for arrays of other names or shapes.
    """
    known = attentions(leaves, check_takes_prompts(family))
    if unknown := [path for path in given if path not in known]:
        raise ValueError(
            f"{ADAPTION_PROMPTS} are for {', '.join(unknown)}; expected the attention of layers: {', '.join(known)}"
        )
    hidden = config.hidden_size
    length = max((jnp.size(prompt.get("adaption_prompt", 0)) for prompt in given.values()), default=0) // hidden
    expected = {"adaption_prompt": (1, length, hidden), "adaption_gate": (1,)}
    for path, prompt in given.items():
        shapes = {name: jnp.shape(array) for name, array in prompt.items()}
        if shapes != expected:
            raise ValueError(
                f"{ADAPTION_PROMPTS} of {path} have the shapes {shapes}; expected {expected}: rows of the model's "
                "width, as many in every layer, and one gate"
            )
    return {known[path]: prompt for path, prompt in given.items()}


def with_prompts(given: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """The input by its name, as arrays, if there are prompts."""
    return {} if not given else {ADAPTION_PROMPTS: jax.tree.map(jnp.asarray, given)}


def attend_to_prompt(
    prompt: Prompt, query: jax.Array, project: Callable[[jax.Array], Sequence[jax.Array]]
) -> jax.Array:
    """What a prompt adds to the attention of `query (batch, length, heads, head_dim)`, the heads joined.

    `project`: the attention's projections to keys and values, `(1, n, hidden) -> (1, n, kv_heads, head_dim)` each.
    """
    key, value = project(prompt["adaption_prompt"].astype(query.dtype))
    added = adaption_attention(query, key, value, prompt["adaption_gate"])
    return added.reshape(*added.shape[:-2], -1)
