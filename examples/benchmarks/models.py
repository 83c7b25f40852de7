"""The speed of jpeft_interop's models against transformers' PyTorch classes: same weights, same machine, one run.

    python examples/benchmarks/models.py

For a Llama of 100M parameters, BERT-base and T5-base with random weights, in float32: the forward pass, a training
step (loss, gradient and AdamW update of every parameter) and greedy generation; PyTorch eager and, but for generation,
by torch.compile. Before anything is timed, the outputs are compared. Each round runs every implementation once, in
random order. The table gives the time of jpeft over that of PyTorch in the same round (below 1: jpeft is faster), as
median and quartiles, and the ratio of medians in CPU time, which other programs disturb less.
"""

import argparse
import functools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# PyTorch's threads would otherwise spin for a while after each of its steps, on the cores of JAX's next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from tqdm import tqdm

from jpeft_interop.models import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSeq2SeqLM,
    FlaxModel,
)

Step = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Subject:
    """A model that is timed: how both sides make it, and what it is called with."""

    reference: Callable[[], Any]
    auto: Any
    inputs: Callable[[int, int], dict[str, np.ndarray]]
    generates: bool = True


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 30000, (batch, length))


def one_text(batch: int, length: int) -> dict[str, np.ndarray]:
    return {"input_ids": tokens(batch, length)}


def masked_text(batch: int, length: int) -> dict[str, np.ndarray]:
    return {"input_ids": tokens(batch, length), "attention_mask": np.ones((batch, length), np.int64)}


def two_texts(batch: int, length: int) -> dict[str, np.ndarray]:
    return {**masked_text(batch, length), "decoder_input_ids": tokens(batch, length, seed=1)}


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig())


def t5() -> Any:
    config = transformers.T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


SUBJECTS = {
    "Llama 100M": Subject(llama, FlaxAutoModelForCausalLM, one_text),
    "BERT-base": Subject(bert, FlaxAutoModelForMaskedLM, masked_text, generates=False),
    "T5-base": Subject(t5, FlaxAutoModelForSeq2SeqLM, two_texts),
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for name in args.only or SUBJECTS:
        for operation, steps in operations(SUBJECTS[name], args):
            times = timed(steps, args.repeats, f"{name}, {operation}")
            rows += [summary(name, operation, other, times) for other in steps if other != "jpeft"]
    report = {"environment": environment(), "options": vars(args), "rows": rows}
    print(table(report))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens a row, of each input")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--only", nargs="*", choices=SUBJECTS, help="models")
    parser.add_argument("--operations", nargs="*", default=["forward", "training step", "generate"])
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", help="write the report to this file")
    return parser.parse_args()


def operations(subject: Subject, args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    reference = subject.reference().eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = subject.auto.from_pretrained(folder)
    inputs = subject.inputs(args.batch, args.length)
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    compare(model, reference, inputs, given)
    compiled = {} if args.skip_compile else {"torch.compile": torch.compile(reference)}
    sides = {"PyTorch": reference, **compiled}
    if "forward" in args.operations:
        yield (
            "forward",
            {
                "jpeft": jax_forward(model, inputs),
                **{name: torch_forward(side, given) for name, side in sides.items()},
            },
        )
    if "generate" in args.operations and subject.generates:
        prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        yield (
            "generate",
            {
                "jpeft": jax_generate(model, prompt, args.new_tokens),
                "PyTorch": torch_generate(reference, prompt, args.new_tokens),
            },
        )
    if "training step" in args.operations:
        yield (
            "training step",
            {
                "jpeft": jax_training_step(model, inputs),
                **{name: torch_training_step(side, given) for name, side in sides.items()},
            },
        )


def compare(model: FlaxModel, reference: Any, inputs: Mapping[str, np.ndarray], given: Mapping[str, Any]) -> None:
    with torch.no_grad():
        expected = reference(**given).logits.numpy()
    actual = np.asarray(jax.jit(model.apply)(model.params, **inputs).logits)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"the logits differ by {error:.1e} of their scale"


def jax_forward(model: FlaxModel, inputs: Mapping[str, np.ndarray]) -> Step:
    apply = jax.jit(lambda params, inputs: model.apply(params, **inputs).logits)
    placed = jax.tree.map(jnp.asarray, dict(inputs))
    return lambda: apply(model.params, placed).block_until_ready()


def torch_forward(model: Any, given: Mapping[str, Any]) -> Step:
    def run() -> Any:
        with torch.no_grad():
            return model(**given).logits

    return run


def jax_training_step(model: FlaxModel, inputs: Mapping[str, np.ndarray]) -> Step:
    optimizer = optax.adamw(1e-5)
    placed = jax.tree.map(jnp.asarray, dict(inputs))

    def loss(params: Any, inputs: Any) -> jax.Array:
        labels = inputs.get("decoder_input_ids", inputs["input_ids"])
        logits = model.apply(params, **inputs).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, inputs: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, inputs)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), model.params)
    held = [params, optimizer.init(params)]

    def run() -> None:
        *held[:], value = step(*held, placed)
        jax.block_until_ready((held, value))

    return run


def torch_training_step(model: Any, given: Mapping[str, Any]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4)
    labels = given.get("decoder_input_ids", given["input_ids"])

    def run() -> None:
        logits = model(**given).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def jax_generate(model: FlaxModel, inputs: Mapping[str, np.ndarray], new_tokens: int) -> Step:
    placed = jax.tree.map(jnp.asarray, dict(inputs))
    return lambda: model.generate(
        model.params, **placed, max_new_tokens=new_tokens, eos_token_id=()
    ).sequences.block_until_ready()


def torch_generate(model: Any, inputs: Mapping[str, np.ndarray], new_tokens: int) -> Step:
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def run() -> Any:
        with torch.no_grad():
            return model.generate(**given, **options)

    return run


def timed(steps: Mapping[str, Step], repeats: int, title: str) -> dict[str, dict[str, list[float]]]:
    """Each step in each round, after one round that compiles and does not count."""
    order, shuffle = list(steps), random.Random(0).shuffle
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in steps} for clock in CLOCKS}
    for number in tqdm(range(repeats + 2), desc=title):
        shuffle(order)
        for name in order:
            starts = {clock: read() for clock, read in CLOCKS.items()}
            steps[name]()
            for clock, read in CLOCKS.items() if number > 1 else ():
                times[clock][name].append(read() - starts[clock])
    return times


def summary(model: str, operation: str, other: str, times: Any) -> dict[str, Any]:
    wall = [ours / theirs for ours, theirs in zip(times["wall"]["jpeft"], times["wall"][other], strict=True)]
    low, middle, high = statistics.quantiles(wall, n=4)
    cpu = statistics.median(times["cpu"]["jpeft"]) / statistics.median(times["cpu"][other])
    milliseconds = {name: 1000 * statistics.median(times["wall"][name]) for name in ("jpeft", other)}
    return {
        "model": model, "operation": operation, "other": other, "ratio": middle, "low": low, "high": high, "cpu": cpu,
        "ms": milliseconds["jpeft"], "other_ms": milliseconds[other],
    }  # fmt: skip


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def table(report: Mapping[str, Any]) -> str:
    options, known = report["options"], report["environment"]
    lines = [
        "",
        ", ".join(f"{name} {options[name]}" for name in ("batch", "length", "new_tokens", "repeats")),
        ", ".join(f"{name} {value}" for name, value in known.items()),
        "",
        "| model | operation | against | jpeft / PyTorch | quartiles | in CPU time | ms | ms of PyTorch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(
            f"| {row['model']} | {row['operation']} | {row['other']} | {row['ratio']:.2f} | {spread} | "
            f"{row['cpu']:.2f} | {row['ms']:.0f} | {row['other_ms']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
