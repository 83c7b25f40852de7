"""Prompt tuning (Lester et al., 2021, https://arxiv.org/abs/2104.08691).

    input = [P; E[tokens]],   P (n, dim) trained, E the model's table of tokens

`prompt_embeddings (n submodules, dim)`. The prompt is n more rows of the vocabulary, which are looked up with the
tokens of the text; of an encoder-decoder's 2 n rows the first n are used, as in PEFT. Costs n dim parameters, and n
more tokens in every layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._begin import Beginning, Tree
from .._config import PeftType, PromptLearningConfig
from .._contract import Arrays, beside, fold_in_name, register
from ._prompts import OF_TEXT, as_begun, check_text, checked_sizes, repeated_ids, token_rows

RANDOM, TEXT, SAMPLE_VOCAB = "RANDOM", "TEXT", "SAMPLE_VOCAB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """How the prompt begins; PEFT's fields and defaults.

    prompt_tuning_init: "RANDOM" normal numbers, "SAMPLE_VOCAB" rows of the table drawn at random, "TEXT" the rows of a
    text's tokens, repeated or cut to the prompt's length. prompt_tuning_init_text, tokenizer_name_or_path,
    tokenizer_kwargs: of that text; `jpeft_interop.get_peft_model` reads the tokenizer. prompt_tuning_init_ids: the
    text's tokens themselves, in place of both; files do not hold them.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> adapter = jpeft.wrap(params, PromptTuningConfig(num_virtual_tokens=2)).adapters["default"]
    >>> adapter.shared["prompt_embeddings"].shape, adapter.config.token_dim
    ((2, 4), 4)
    """

    peft_type: PeftType | None = PeftType.PROMPT_TUNING
    prompt_tuning_init: str = RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None
    prompt_tuning_init_ids: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in (RANDOM, TEXT, SAMPLE_VOCAB):
            raise ValueError(
                f"prompt_tuning_init is {self.prompt_tuning_init!r}; expected {RANDOM!r}, {TEXT!r} or {SAMPLE_VOCAB!r}"
            )
        check_text(self)


def begin(key: jax.Array, tree: Tree, config: PromptTuningConfig) -> Beginning:
    site = tree.token_table()
    config = checked_sizes(config, site)
    shared = {"prompt_embeddings": initial_rows(key, tree, config)}
    return Beginning(as_begun(config, {TEXT: OF_TEXT}), sites={site.path: site}, shared=shared)


def initial_rows(key: jax.Array, tree: Tree, config: Any) -> jax.Array:
    """The prompt as `prompt_tuning_init` says: (n submodules, dim)."""
    site, count = tree.token_table(), config.num_virtual_tokens * config.submodules
    if config.inference_mode or config.prompt_tuning_init not in (TEXT, SAMPLE_VOCAB):
        return jax.random.normal(fold_in_name(key, "prompt_embeddings"), (count, config.token_dim))
    if config.prompt_tuning_init == SAMPLE_VOCAB:
        ids = jax.random.randint(fold_in_name(key, "prompt_tokens"), (count,), 0, site.in_features)
        return token_rows(tree, site, ids, config.embedding_scale)
    if config.prompt_tuning_init_ids is None:
        raise ValueError(
            "prompt_tuning_init is 'TEXT', and jpeft reads no tokenizer; expected prompt_tuning_init_ids, the text's "
            "tokens, or jpeft_interop.get_peft_model, which reads it"
        )
    ids = jnp.asarray(repeated_ids(config.prompt_tuning_init_ids, count, site))
    return token_rows(tree, site, ids, config.embedding_scale)


def prompt(p: Arrays, config: PromptTuningConfig, context: Mapping[str, Any]) -> jax.Array:
    return p["prompt_embeddings"]


PROMPT_TUNING = register(beside(what="a prompt", config=PromptTuningConfig, begin=begin, prompt=prompt))
