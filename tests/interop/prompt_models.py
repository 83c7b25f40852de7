"""Tiny random models of every kind for which PEFT learns prompts, twice: in PyTorch, and as a folder read by ours."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

import jpeft_interop
from jpeft_interop import models
from tests.interop.test_round_trip import quietly, randomise

VOCABULARY, PAD, EOS = 40, 1, 2
ROWS, LENGTH = 3, 6
TOLERANCE = 1e-4

DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "eos_token_id": EOS,
    "bos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "scale_embedding": True, "decoder_start_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD,
    "bos_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
BERT = {name: value for name, value in DECODER.items() if name != "eos_token_id"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model: its config, its classes on both sides, and the task of PEFT."""

    config: Callable[[], Any]
    theirs: str
    ours: str
    task: str


def _llama() -> Any:
    return transformers.LlamaConfig(**DECODER, num_key_value_heads=2)


def _gemma() -> Any:
    return transformers.GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=4)


KINDS = {
    "llama": Kind(_llama, "LlamaForCausalLM", "FlaxAutoModelForCausalLM", "CAUSAL_LM"),
    "gemma": Kind(_gemma, "GemmaForCausalLM", "FlaxAutoModelForCausalLM", "CAUSAL_LM"),
    "gpt2": Kind(lambda: transformers.GPT2Config(**GPT2), "GPT2LMHeadModel", "FlaxAutoModelForCausalLM", "CAUSAL_LM"),
    "opt": Kind(
        lambda: transformers.OPTConfig(**DECODER, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
        "OPTForCausalLM",
        "FlaxAutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "t5": Kind(
        lambda: transformers.T5Config(**T5),
        "T5ForConditionalGeneration",
        "FlaxAutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    "bart": Kind(
        lambda: transformers.BartConfig(**BART),
        "BartForConditionalGeneration",
        "FlaxAutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    "bert, sequences": Kind(
        lambda: transformers.BertConfig(**BERT, num_labels=3),
        "BertForSequenceClassification",
        "FlaxAutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    "bert, tokens": Kind(
        lambda: transformers.BertConfig(**BERT, num_labels=3),
        "BertForTokenClassification",
        "FlaxAutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
    "bert, answers": Kind(
        lambda: transformers.BertConfig(**BERT),
        "BertForQuestionAnswering",
        "FlaxAutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    "bert, features": Kind(
        lambda: transformers.BertConfig(**BERT), "BertModel", "FlaxAutoModelForFeatureExtraction", "FEATURE_EXTRACTION"
    ),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model twice, with the same weights; `theirs` is copied before PEFT wraps it."""

    kind: Kind
    theirs: Any
    ours: Any
    folder: Path

    def with_peft(self, config: Any, seed: int = 3) -> Any:
        """PEFT's model with an adapter of this config, whose arrays, and those of heads, are random."""
        model = quietly(peft.get_peft_model, copy.deepcopy(self.theirs), config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        return model


def pair_of(name: str, folder: Path) -> Pair:
    kind, folder = KINDS[name], folder / "base"
    model = randomise(getattr(transformers, kind.theirs)(kind.config()), 0).eval()
    model.save_pretrained(folder)
    return Pair(kind, model, getattr(models, kind.ours).from_pretrained(folder), folder)


def inputs(kind: Kind, *, padded: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch without labels, with rows padded on the right."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, VOCABULARY, (ROWS, LENGTH))
    mask = np.ones_like(ids)
    if padded:
        for row, length in enumerate((LENGTH, LENGTH - 2, LENGTH - 3)):
            ids[row, length:], mask[row, length:] = PAD, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind.task == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = random.integers(3, VOCABULARY, (ROWS, 4))
    # PEFT drops them in the other tasks, as soon as there is a prompt.
    if kind.task in ("SEQ_CLS", "TOKEN_CLS"):
        batch["token_type_ids"] = random.integers(0, 2, (ROWS, LENGTH))
    return batch


def labels(kind: Kind, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    if kind.task == "SEQ_CLS":
        return {"labels": random.integers(0, 3, ROWS)}
    if kind.task == "TOKEN_CLS":
        return {"labels": random.integers(0, 3, (ROWS, LENGTH))}
    if kind.task == "QUESTION_ANS":
        return {name: random.integers(0, 3, ROWS) for name in ("start_positions", "end_positions")}
    if kind.task == "SEQ_2_SEQ_LM":
        return {"labels": random.integers(3, VOCABULARY, (ROWS, 4))}
    return {"labels": np.where(inputs(kind)["attention_mask"] == 1, inputs(kind)["input_ids"], -100)}


def torch_inputs(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.tensor(value) for name, value in batch.items()}


def output_of(outputs: Any) -> np.ndarray:
    """What both sides return for the input: logits, or of the tasks without one, what stands for them."""
    for name in ("logits", "start_logits", "last_hidden_state"):
        value = getattr(outputs, name, None)
        if value is not None:
            return np.asarray(value.detach().numpy() if hasattr(value, "detach") else value)
    raise AssertionError(f"no output in {outputs}")


def their_output(model: Any, batch: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    with torch.no_grad():
        return output_of(quietly(model, **torch_inputs(batch), **options))


def assert_close(got: Any, want: np.ndarray, mask: np.ndarray | None = None) -> None:
    """mask: of the tokens (rows, length); places before the text are compared, too."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    difference = np.abs(got - want)
    if mask is not None and got.ndim >= 2 and got.shape[1] >= mask.shape[1]:
        before = np.ones((mask.shape[0], got.shape[1] - mask.shape[1]), bool)
        difference = difference[np.concatenate([before, mask != 0], axis=1)]
    assert difference.max() <= TOLERANCE * max(1.0, np.abs(want).max()), difference.max()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_files(first: Path, second: Path) -> None:
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        np.testing.assert_array_equal(one[key], other[key])


def loaded(pair: Pair, folder: Path, **options: Any) -> Any:
    """Our face with the adapter of a folder."""
    return jpeft_interop.PeftModel.from_pretrained(pair.ours, folder, **options)


def loaded_by_peft(pair: Pair, folder: Path) -> Any:
    return quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.theirs), folder).eval()


def visible(kind: Kind, batch: dict[str, np.ndarray]) -> np.ndarray | None:
    """The mask of the outputs' places, where they are the input's."""
    return None if kind.task in ("SEQ_2_SEQ_LM", "SEQ_CLS") else batch["attention_mask"]


def check_both_ways(pair: Pair, config: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    """PEFT's folder read by us, ours read by PEFT: outputs for a padded batch, keys and bytes. Returns (theirs, ours).

    options: of a call, such as task_ids, as numpy arrays.
    """
    theirs = pair.with_peft(config)
    quietly(theirs.save_pretrained, folder / "theirs")
    batch = inputs(pair.kind)
    want = their_output(theirs, batch, **torch_inputs(options))
    ours = loaded(pair, folder / "theirs")
    mask = visible(pair.kind, batch)
    assert_close(output_of(ours(**batch, **options)), want, mask)
    ours.save_pretrained(folder / "ours")
    assert_same_files(folder / "theirs", folder / "ours")
    configs = [json.loads((folder / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]
    again = loaded_by_peft(pair, folder / "ours")
    assert_close(their_output(again, batch, **torch_inputs(options)), want, mask)
    unwrapped = their_output(pair.theirs, batch)
    base = output_of(pair.ours.apply(pair.ours.params, **{name: jnp.asarray(value) for name, value in batch.items()}))
    assert_close(base, unwrapped, batch["attention_mask"] if mask is not None else None)
    return theirs, ours


def check_generation(pair: Pair, theirs: Any, ours: Any, **options: Any) -> None:
    """Greedy tokens for rows of one length; PEFT counts padding before a text as a part of the prompt."""
    ids = inputs(pair.kind, padded=False)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        want = quietly(
            theirs.generate, input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long),
            **settings, **torch_inputs(options),
        ).numpy()  # fmt: skip
    got = np.asarray(ours.generate(input_ids=ids, max_new_tokens=5, **options).sequences)
    got = got[:, : want.shape[1]]
    np.testing.assert_array_equal(got, want)
