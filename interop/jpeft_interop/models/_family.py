"""What a family of models declares: its config, its classes, and how their checkpoints differ from one another."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jax.typing import DTypeLike


@dataclass(frozen=True)
class Architecture:
    """One class of a family. `name` is the class of `transformers`, as `architectures` of a config.json has it.

    `module(config, dtype)` builds it; `dtype` is that of the computation, or None for that of the embedding.
    `tied`: checkpoint names of tensors that share the weight of another (alias -> the one that the model holds).
    """

    name: str
    module: Callable[[Any, DTypeLike | None], nnx.Module]
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """All classes of one `model_type`.

    `read_config(raw, ignore)` makes the frozen config from the dict of a config.json. `prefix` is the name under
    which a class with a head holds the bare model. `inputs` are those that the networks take. `architectures` is
    keyed by task: "base", "causal-lm", "sequence-classification", ... `heads` are modules that only some classes
    have: a checkpoint may hold those that a class does not want. Those in `new_heads` it may lack, and they are
    initialised.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any], Collection[str]], Any]
    prefix: str
    inputs: tuple[str, ...]
    architectures: Mapping[str, Architecture]
    heads: tuple[str, ...] = ()
    new_heads: tuple[str, ...] = ()
