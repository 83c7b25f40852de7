"""Models by task: the family is chosen by `model_type` of the config, as in `transformers`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ._bitsandbytes import gathered, without_quantization
from ._blueprint import blueprint
from ._config import read_generation_config, read_json, with_labels
from ._default_rules import has_meaning
from ._family import Architecture, Family, Options
from ._hub import local_folder
from ._leaves import abstract_value, initial_value, nest
from ._loading import load, match
from ._model import FlaxModel
from ._quantising import Quantise, as_codes_between_devices, quantiser
from ._shardings import Rules, automatic, placement
from ._stack import check_remat
from ._tensors import catalogue, weight_files
from .bart import BART
from .bert import BERT
from .bloom import BLOOM
from .clip import CLIP, CLIP_TEXT, CLIP_VISION
from .deberta import DEBERTA_V2
from .dinov2 import DINOV2
from .distilbert import DISTILBERT
from .gemma import GEMMA, GEMMA2, GEMMA3
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .llama import LLAMA, MISTRAL
from .mixtral import MIXTRAL
from .olmo import OLMO2
from .opt import OPT
from .phi import PHI3
from .qwen import QWEN2, QWEN3
from .qwen_moe import QWEN3_MOE
from .roberta import ROBERTA, XLM_ROBERTA
from .t5 import MT5, T5
from .vit import VIT
from .whisper import WHISPER

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        CLIP,
        CLIP_TEXT,
        CLIP_VISION,
        DINOV2,
        VIT,
        DEBERTA_V2,
        DISTILBERT,
        ROBERTA,
        XLM_ROBERTA,
        BERT,
        BLOOM,
        GPT2,
        GPT_NEOX,
        OPT,
        LLAMA,
        MISTRAL,
        GEMMA,
        GEMMA2,
        GEMMA3,
        QWEN2,
        QWEN3,
        MIXTRAL,
        OLMO2,
        PHI3,
        QWEN3_MOE,
        MT5,
        T5,
        BART,
        WHISPER,
    )
}
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
        scan_layers: bool = False,
        remat: str | None = None,
        num_labels: int | None = None,
        mesh: Mesh | None = None,
        sharding_rules: Rules | None = None,
        rng: jax.Array | None = None,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        ignore_config_keys: Collection[str] = (),
        quantize: str | Quantise | None = None,
    ) -> FlaxModel:
        """A model with the weights of a folder (`config.json` and safetensors), or of a Hub id.

        `dtype`: of the computation; None follows the embedding's. `param_dtype`: of the parameters; None keeps them
        as stored. `scan_layers`: uniform layers become one module with stacked parameters, e.g.
        `model.layers.0:32.self_attn.q_proj.kernel`, so that compiling takes as long for 80 layers as for one. `remat`:
        what a layer saves for its backward pass: "nothing_saveable", the least; "save_adapted_products" of jpeft, with
        which adapted products are not made again; or another of `jax.checkpoint_policies` that takes no arguments;
        None saves everything. `num_labels`: size of the classification head. `mesh`: spread the parameters over its
        devices, each of its axes an `AxisType.Auto` as that of your data has to be; each process reads only the parts
        that its devices hold. `sharding_rules`: how, as `(regular expression
        of a path, jax.sharding.PartitionSpec)` pairs of which the first that fits counts and that leave a parameter
        whole where none does, or as `(path, shape) -> PartitionSpec`; in a stack of layers a spec of a pair is that of
        one layer. None goes by the names of the mesh's axes: "fsdp" splits each weight and the rows of the batch, "tp"
        heads, hidden features and the vocabulary, "data" the rows alone; with such axes, any of the three, activations
        are split along, too. With axes of other names the largest axis that can be split is, over all devices. `rng`:
        for a head that the checkpoint lacks, which a UserWarning names; `ignore_mismatched_sizes` allows one of another
        size. It is `jax.random.key(0)` if not given. `ignore_config_keys`: config keys that you know to have no effect.
        `quantize`: a format of `jpeft.quantize`, or that function with its arguments
        (`functools.partial(jpeft.quantize, format="nf4", block=32)`), by which weights are quantised one after another
        as they are read.

        What bitsandbytes quantised, in 4 or 8 bits, is read as quantised leaves that stand for exactly its weights.
        Products are in the dtype of the computation, whatever `bnb_4bit_compute_dtype` says, and LLM.int8's rounding
        of activations is not done. Where blocks do not fit a parameter, a UserWarning names it and it is read dense.

        Raises ValueError for a config that is not implemented, by key, and for weights that do not fit, all of them
        in one error; FileNotFoundError if files are absent. Pickled weights are refused.
        """
        folder = local_folder(name_or_path, revision=revision)
        raw = _labelled(read_json(folder), num_labels)
        family, architecture = _choose(raw, self.task)
        quantise = quantiser(quantize, family.layouts)
        known, quantisation = without_quantization(raw)
        if quantise is not None and quantisation is not None:
            raise ValueError(
                f"{name_or_path} is quantised already, as its quantization_config says; expected quantize=None, or the "
                "folder of the model before it was"
            )
        options = _options(dtype, scan_layers, remat, mesh)
        plan = blueprint(family, architecture, family.read_config(known, ignore_config_keys), options)
        place = placement(mesh, sharding_rules, plan.config)
        shardings = {path: place(path, leaf.shape) for path, leaf in plan.leaves.items()}
        tensors = catalogue(weight_files(folder))
        matched = match(
            plan.leaves,
            tensors if quantisation is None else gathered(tensors, raw, quantisation),
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
            quantise=quantise,
        )
        params = nest(as_codes_between_devices(arrays, options.mesh))
        return FlaxModel(params, plan.config, raw, str(name_or_path), plan, read_generation_config(folder))

    def from_config(
        self,
        config: Mapping[str, Any] | str | Path,
        *,
        abstract: bool = False,
        rng: jax.Array | None = None,
        num_labels: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        scan_layers: bool = False,
        remat: str | None = None,
        mesh: Mesh | None = None,
        sharding_rules: Rules | None = None,
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
        options = _options(dtype, scan_layers, remat, mesh)
        plan = blueprint(family, architecture, family.read_config(raw, ignore_config_keys), options)
        place = placement(mesh, sharding_rules, plan.config)
        shardings = {path: place(path, leaf.shape) for path, leaf in plan.leaves.items()}
        if abstract:
            values = {path: abstract_value(leaf, param_dtype, shardings[path]) for path, leaf in plan.leaves.items()}
        else:
            key = jax.random.key(0) if rng is None else rng
            std = plan.config.initializer_range
            values = {
                path: initial_value(leaf, key, param_dtype, std, shardings[path]) for path, leaf in plan.leaves.items()
            }
        return FlaxModel(nest(values), plan.config, raw, None, plan)


def _options(dtype: DTypeLike | None, scan_layers: bool, remat: str | None, mesh: Mesh | None) -> Options:
    check_remat(remat)
    spread = None if mesh is None or not has_meaning(mesh) else automatic(mesh)
    return Options(None if dtype is None else jnp.dtype(dtype), scan_layers, remat, spread)


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

FlaxAutoModelForFeatureExtraction = FlaxAutoModel
"""The same, under the name of the task."""

FlaxAutoModelForCausalLM = AutoModel("causal-lm")
"""`logits (batch, length, vocab)` of the next token."""

FlaxAutoModelForSequenceClassification = AutoModel("sequence-classification")
"""`logits (batch, num_labels)` of a sequence."""

FlaxAutoModelForTokenClassification = AutoModel("token-classification")
"""`logits (batch, length, num_labels)` of every token."""

FlaxAutoModelForQuestionAnswering = AutoModel("question-answering")
"""`start_logits` and `end_logits (batch, length)` of the first and last token of an answer."""

FlaxAutoModelForSeq2SeqLM = AutoModel("seq2seq-lm")
"""`logits (batch, length, vocab)` of the decoder's next token."""

FlaxAutoModelForSpeechSeq2Seq = AutoModel("speech-seq2seq")
"""`logits (batch, length, vocab)` of the decoder's next token, from `input_features (batch, mels, frames)`."""

FlaxAutoModelForImageClassification = AutoModel("image-classification")
"""`logits (batch, num_labels)` of an image, `pixel_values (batch, channels, height, width)`."""

FlaxAutoModelForMaskedLM = AutoModel("masked-lm")
"""`logits (batch, length, vocab)` of the masked tokens."""
