"""What adapters need of a call besides the weights they act on: the inputs of a model, made ready for its adapters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jpeft
from jpeft import PeftParams

from ._adaption_inputs import with_adaption_prompts
from ._base_model import BaseModel, base_model
from ._prefix_inputs import with_prefix
from ._prompt_inputs import with_decoder_input, with_weights, without_idle_types
from ._shadow import with_shadow
from ._xlora import with_router_scalings

Batch = dict[str, Any]
Step = Callable[[BaseModel, PeftParams, Batch], tuple[PeftParams, Batch]]

STEPS: tuple[Step, ...] = (with_adaption_prompts, with_shadow, with_router_scalings)
"""What is done in turn, after virtual tokens were put before the text; each leaves alone what is not its own."""


def prepare_inputs(
    model: Any, wrapped: PeftParams, batch: Mapping[str, Any], *, adapter_names: Sequence[str] | None = None
) -> tuple[PeftParams, Batch]:
    """The parameters and the inputs with which `jpeft.lift(model.apply)` computes what the active adapters mean.

    model: as for `get_peft_model`, or a `PeftModel`, whose calls do this by themselves. batch: the inputs by name.
    A soft prompt's virtual tokens come before the text (`jpeft.with_virtual_tokens`), a prefix goes in as the model's
    cache, and so on; without such adapters both come back as they are. With CPT and a loss that decays the batch also
    has `input_type_mask`, to take out for `jpeft.cpt_loss`. adapter_names: of each row, where several
    prompts are active. A pure function: call it inside the loss, under `jit` and `grad`, as in
    `wrapped, batch = prepare_inputs(model, wrapped, batch); apply(wrapped, **batch)`.
    Raises ValueError as `jpeft.with_virtual_tokens` does, and for adapters that the model cannot take.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> model = (lambda params, input_ids: params["embed_tokens"]["embedding"][input_ids], params)
    >>> wrapped = jpeft.wrap(params, jpeft.PromptTuningConfig(num_virtual_tokens=2))
    >>> wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": jnp.array([[5, 6]])})
    >>> jpeft.lift(model[0])(wrapped, **batch).shape
    (1, 4, 4)
    """
    base = model.face.base if hasattr(model, "face") else base_model(model)
    return prepared(base, wrapped, dict(batch), adapter_names)


def prepared(
    base: BaseModel, wrapped: PeftParams, batch: Batch, adapter_names: Sequence[str] | None = None
) -> tuple[PeftParams, Batch]:
    """`prepare_inputs` of a model that is known already."""
    batch = with_decoder_input(base, wrapped, batch)
    batch = jpeft.with_virtual_tokens(batch, wrapped, adapter_names=adapter_names)
    batch = without_idle_types(wrapped, batch)
    batch = with_prefix(base, wrapped, batch, adapter_names)
    for step in STEPS:
        wrapped, batch = step(base, wrapped, batch)
    return wrapped, batch


def prepared_call(
    base: BaseModel, wrapped: PeftParams, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[PeftParams, Sequence[Any], Batch]:
    """`prepared` for a call as it is written: the first argument is `input_ids`, if there is one without a name."""
    batch = {**({"input_ids": args[0]} if args else {}), **kwargs}
    names = batch.pop("adapter_names", None)
    wrapped, batch = prepared(base, wrapped, batch, names)
    # A function that is no model of this package has a loss of its own, if any.
    batch = with_weights(wrapped, batch, names) if hasattr(base.given, "blueprint") else batch
    return wrapped, (batch.pop("input_ids"), *args[1:]) if args else args, batch
