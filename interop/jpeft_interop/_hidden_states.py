"""What X-LoRA asks of a model: its last hidden state."""

from typing import Any

import jax


def hidden_state_of(outputs: Any, class_name: str) -> jax.Array:
    """The last hidden state; raises TypeError for outputs without, as those of an encoder-decoder."""
    states = getattr(outputs, "hidden_states", None)
    if states is None:
        raise TypeError(
            f"X-LoRA weighs its experts by the last hidden state, and {class_name} gives no hidden_states; expected a "
            "decoder or an encoder of jpeft_interop.models, or jpeft.with_xlora_scalings(params, ...) before the call"
        )
    return states[-1]
