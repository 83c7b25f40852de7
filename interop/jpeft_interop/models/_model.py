"""The model object: a description of the network, its parameters as a plain dict, and a pure function of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from ._family import Architecture, Family
from ._leaves import Leaf, check_paths, flatten, leaves_of, nest
from ._saving import write_checkpoint

Params = dict[str, Any]
"""Nested dict of arrays: the modules of the `transformers` class, then `kernel`, `bias`, `embedding` or `scale`."""


@dataclass(frozen=True)
class Blueprint:
    """A network without parameters: what `FlaxModel` is made of. `dtype` is that of the computation."""

    family: Family
    architecture: Architecture
    config: Any
    graphdef: Any = field(repr=False)
    leaves: Mapping[str, Leaf] = field(repr=False)


def blueprint(family: Family, architecture: Architecture, config: Any, dtype: DTypeLike | None) -> Blueprint:
    """Build the network of a config; allocates nothing."""
    module = architecture.module(config, None if dtype is None else jnp.dtype(dtype))
    graphdef, state = nnx.split(module)
    return Blueprint(family, architecture, config, graphdef, leaves_of(state))


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

    def apply(self, params: Params, input_ids: ArrayLike | None = None, **inputs: ArrayLike | None) -> Any:
        """Run the network: a pure function of `params` and the inputs, for use under jit, grad, vmap and scan.

        `params` has the structure of `self.params`. Inputs are those of the PyTorch class: `input_ids (batch,
        length)` or `inputs_embeds (batch, length, hidden)`; `attention_mask (batch, length)`, nonzero where there is
        a token; `position_ids`, `token_type_ids (batch, length)` where the model has them. Returns a dataclass with
        `logits`, or `last_hidden_state` (and `pooler_output`).

        Raises TypeError for an input that the model does not take, ValueError for a wrong shape or structure.

        >>> from jpeft_interop.models import FlaxAutoModel
        >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = FlaxAutoModel.from_config({"model_type": "bert", **sizes})
        >>> model.apply(model.params, [[1, 2, 3]], attention_mask=[[1, 1, 0]]).last_hidden_state.shape
        (1, 3, 8)
        """
        given = {name: value for name, value in {"input_ids": input_ids, **inputs}.items() if value is not None}
        takes = self.blueprint.family.inputs
        if unknown := given.keys() - set(takes):
            raise TypeError(
                f"{self.blueprint.architecture.name} takes {', '.join(takes)}; "
                f"got {', '.join(sorted(unknown))} (a loss is computed from the logits, outside the model)"
            )
        check_paths(params, self.blueprint.leaves)
        module = nnx.merge(self.blueprint.graphdef, params)
        return module(**{name: jnp.asarray(value) for name, value in given.items()})

    def save_pretrained(
        self, directory: str | Path, params: Params | None = None, *, max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Write `config.json` and `model.safetensors` (or shards), which `transformers` loads.

        `params` defaults to the model's own. Raises ValueError if their structure or a shape is not that of
        `self.params`, OSError if the files cannot be written.
        """
        params = self.params if params is None else params
        check_paths(params, self.blueprint.leaves)
        arrays = dict(flatten(params))
        for path, leaf in self.blueprint.leaves.items():
            if arrays[path].shape != leaf.shape:
                raise ValueError(f"{path} has the shape {arrays[path].shape}, expected {leaf.shape}")
        rest = {key: value for key, value in self.config_dict.items() if key != "torch_dtype"}
        described = {
            "model_type": self.blueprint.family.model_type,
            "architectures": [self.blueprint.architecture.name],
            "dtype": jnp.dtype(next(iter(arrays.values())).dtype).name,
        }
        write_checkpoint(Path(directory), rest | described, self.blueprint.leaves, arrays, max_shard_bytes)


def abstract_params(leaves: Mapping[str, Leaf], dtype: DTypeLike) -> Params:
    """`jax.ShapeDtypeStruct`s in place of the parameters."""
    return nest({path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for path, leaf in leaves.items()})
