"""Activations by the names that configs of methods give them: those of transformers 5."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]

_exact = functools.partial(jax.nn.gelu, approximate=False)
_smooth = functools.partial(jax.nn.gelu, approximate=True)


def _xielu(x: jax.Array) -> jax.Array:
    # Its two weights, which transformers rounds to bfloat16, keep the values that they begin with.
    positive = 0.80078125 * x * x + 0.5 * x
    return jnp.where(x > 0, positive, (jnp.expm1(jnp.minimum(x, -1e-6)) - x) * 0.80078125 + 0.5 * x)


ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_python"), _exact),
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), _smooth),
    "gelu_10": lambda x: jnp.clip(_exact(x), -10, 10),
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    # Made anew for every use, so that its slope stays what it begins with.
    "prelu": functools.partial(jax.nn.leaky_relu, negative_slope=0.25),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
    "xielu": _xielu,
}
"""{name: function of an array, entry by entry}."""
