"""What a training step of prompts, prefixes, adaption prompts and routers costs over its floor, here and in PEFT.

    python examples/benchmarks/prompts.py --json prompts.json

A step is forward, backward and the AdamW update of what trains, on a small Llama; prompts and prefixes have 16 virtual
tokens, which are in the step and not in the floor. The floor is the same model with its weights frozen and nothing
trained but a shift of the first layer's q, k and v: the gradient passes every activation, and no product is adapted.
Each framework is divided by a floor of its own, run right beside each step; methods come in another order in each
round, those of both frameworks mixed. The table gives the median and the quartiles of that ratio in wall time, and its
median in CPU time, which other programs disturb less; what trains; and the size of `adapter_model.safetensors`.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

# PyTorch's threads would otherwise spin for a while after each of its steps, on the cores of JAX's next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
from _models import Shape, Variant
from _prompts_table import EXPERTS, TASKS, Method, config_of, expert_of, methods
from _rows import Pair, medians, paired, ratio
from _steps import Step, environment, jax_step
from tqdm import tqdm

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModelForCausalLM

SIDES = ("jpeft", "PEFT")
Report = dict[str, dict[str, Any]]  # {method: {side: what is known of it}}


def main() -> None:
    args = arguments()
    shape = Shape(args.width, args.width * 11 // 4, args.width // 64, args.layers, args.vocabulary)
    tokens = jax.random.randint(jax.random.key(1), (2, args.tokens // 2), 0, shape.vocabulary)
    makers: dict[str, Any] = {"jpeft": Jpeft(shape, tokens)}
    if not args.skip_torch:
        import _prompts_peft

        makers["PEFT"] = _prompts_peft.Peft(shape, tokens)
    table_of = methods(args.layers)
    chosen = {name: table_of[name] for name in args.methods or table_of}
    pairs, report = made(makers, chosen)
    for (side, name), seconds in paired(pairs, args.repeats).items():
        own, floor = zip(*seconds, strict=True)
        times = {"ms": medians(own), "floor_ms": medians(floor)}
        # Quartiles need two rounds.
        both = (own, floor) if len(own) > 1 else (own * 2, floor * 2)
        report[name][SIDES[side]].update(times, wall=ratio(*both), cpu=ratio(*both, 1))
    print(heading(args), table(report), sep="\n\n")
    if args.json:
        whole = {"environment": environment(), "options": vars(args), "methods": report}
        Path(args.json).write_text(json.dumps(whole, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = methods(1)
    parser.add_argument("--methods", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64; the MLP's is 2.75 times that")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, in two sequences")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--json", help="write the report to this file")
    return parser.parse_args()


class Jpeft:
    """Adapters on one Llama of `jpeft_interop`."""

    def __init__(self, shape: Shape, tokens: jax.Array) -> None:
        self._tokens, self._hidden = tokens, shape.hidden
        self._sizes = {
            "model_type": "llama",
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "tie_word_embeddings": False,
        }
        self._model = FlaxAutoModelForCausalLM.from_config(self._sizes, rng=jax.random.key(0))

    def floor(self) -> Step:
        """The shift of q, k and v is a bias, which Llama has if its config says so."""
        model = FlaxAutoModelForCausalLM.from_config({**self._sizes, "attention_bias": True}, rng=jax.random.key(0))
        leaves, structure = jax.tree_util.tree_flatten_with_path(model.params)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        own = [f"model.layers.0.self_attn.{letter}_proj.bias" for letter in "qkv"]
        places = {names.index(name): name for name in own}
        arrays = [leaf for _, leaf in leaves]

        def loss(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
            whole = [trainable[places[i]] if i in places else leaf for i, leaf in enumerate(frozen)]
            return model.apply(structure.unflatten(whole), input_ids=tokens, labels=tokens).loss

        trainable = {name: jnp.zeros_like(arrays[i]) for i, name in places.items()}
        return jax_step(Variant(trainable, arrays, loss), self._tokens).run

    def measured(self, method: Method) -> tuple[Step, dict[str, Any]]:
        """(step, {"trains": parameters, "file": bytes})."""
        with tempfile.TemporaryDirectory() as folder:
            adapted = jpeft_interop.get_peft_model(self._model, self._config(method, Path(folder)))
            adapted.save_pretrained(Path(folder) / "saved")
            size = (Path(folder) / "saved" / "adapter_model.safetensors").stat().st_size
        facts = {"trains": adapted.get_nb_trainable_parameters()[0], "file": size}
        trainable, frozen = jpeft.partition(adapted.params)
        loss = loss_of(self._model, {"task_ids": jnp.arange(self._tokens.shape[0]) % TASKS} if method.by_task else {})
        return jax_step(Variant(trainable, frozen, loss), self._tokens).run, facts

    def _config(self, method: Method, folder: Path) -> jpeft.PeftConfig:
        if method.config != "XLoraConfig":
            return config_of(jpeft, method)
        adapters = {}
        for number in range(EXPERTS):
            expert = jpeft_interop.get_peft_model(self._model, expert_of(jpeft), rng=jax.random.key(number))
            expert.save_pretrained(folder / str(number))
            adapters[str(number)] = str(folder / str(number))
        return config_of(jpeft, method, hidden_size=self._hidden, adapters=adapters)


def loss_of(model: Any, context: dict[str, Any]) -> Any:
    """The loss of a step, with noise and dropout as in training."""
    apply = jpeft.lift(model.apply)

    def loss(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        whole = jpeft.with_context(jpeft.combine(trainable, frozen), rng=jax.random.key(2), **context)
        (name,) = whole.active
        whole, batch = jpeft_interop.prepare_inputs(model, whole, {"input_ids": tokens, "labels": tokens})
        types = batch.pop("input_type_mask", None)
        if types is None:
            return apply(whole, **batch).loss
        labels = batch.pop("labels")
        return jpeft.cpt_loss(apply(whole, **batch).logits, labels, types, whole.adapters[name].config)

    return loss


def made(makers: dict[str, Any], chosen: dict[str, Method]) -> tuple[dict[tuple[int, str], Pair], Report]:
    floors = {side: maker.floor() for side, maker in makers.items()}
    report: Report = {name: {} for name in chosen}
    pairs: dict[tuple[int, str], Pair] = {}
    for name, method in (bar := tqdm(chosen.items(), desc="compiling")):
        bar.set_postfix_str(name)
        for side, maker in makers.items():
            step, report[name][side] = maker.measured(method)
            if step is not None:
                pairs[SIDES.index(side), name] = step, floors[side]
    return pairs, report


def heading(args: argparse.Namespace) -> str:
    sizes = {name: getattr(args, name) for name in ("width", "layers", "vocabulary", "tokens", "repeats")}
    return ", ".join(f"{name} {value}" for name, value in {**sizes, **environment()}.items())


def table(report: Report) -> str:
    columns = "method", "step / floor, jpeft", "PyTorch PEFT", "trains", "file"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, sides in report.items():
        ours, theirs = (sides.get(side, {}) for side in SIDES)
        trains = _both(ours, theirs, "trains", lambda count: f"{count:,}")
        file = _both(ours, theirs, "file", lambda size: f"{size / 1024:,.0f} KiB")
        lines.append(f"| {' | '.join([name, _ratio(ours), _ratio(theirs), trains, file])} |")
    return "\n".join(lines)


def _both(ours: dict[str, Any], theirs: dict[str, Any], what: str, text: Any) -> str:
    own, others = (text(side[what]) if what in side else None for side in (ours, theirs))
    return own or "" if others in (None, own) else f"{own}; PEFT {others}"


def _ratio(side: dict[str, Any]) -> str:
    if "wall" not in side:
        return side.get("why", "")
    middle, low, high = side["wall"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f}), CPU {side['cpu'][0]:.2f}"


if __name__ == "__main__":
    main()
