"""X-LoRA in generation: each token goes through the model twice, and each run of it has a cache of its own.

PEFT turns the cache off and makes all hidden states, scalings and logits anew for each token. As a token's scalings
hang on no later token, they are the same with caches.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax

import jpeft
from jpeft import PeftParams
from jpeft._xlora import router_of

from .._hidden_states import hidden_state_of
from ._decoding import Network


def in_two_runs(run: Callable[..., Any], params: Any, class_name: str) -> Network:
    """The network with these parameters: `run(params, **inputs)`, or both runs if an X-LoRA adapter is active.

    Raises TypeError for outputs without hidden states.
    """
    if not isinstance(params, PeftParams) or router_of(params) is None:
        return partial(run, params)

    def network(**given: Any) -> Any:
        cache, before = given.pop("past_key_values", None), list[Any]()
        first = {} if cache is None else {"past_key_values": cache.before}
        second = {} if cache is None else {"past_key_values": replace(cache, before=None)}

        def last_hidden_state(own: PeftParams) -> jax.Array:
            outputs = run(own, **given, **first, output_hidden_states=True)
            before.append(outputs.past_key_values)
            return hidden_state_of(outputs, class_name)

        outputs = run(jpeft.with_xlora_scalings(params, last_hidden_state), **given, **second)
        return replace(outputs, past_key_values=replace(outputs.past_key_values, before=before[0]))

    return network
