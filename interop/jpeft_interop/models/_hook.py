"""What acts around the layers of a decoder, beside their own computation, and carries a state of its own along."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from ._stack import Layer


@dataclass(frozen=True)
class Hook:
    """`x = before(own, x, state)` ahead of a layer, and `state = after(own, x, state)` behind it.

    `state`: what the first layer is given. `layers`: trees of arrays of single layers, by number, which are alike;
    around a layer that has none nothing happens. Of the layers in a stack all have some, or none has.
    """

    state: Any
    layers: Mapping[int, Any]
    before: Callable[[Any, jax.Array, Any], jax.Array]
    after: Callable[[Any, jax.Array, Any], Any]

    def around(self, layer: Layer) -> Layer:
        """The same layer of a pair `(x, state)`."""

        def call(module: Any, pair: tuple[jax.Array, Any], memory: Any, own: Any) -> tuple[Any, Any]:
            x, state = pair
            if own is None:
                x, memory = layer(module, x, memory, None)
                return (x, state), memory
            x, memory = layer(module, self.before(own, x, state), memory, None)
            return (x, self.after(own, x, state)), memory

        return call
