"""The quicktour of PEFT's documentation, in JAX: configure, wrap, train, save, load, generate. It needs no network.

Above the lines that differ stands, as a comment, what PyTorch's PEFT has. mt0-large is not at hand everywhere, so a
tiny model of the same family with random weights is made first. What it learns, to say of which sort an animal is,
says nothing about the method, but every step is the real one. Run: make quicktour
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jpeft
from jpeft import LoraConfig, TaskType
from jpeft_interop import AutoPeftModelForSeq2SeqLM, get_peft_model
from jpeft_interop.models import FlaxAutoModelForSeq2SeqLM

ANIMALS = {
    "bird": ["robin", "heron", "finch", "goose", "eagle", "raven", "stork", "crane"],
    "fish": ["trout", "perch", "tench", "bream", "guppy", "roach", "skate", "tetra"],
    "bug": ["midge", "louse", "aphid", "gnats", "wasps", "flies", "moths", "mites"],
}
PAD, END, FIRST = 0, 1, 3  # As in ByT5, a token is a byte, behind a few tokens with a meaning of their own.
LENGTH = 8


def tokens(text: str) -> list[int]:
    ids = [byte + FIRST for byte in text.encode()] + [END]
    return ids + [PAD] * (LENGTH - len(ids))


def words(ids: np.ndarray) -> str:
    return bytes(int(token) - FIRST for token in ids if token >= FIRST).decode(errors="replace")


def make_base_model(folder: Path) -> None:
    """A folder with a model in it, as the Hub would give it."""
    sizes = {
        "vocab_size": 256 + FIRST,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 2,
    }
    config = {"model_type": "mt5", **sizes, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    tokens = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD, "tie_word_embeddings": False}
    FlaxAutoModelForSeq2SeqLM.from_config({**config, **tokens}, rng=jax.random.key(0)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tour(Path(directory), args.steps, args.seed)


def tour(directory: Path, steps: int, seed: int) -> None:
    base_folder, adapter_folder = directory / "tiny-mt5", directory / "output"
    make_base_model(base_folder)

    # from peft import LoraConfig, TaskType
    # peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, ...)
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )

    # model = AutoModelForSeq2SeqLM.from_pretrained("bigscience/mt0-large")
    model = FlaxAutoModelForSeq2SeqLM.from_pretrained(base_folder)

    # model = get_peft_model(model, peft_config)
    # model.print_trainable_parameters()
    model = get_peft_model(model, peft_config, rng=jax.random.key(seed))
    model.print_trainable_parameters()

    # trainer = Trainer(model=model, args=training_args, train_dataset=...)
    # trainer.train()
    texts = [(animal, sort) for sort, animals in ANIMALS.items() for animal in animals]
    inputs = np.array([tokens(animal) for animal, _ in texts])
    labels = np.array([tokens(sort) for _, sort in texts])
    losses = train(model, inputs, labels, steps, seed)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    if steps >= 50 and losses[-1] >= losses[0]:
        raise SystemExit("the loss did not fall")

    # model.save_pretrained("output_dir")
    model.save_pretrained(adapter_folder)
    for file in sorted(adapter_folder.iterdir()):
        print(f"{file.name:28}{file.stat().st_size:>9,} bytes")

    # model = AutoPeftModelForSeq2SeqLM.from_pretrained("output_dir")
    # outputs = model.generate(input_ids=inputs["input_ids"], max_new_tokens=50)
    again = AutoPeftModelForSeq2SeqLM.from_pretrained(adapter_folder)
    given = {"input_ids": inputs, "attention_mask": inputs != PAD}
    outputs = again.generate(**given, max_new_tokens=LENGTH).sequences
    here = model.generate(**given, max_new_tokens=LENGTH).sequences
    right = [words(output) == sort for output, (_, sort) in zip(np.asarray(outputs), texts, strict=True)]
    same = "the same" if bool((outputs == here).all()) else "other"
    print(f"loaded again: {same} outputs as before, {sum(right)} of {len(texts)} right")
    for output, (animal, sort) in list(zip(np.asarray(outputs), texts, strict=True))[:: len(texts) // 3]:
        print(f"  {animal:8}-> {words(output):8}({sort})")

    # with model.disable_adapter(): ...
    with again.disable_adapter():
        unadapted = np.asarray(again.generate(**given, max_new_tokens=LENGTH).sequences)
    print(f"without the adapter: {sum(words(o) == s for o, (_, s) in zip(unadapted, texts, strict=True))} right")


def train(model, inputs: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> list[float]:
    """An ordinary loop over `model.params`, with `model.apply`, a pure function."""
    tx = optax.masked(optax.adamw(optax.linear_schedule(1e-2, 1e-3, steps)), jpeft.trainable_mask)
    opt_state = tx.init(model.params)
    shifted = np.concatenate([np.full_like(labels[:, :1], PAD), labels[:, :-1]], axis=1)
    weights = (labels != PAD).astype(np.float32)

    def loss_fn(params, key):
        params = jpeft.with_context(params, rng=key)  # The key is for lora_dropout.
        logits = model.apply(params, input_ids=inputs, attention_mask=inputs != PAD, decoder_input_ids=shifted).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return (weights * losses).sum() / weights.sum()

    @jax.jit
    def step(params, opt_state, key):
        loss, gradient = jpeft.value_and_grad(loss_fn)(params, key)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses, bar = [], tqdm(range(steps), unit="step")
    for number in bar:
        model.params, opt_state, loss = step(model.params, opt_state, jax.random.fold_in(jax.random.key(seed), number))
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
