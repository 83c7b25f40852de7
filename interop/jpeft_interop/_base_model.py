"""What the familiar face knows of a model: its parameters, a pure function of them, and how to put others in."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jpeft import PeftParams
from jpeft._params import is_peft_params


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model as a pair of a pure function and its parameters.

    given: the model as the user has it. apply(params, ...): the function. with_params(params): a model like the one
    given, with other parameters. class_name: of the model's class. config: of config.json, or empty. library: the
    Python module in which `transformers` has a class of that name, if it has. layouts: as for `jpeft.wrap`.
    generate(params, ...): None if it cannot.
    """

    given: Any
    params: Any
    apply: Callable[..., Any]
    with_params: Callable[[Any], Any]
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    name_or_path: str | None = None
    library: str | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)
    generate: Callable[..., Any] | None = None

    @property
    def bare(self) -> PeftParams:
        """The parameters without adapters."""
        return PeftParams(base=self.params, adapters={}, active=())

    @property
    def model_type(self) -> str | None:
        return self.config.get("model_type")


def laid_out(model: Any, layouts: Mapping[str, str] | None) -> BaseModel:
    """`base_model`, with further layouts."""
    base = base_model(model)
    return dataclasses.replace(base, layouts={**base.layouts, **(layouts or {})})


def base_model(model: Any) -> BaseModel:
    """A `FlaxModel`, an NNX module, a bound linen module, or a pair of a linen module or function and parameters.

    Of linen variables the collection `params` is what adapters are put beside; the others are kept as they are, and
    so is the state of an NNX module that is no parameter. Raises TypeError for anything else.

    >>> import jax.numpy as jnp
    >>> base_model((lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((2, 3))})).class_name
    '<lambda>'
    """
    # Late, because files are read and written without Flax.
    from flax import linen, nnx

    from .models import FlaxModel

    if is_peft_params(getattr(model, "params", None)):
        raise TypeError(
            "the model is a PeftModel already; expected a base model (model.unload() gives it), or model.add_adapter"
        )
    if isinstance(model, FlaxModel):
        return _of_flax_model(model)
    if isinstance(model, nnx.Module):
        return _of_nnx(model)
    if isinstance(model, linen.Module) and model.scope is not None:
        module, variables = model.unbind()
        return dataclasses.replace(_of_linen(module, variables, lambda v: module.bind(v)), given=model)
    if isinstance(model, tuple) and len(model) == 2:
        function, params = model
        if is_peft_params(params):
            raise TypeError("the parameters have adapters already; expected the base tree: jpeft.unwrap(params)")
        if isinstance(function, linen.Module):
            return dataclasses.replace(_of_linen(function, params, lambda v: (function, v)), given=model)
        if callable(function):
            name = getattr(function, "__name__", type(function).__name__)
            return BaseModel(model, params, function, lambda params: (function, params), name)
    raise TypeError(
        f"model is a {type(model).__name__}; expected a model of jpeft_interop.models, a Flax NNX module, a bound "
        "linen module, or a pair (linen module, variables) or (apply function, params)"
    )


def _of_flax_model(model: Any) -> BaseModel:
    return BaseModel(
        given=model,
        params=model.params,
        apply=model.apply,
        with_params=lambda params: dataclasses.replace(model, params=params),
        class_name=model.blueprint.architecture.name,
        config=model.config_dict,
        name_or_path=model.name_or_path,
        library=_library(model.blueprint.family.model_type),
        layouts=model.layouts,
        generate=model.generate,
    )


_FOLDERS = {"gemma3_text": "gemma3", "clip_text_model": "clip", "clip_vision_model": "clip"}
"""Of `transformers`, where they are not named as the model type is."""


def _library(model_type: str) -> str:
    folder = _FOLDERS.get(model_type, model_type.replace("-", "_"))
    return f"transformers.models.{folder}.modeling_{folder}"


def _of_nnx(model: Any) -> BaseModel:
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, params, rest)(*args, **kwargs)

    return BaseModel(model, params, apply, lambda params: nnx.merge(graph, params, rest), type(model).__name__)


def _of_linen(module: Any, variables: Mapping[str, Any], again: Callable[[Any], Any]) -> BaseModel:
    whole = "params" in variables
    rest = {name: value for name, value in variables.items() if name != "params"} if whole else {}

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        return module.apply({**rest, "params": params}, *args, **kwargs)

    return BaseModel(
        given=module,
        params=variables["params"] if whole else variables,
        apply=apply,
        with_params=lambda params: again({**rest, "params": params} if whole else params),
        class_name=type(module).__name__,
    )


def parameters_of(wrapped: Any) -> PeftParams:
    """Wrapped parameters, or those of a model of the familiar face; raises TypeError for anything else."""
    params = getattr(wrapped, "params", wrapped)
    if not is_peft_params(params):
        raise TypeError(
            f"expected a PeftModel, or the PeftParams that jpeft.wrap returns, not a {type(wrapped).__name__}"
        )
    return params
