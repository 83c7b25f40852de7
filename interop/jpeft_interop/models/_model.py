"""The model object: a description of the network, its parameters as a plain dict, and a pure function of both."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from jpeft import PeftParams

from ._adaption import with_prompts
from ._blueprint import Blueprint, Params, run_network
from ._decoding import LogitsProcessor
from ._generate import GenerationOutput, generate
from ._leaves import check_paths, flatten
from ._losses import decoder_inputs, targets_of, with_loss
from ._prefix import Past
from ._saving import write_checkpoint
from ._shadow import SHADOW, Shadow
from ._shadow_loss import SCORED, with_shadow_loss

_DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}


# Compared by identity: `jax.jit(model.apply)` hashes the model, and its parameters have no hash.
@dataclass(frozen=True, eq=False)
class FlaxModel:
    """A model of the Hugging Face family, in Flax NNX.

    `params` is a plain nested dict with the module names of the PyTorch class, e.g.
    `params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]`, kernels `(in, out)`. `config` is the frozen
    dataclass of the family, `config_dict` what config.json holds. There is no dropout: the model is deterministic.
    """

    params: Params = field(repr=False)
    config: Any
    config_dict: Mapping[str, Any] = field(repr=False)
    name_or_path: str | None
    blueprint: Blueprint = field(repr=False)
    generation_config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def task(self) -> str:
        """What the model is for, such as "causal-lm": a key of its family's architectures."""
        architectures = self.blueprint.family.architectures
        return next(task for task, own in architectures.items() if own == self.blueprint.architecture)

    @property
    def layouts(self) -> Mapping[str, str]:
        """For `jpeft.wrap(params, config, layouts=model.layouts)`: of weights whose shape does not tell the layout."""
        return self.blueprint.family.layouts

    def apply(
        self,
        params: Params,
        input_ids: ArrayLike | None = None,
        *,
        past_key_values: Past | None = None,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | None = None,
        loss_chunk_size: int | None = None,
        adaption_prompts: Mapping[str, Mapping[str, ArrayLike]] | None = None,
        shadow: Shadow | None = None,
        **inputs: ArrayLike | None,
    ) -> Any:
        """Run the network: a pure function of `params` and the inputs, for use under jit, grad, vmap and scan.

        `params` has the structure of `self.params`. Inputs are those of the PyTorch class: `input_ids (batch,
        length)` or `inputs_embeds (batch, length, hidden)`; `attention_mask (batch, length)`, nonzero where there is
        a token; `position_ids`, `token_type_ids (batch, length)`, `decoder_input_ids`, `pixel_values`, ... where the
        model has them. Returns a dataclass with the names of `transformers`: `logits`, or `last_hidden_state`.

        With `labels` (of question answering, `start_positions` and `end_positions`) it has the `loss` of the PyTorch
        class, too: `causal_lm_loss`, `cross_entropy`, `classification_loss` with the config's problem_type, or
        `question_answering_loss` of this package. Labels that are -100 do not count. A decoder that is given no input
        gets the labels, one token later.

        `adaption_prompts`, of Llama, Mistral and GPT-2: {path of a layer's attention: {"adaption_prompt": (1, n,
        hidden), "adaption_gate": (1,)}}, as the `weights` of an adapter of `jpeft.AdaptionPromptConfig` are;
        `jpeft_interop.prepare_inputs` puts those of the active adapter there, and as `shadow`, of Llama-like decoders
        and GPT-2, that of `jpeft.ShadowConfig`, whose own loss is then in the loss.

        The rest is static under jit. `output_hidden_states`: whether to return `hidden_states`. `logits_to_keep`: of
        a causal language model, return the logits of that many last tokens only. `cache_length`: return
        `past_key_values`, a cache with room for so many tokens, to be given with the tokens that follow; their
        `attention_mask` is that of the new tokens alone. `past_key_values` may be a `KeyValuePrefix`, too, of keys and
        values that come before the first token: the output is of the tokens alone. `loss_chunk_size`: of a causal
        language model with labels, make the loss of so many tokens of each row at a time
        (`jpeft.chunked_cross_entropy`): the same loss, without the memory of all logits, which are None.

        Raises TypeError for an input that the model does not take, ValueError for a wrong shape or structure.

        >>> from jpeft_interop.models import FlaxAutoModel
        >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = FlaxAutoModel.from_config({"model_type": "bert", **sizes})
        >>> model.apply(model.params, [[1, 2, 3]], attention_mask=[[1, 1, 0]]).last_hidden_state.shape
        (1, 3, 8)
        """
        given = {name: value for name, value in {"input_ids": input_ids, **inputs}.items() if value is not None}
        targets = {name: jnp.asarray(given.pop(name)) for name in targets_of(self.task) if name in given}
        static = {
            "past_key_values": past_key_values,
            "cache_length": cache_length,
            "output_hidden_states": output_hidden_states or None,
            "logits_to_keep": logits_to_keep,
            "loss_chunk_size": loss_chunk_size,
            SHADOW: shadow,
        }
        static = {name: value for name, value in static.items() if value is not None}
        self._check_inputs({**given, **static})
        if targets and self.task in ("seq2seq-lm", "speech-seq2seq") and not given.keys() & _DECODER_INPUTS:
            start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
            given["decoder_input_ids"] = decoder_inputs(targets["labels"], start, pad)
        if loss_chunk_size is not None:
            self._check_chunks(targets, logits_to_keep)
        if loss_chunk_size is not None or (shadow is not None and self.task in SCORED):
            given |= targets
        arrays = {k: jnp.asarray(v) for k, v in given.items()}
        output = run_network(self.blueprint, params, {**arrays, **with_prompts(adaption_prompts), **static})
        if targets and loss_chunk_size is None:
            classify, problem = self.blueprint.family.classification_loss, self.config_dict.get("problem_type")
            output = with_loss(output, targets, self.task, classify, problem)
        return with_shadow_loss(output, shadow)

    def generate(
        self,
        params: Params | PeftParams,
        input_ids: ArrayLike | None = None,
        *,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        seed: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        logits_processor: LogitsProcessor | None = None,
        adapter_names: Sequence[str] | None = None,
        **inputs: ArrayLike | None,
    ) -> GenerationOutput:
        """Continue a text, or answer the input of an encoder: greedy by default, as `transformers` does it.

        `params`: those of the model, or what `jpeft.wrap` made of them. `input_ids (batch, length)`, with its
        `attention_mask` where rows are padded, on either side; other inputs as for `apply`, among them
        `decoder_input_ids` for the beginning of the output. `eos_token_id`: the tokens that end a sequence, after
        which comes `pad_token_id`; by default those of generation_config.json or the config. Of that file nothing
        else is read.

        `do_sample` draws from the distribution, changed by `temperature` (above 0), then cut to the `top_k` likeliest
        tokens, then to the fewest whose probabilities sum to `top_p` (above 0, at most 1); `seed` decides the draw.
        `num_beams`: width of a beam search. `length_penalty`: power of the length that scores are divided by.
        `early_stopping`: True stops at `num_beams` finished sequences, False when a better one is unlikely, "never"
        when it is impossible. `num_return_sequences`: how many sequences for each row; at most `num_beams` of a
        search. `logits_processor(sequences, logits, end) -> logits` may forbid or favour tokens before each choice
        (log-probabilities in a beam search); `sequences[:, :end]` is the text so far. `adapter_names`: of each row the
        soft prompt, where several are active; their virtual tokens, which come before the text, are not returned.

        It compiles once for a shape of input, `max_new_tokens` and the other whole-number settings. Raises TypeError
        if the model is of a task that does not generate, ValueError for settings out of their range.

        >>> from jpeft_interop.models import FlaxAutoModelForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **sizes})
        >>> model.generate(model.params, [[1, 2, 3]], max_new_tokens=2).sequences.shape
        (1, 5)
        """
        self._check_inputs({name for name, value in {"input_ids": input_ids, **inputs}.items() if value is not None})
        return generate(
            self,
            params,
            {"input_ids": input_ids, **inputs},
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
            logits_processor=logits_processor,
            adapter_names=adapter_names,
        )

    def _check_inputs(self, given: Collection[str]) -> None:
        family, architecture = self.blueprint.family, self.blueprint.architecture
        takes = {*family.inputs, "output_hidden_states"}
        if family.decodes:
            takes |= {"past_key_values", "cache_length"}
        if family.prefixed:
            takes |= {"past_key_values"}
        if family.decodes and self.task in ("causal-lm", "seq2seq-lm", "speech-seq2seq"):
            takes |= {"logits_to_keep"}
        if self.task == "causal-lm":
            takes |= {"loss_chunk_size"}
        if family.mirror is not None:
            takes |= {SHADOW}
        if unknown := set(given) - takes:
            raise TypeError(f"{architecture.name} takes {', '.join(family.inputs)}; got {', '.join(sorted(unknown))}")

    def _check_chunks(self, targets: Collection[str], logits_to_keep: int | None) -> None:
        if not targets or logits_to_keep is not None:
            raise ValueError(
                f"loss_chunk_size came {'without labels' if not targets else f'with logits_to_keep={logits_to_keep}'}; "
                "it is for a loss, in the making of which no logits are kept: give labels, and no logits_to_keep"
            )

    def save_pretrained(
        self, directory: str | Path, params: Params | None = None, *, max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Write `config.json` and `model.safetensors` (or shards), which `transformers` loads.

        `params` defaults to the model's own; what is quantised is written as the dense weights that it stands for.
        Raises ValueError if their structure or a shape is not that of `self.params`, OSError if the files cannot be
        written.
        """
        params = self.params if params is None else params
        check_paths(params, self.blueprint.leaves)
        arrays = dict(flatten(params))
        for path, leaf in self.blueprint.leaves.items():
            if arrays[path].shape != leaf.shape:
                raise ValueError(f"{path} has the shape {arrays[path].shape}, expected {leaf.shape}")
        rest = {
            key: value for key, value in self.config_dict.items() if key not in ("torch_dtype", "quantization_config")
        }
        described = {
            "model_type": self.blueprint.family.model_type,
            "architectures": [self.blueprint.architecture.name],
            "dtype": jnp.dtype(next(iter(arrays.values())).dtype).name,
        }
        write_checkpoint(Path(directory), rest | described, self.blueprint.leaves, arrays, max_shard_bytes)
