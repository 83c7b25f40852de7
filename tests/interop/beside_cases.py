"""The table of methods that change no weight of their own choosing: prompts, prefixes, side networks, routers.

A row a method, on tiny language models with the classes and inputs of `jpeft_interop`; a new method is one row of
BESIDE. What adapts weights by target_modules is in tests/cases.py.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModelForCausalLM
from tests.harness import random_like

VOCABULARY, PROMPT = 17, 3
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 8, "max_position_embeddings": 24,
}  # fmt: skip
IDS = np.array([[1, 5, 3, 7], [2, 9, 11, 4]], np.int32)
BATCH = {"input_ids": IDS, "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]), "labels": IDS}
VISIBLE = BATCH["attention_mask"] != 0

EXPERTS = {"0": {"r": 2, "target_modules": ["q_proj"]}, "1": {"r": 3, "target_modules": ["q_proj"]}}


@dataclasses.dataclass(frozen=True)
class Beside:
    """One method. file: in jpeft/methods. options: of its config. context: what `with_context` has to bring for two
    rows. neutral: whether a fresh adapter changes nothing. still: parts of the paths of arrays that train and have no
    effect on the outputs. experts: whether adapters have to be there before.
    """

    name: str
    file: str
    config: Any
    options: Mapping[str, Any]
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neutral: bool = False
    still: tuple[str, ...] = ()
    experts: bool = False

    def built(self, **more: Any) -> Any:
        return self.config(**{"task_type": "CAUSAL_LM", **self.options, **more})


TASKS = {"task_ids": (1, 0)}

BESIDE = (
    Beside("prompt tuning", "prompt_tuning.py", jpeft.PromptTuningConfig, {"num_virtual_tokens": PROMPT}),
    Beside(
        "p-tuning, MLP",
        "p_tuning.py",
        jpeft.PromptEncoderConfig,
        {"num_virtual_tokens": PROMPT, "encoder_hidden_size": 6},
    ),
    Beside(
        "p-tuning, LSTM",
        "p_tuning.py",
        jpeft.PromptEncoderConfig,
        {
            "num_virtual_tokens": PROMPT, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5,
            "encoder_num_layers": 2,
        },
    ),
    Beside(
        "multitask prompt tuning",
        "multitask_prompt_tuning.py",
        jpeft.MultitaskPromptTuningConfig,
        {"num_virtual_tokens": PROMPT, "num_tasks": 2, "num_ranks": 2},
        context=TASKS,
    ),
    Beside(
        "context-aware prompt tuning",
        "cpt.py",
        jpeft.CPTConfig,
        {"cpt_token_ids": [4, 6, 8], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    ),
    Beside("prefix tuning", "prefix_tuning.py", jpeft.PrefixTuningConfig, {"num_virtual_tokens": PROMPT}),
    Beside(
        "prefix tuning, projected",
        "prefix_tuning.py",
        jpeft.PrefixTuningConfig,
        {"num_virtual_tokens": PROMPT, "prefix_projection": True, "encoder_hidden_size": 5},
    ),
    Beside(
        "cartridge", "cartridge.py", jpeft.CartridgeConfig, {"num_virtual_tokens": PROMPT, "num_frozen_tokens": 1}
    ),
    Beside(
        "adaption prompt",
        "adaption_prompt.py",
        jpeft.AdaptionPromptConfig,
        {"adapter_len": PROMPT, "adapter_layers": 1},
        neutral=True,
    ),
    Beside(
        "shadow",
        "shadow.py",
        jpeft.ShadowConfig,
        {"r": 2, "shadow_dropout": 0.0},
        neutral=True,
        still=("model.layers.1']['shadow_update",),  # of the last block: nothing reads the state after it
    ),
    Beside(
        "x-lora",
        "xlora.py",
        jpeft.XLoraConfig,
        {"hidden_size": 8, "xlora_depth": 2, "xlora_size": 6, "adapters": {name: name for name in EXPERTS}},
        experts=True,
    ),
)  # fmt: skip


@cache
def model(scan_layers: bool = False) -> Any:
    made = FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **SIZES}, scan_layers=scan_layers)
    if not scan_layers:
        return dataclasses.replace(made, params=random_like(made.params, 5))
    params = model().params
    layers = list(params["model"]["layers"].values())
    stack = {f"0:{len(layers)}": jax.tree.map(lambda *own: jnp.stack(own), *layers)}
    return dataclasses.replace(made, params={**params, "model": {**params["model"], "layers": stack}})


def fresh(row: Beside, base: Any = None, abstract: bool = False, **more: Any) -> jpeft.PeftParams:
    """The model's parameters with the row's adapter as it begins."""
    base = model() if base is None else base
    if row.experts:
        wrapped = base.params
        for name, options in EXPERTS.items():
            wrapped = jpeft.wrap(wrapped, jpeft.LoraConfig(init_lora_weights=False, **options), adapter_name=name)
        made = jpeft.create_xlora_adapter(wrapped, list(EXPERTS), row.built(**more), adapter_name="default")
        made = jpeft.set_adapter(made, "default")
        return jax.eval_shape(lambda: made) if abstract else made
    return jpeft_interop.inject_adapter_in_model(row.built(**more), base, low_cpu_mem_usage=abstract)


def drawn(wrapped: jpeft.PeftParams) -> jpeft.PeftParams:
    """The parameters with random values in the adapter."""
    adapter = wrapped.adapters["default"]
    weights, shared = random_like(adapter.weights, 100), random_like(adapter.shared, 300)
    adapter = dataclasses.replace(adapter, weights=weights, shared=shared)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, "default": adapter})


def outputs(row: Beside, wrapped: jpeft.PeftParams, base: Any, batch: Mapping[str, Any]) -> Any:
    """What the model returns with everything that the adapter needs of a call."""
    wrapped = jpeft.with_context(wrapped, **row.context)
    prepared, given = jpeft_interop.prepare_inputs(base, wrapped, batch)
    return jpeft.lift(base.apply)(prepared, **given)


@cache
def running(row_name: str, scan_layers: bool = False) -> Any:
    """The compiled function of parameters to (logits of the text alone, loss)."""
    row, base = next(row for row in BESIDE if row.name == row_name), model(scan_layers)

    @jax.jit
    def run(wrapped: jpeft.PeftParams) -> tuple[jax.Array, jax.Array]:
        found = outputs(row, wrapped, base, BATCH)
        return found.logits[:, -IDS.shape[1] :], found.loss

    return run


def logits_of(row: Beside, wrapped: jpeft.PeftParams, scan_layers: bool = False) -> np.ndarray:
    """Where there is a token."""
    return np.asarray(running(row.name, scan_layers)(wrapped)[0])[VISIBLE]


@cache
def bare_logits() -> np.ndarray:
    given = {name: value for name, value in BATCH.items() if name != "labels"}
    return np.asarray(jax.jit(partial(model().apply, **given))(model().params).logits)[VISIBLE]
