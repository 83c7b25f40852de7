"""What lifting costs while a function is traced: the time to trace it lifted, over the time to trace it plain.

A 12-layer transformer in plain jax.numpy, LoRA on all seven projections of each layer; medians of repeats, no
compilation. Run: python examples/benchmarks/trace_cost.py [layers]
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

import jpeft

WIDTH, HEADS, HIDDEN, VOCABULARY, TOKENS, REPEATS = 64, 4, 128, 256, 16, 9


def layer_shapes():
    square = {"kernel": (WIDTH, WIDTH)}
    return {
        **dict.fromkeys(("q", "k", "v", "o"), square),
        **dict.fromkeys(("gate", "up"), {"kernel": (WIDTH, HIDDEN)}),
        "down": {"kernel": (HIDDEN, WIDTH)},
        "norm1": {"scale": (WIDTH,)},
        "norm2": {"scale": (WIDTH,)},
    }


def normalized(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def attention(p, x):
    def split(y):
        return y.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)

    q, k, v = (split(x @ p[name]["kernel"]) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(WIDTH // HEADS)
    masked = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(masked), v).reshape(x.shape) @ p["o"]["kernel"]


def apply(params, ids):
    x = params["embed"]["embedding"][ids]
    for p in params["layers"]:
        x = x + attention(p, normalized(x, p["norm1"]["scale"]))
        h = normalized(x, p["norm2"]["scale"])
        x = x + (jax.nn.silu(h @ p["gate"]["kernel"]) * (h @ p["up"]["kernel"])) @ p["down"]["kernel"]
    return x @ params["embed"]["embedding"].T


def median_time(function, *args):
    def once():
        start = time.perf_counter()
        # A new function each time, so that no cache answers.
        jax.make_jaxpr(lambda *args: function(*args))(*args)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(REPEATS))


def main(layers):
    shapes = {"embed": {"embedding": (VOCABULARY, WIDTH)}, "layers": [layer_shapes() for _ in range(layers)]}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    ids = jax.ShapeDtypeStruct((2, TOKENS), jnp.int32)
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=8, target_modules=["q", "k", "v", "o", "gate", "up", "down"]))
    lifted = jpeft.lift(apply)

    def loss(function):
        return lambda params, ids: jnp.mean(function(params, ids) ** 2)

    rows = {
        "forward": (median_time(apply, params, ids), median_time(lifted, wrapped, ids)),
        "gradient": (
            median_time(jax.value_and_grad(loss(apply)), params, ids),
            median_time(jpeft.value_and_grad(loss(lifted)), wrapped, ids),
        ),
    }
    print(f"{layers} layers, JAX {jax.__version__}")
    for name, (plain, own) in rows.items():
        print(f"{name:9} plain {1e3 * plain:7.1f} ms   lifted {1e3 * own:7.1f} ms   ratio {own / plain:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
