"""Models by task: the family is chosen by `model_type` of the config, as in `transformers`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._config import read_json, with_labels
from ._family import Architecture, Family
from ._hub import local_folder
from ._leaves import initial_value, nest
from ._loading import Shardings, catalogue, load, match, weight_files
from ._model import FlaxModel, abstract_params, blueprint
from .bert import BERT
from .llama import LLAMA, MISTRAL

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (BERT, LLAMA, MISTRAL)}
"""The families, by the `model_type` of their configs."""


@dataclass(frozen=True)
class AutoModel:
    """The models of one task; `from_pretrained` and `from_config` make a `FlaxModel`."""

    task: str

    def from_pretrained(
        self,
        name_or_path: str | Path,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        num_labels: int | None = None,
        shardings: Shardings = None,
        rng: jax.Array | None = None,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        ignore_config_keys: Collection[str] = (),
    ) -> FlaxModel:
        """A model with the weights of a folder (`config.json` and safetensors), or of a Hub id.

        `dtype`: of the computation; None follows the embedding's. `param_dtype`: of the parameters; None keeps them
        as stored. `num_labels`: size of the classification head. `shardings`: one `jax.sharding.Sharding` or
        `(path, shape) -> sharding`; a device then reads only its own part of a tensor. `rng`: for a head that the
        checkpoint lacks, which a UserWarning names; `ignore_mismatched_sizes` allows one of another size. It is
        `jax.random.key(0)` if not given. `ignore_config_keys`: config keys that you know to have no effect.

        Raises ValueError for a config that is not implemented, by key, and for weights that do not fit, all of them
        in one error; FileNotFoundError if files are absent. Pickled weights are refused.
        """
        folder = local_folder(name_or_path, revision=revision)
        raw = _labelled(read_json(folder), num_labels)
        family, architecture = _choose(raw, self.task)
        plan = blueprint(family, architecture, family.read_config(raw, ignore_config_keys), dtype)
        matched = match(
            plan.leaves,
            catalogue(weight_files(folder)),
            family,
            architecture,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        arrays = load(
            matched,
            plan.leaves,
            param_dtype=param_dtype,
            shardings=shardings,
            rng=jax.random.key(0) if rng is None else rng,
            std=plan.config.initializer_range,
        )
        return FlaxModel(nest(arrays), plan.config, raw, str(name_or_path), plan)

    def from_config(
        self,
        config: Mapping[str, Any] | str | Path,
        *,
        abstract: bool = False,
        rng: jax.Array | None = None,
        num_labels: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        ignore_config_keys: Collection[str] = (),
    ) -> FlaxModel:
        """A model with initial values, from the dict of a config.json, that file, or its folder.

        `abstract`: the parameters are `jax.ShapeDtypeStruct`s, and nothing is allocated. `rng`: for the initial
        values, `jax.random.key(0)` if not given. The other arguments are those of `from_pretrained`.

        >>> llama = {"model_type": "llama", "num_hidden_layers": 2}
        >>> model = FlaxAutoModelForCausalLM.from_config(llama, abstract=True, param_dtype=jnp.bfloat16)
        >>> model.params["model"]["layers"]["1"]["self_attn"]["q_proj"]["kernel"]
        ShapeDtypeStruct(shape=(4096, 4096), dtype=bfloat16)
        """
        raw = _labelled(read_json(config), num_labels)
        family, architecture = _choose(raw, self.task)
        plan = blueprint(family, architecture, family.read_config(raw, ignore_config_keys), dtype)
        if abstract:
            params = abstract_params(plan.leaves, param_dtype)
        else:
            key = jax.random.key(0) if rng is None else rng
            std = plan.config.initializer_range
            params = nest({path: initial_value(leaf, key, param_dtype, std) for path, leaf in plan.leaves.items()})
        return FlaxModel(params, plan.config, raw, None, plan)


def _labelled(raw: dict[str, Any], num_labels: int | None) -> dict[str, Any]:
    return raw if num_labels is None else with_labels(raw, num_labels)


def _choose(raw: Mapping[str, Any], task: str) -> tuple[Family, Architecture]:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"the config's model_type {model_type!r} is not implemented; families: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    if task not in family.architectures:
        raise ValueError(f"{model_type!r} has no model for {task}; it has {', '.join(family.architectures)}")
    return family, family.architectures[task]


FlaxAutoModel = AutoModel("base")
"""The bare network, for features: `last_hidden_state`."""

FlaxAutoModelForCausalLM = AutoModel("causal-lm")
"""`logits (batch, length, vocab)` of the next token."""

FlaxAutoModelForSequenceClassification = AutoModel("sequence-classification")
"""`logits (batch, num_labels)` of a sequence."""

FlaxAutoModelForMaskedLM = AutoModel("masked-lm")
"""`logits (batch, length, vocab)` of the masked tokens."""
