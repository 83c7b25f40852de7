"""What a `PeftModel` answers for names that it does not have: its base model's, or what to do instead."""

from typing import Any

from ._base_model import BaseModel

_DEVICES = "JAX arrays say where they are; move them with model.params = jax.device_put(model.params, device)"
_CAST = "give the base's dtype when it is loaded (param_dtype=...), the adapter's with autocast_adapter_dtype=..."
_MODULES = "a model is a pure function and a tree; use model.params, of which jpeft.trainable_mask tells what trains"
_MODE = "there is no mode; dropout acts where the context has a key: jpeft.with_context(model.params, rng=key)"
_REMAT = 'a model is loaded with it: FlaxAutoModel....from_pretrained(..., remat="nothing_saveable")'
_PROMPTS = "no method of virtual tokens is implemented, so that there is no prompt"

INSTEAD = {
    **dict.fromkeys(("to", "cuda", "cpu", "xpu", "tpu", "mps", "device", "hf_device_map"), _DEVICES),
    **dict.fromkeys(("half", "float", "double", "bfloat16", "type", "dtype", "base_model_torch_dtype"), _CAST),
    **dict.fromkeys(("eval", "train", "training"), _MODE),
    **dict.fromkeys(
        (
            "parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children",
            "named_children", "requires_grad_", "zero_grad", "register_forward_hook", "get_parameter", "get_submodule",
        ),
        _MODULES,
    ),
    **dict.fromkeys(
        ("state_dict", "load_state_dict"),
        "use get_peft_model_state_dict(model) and set_peft_model_state_dict(model, state_dict) for an adapter, and "
        "model.params.base for the base",
    ),
    **dict.fromkeys(
        (
            "gradient_checkpointing_enable", "gradient_checkpointing_disable", "enable_input_require_grads",
            "is_gradient_checkpointing", "prepare_model_for_gradient_checkpointing",
        ),
        _REMAT,
    ),
    **dict.fromkeys(("get_prompt", "get_prompt_embedding_to_save", "prompt_encoder", "prompt_tokens"), _PROMPTS),
    "forward": "call the model, or model.apply(model.params, ...), which is the pure function",
    "compile": "a call is compiled as it is; for a step of your own, jax.jit a function of model.params",
    **dict.fromkeys(
        ("prepare_inputs_for_generation", "base_model_prepare_inputs_for_generation"),
        "model.generate(...) prepares them itself",
    ),
    "special_peft_forward_args": "they are the arguments of model(...) that are not the base's",
    "get_input_embeddings": "it is a leaf of model.params.base, named as in transformers",
    "get_output_embeddings": "it is a leaf of model.params.base, named as in transformers",
    "resize_token_embeddings": "do it before: jpeft_interop.models.resize_token_embeddings(base_model, number)",
}  # fmt: skip
"""{name that PyTorch's models have: what is done here in its place}"""

_MEANT_FOR_TORCH = ("eval", "train", "training")
"""Names whose meaning on the base itself would be lost without a word: the model computes with a copy of its graph."""


def forwarded(base: BaseModel, class_name: str, name: str) -> Any:
    """The base model's attribute; raises AttributeError, which says what to do instead where that is known."""
    model = base.given[0] if isinstance(base.given, tuple) else base.given
    if name not in _MEANT_FOR_TORCH and not name.startswith("_") and hasattr(model, name):
        return getattr(model, name)
    instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
    raise AttributeError(f"neither {class_name} nor its base model {base.class_name} has {name!r}{instead}")


class Tuner:
    """What PEFT calls `model.base_model`: the base model under `model`, and what the `PeftModel` itself has.

    Other than in PEFT, the base model is never changed, so that `model` computes without adapters.
    """

    def __init__(self, owner: Any):
        self._owner = owner

    @property
    def model(self) -> Any:
        return self._owner.get_base_model()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._owner, name)
