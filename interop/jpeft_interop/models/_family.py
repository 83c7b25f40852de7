"""What a family of models declares: its config, its classes, and how their checkpoints differ from one another."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ._losses import ClassificationLoss, classification_loss
from ._mirror import Sizes


@dataclass(frozen=True)
class Options:
    """How a network runs, whatever it computes.

    `dtype`: of the computation; None for that of the embedding. `scan_layers`: whether uniform layers are stacked and
    run by a scan. `remat`: name of the `jax.checkpoint` policy of each layer; None saves all for the backward pass.
    `mesh`: of axes "data", "fsdp" and "tp" (any of them) over which activations are split; None leaves them alone.
    """

    dtype: jnp.dtype | None = None
    scan_layers: bool = False
    remat: str | None = None
    mesh: Mesh | None = None


@dataclass(frozen=True)
class Architecture:
    """One class of a family. `name` is the class of `transformers`, as `architectures` of a config.json has it.

    `module(config, options)` builds it. `tied`: checkpoint names of tensors that share the weight of another (alias ->
    the one that the model holds). `prefix`: the name under which it holds the bare model, if not the family's.
    """

    name: str
    module: Callable[[Any, Options], nnx.Module]
    tied: Mapping[str, str] = field(default_factory=dict)
    prefix: str | None = None


@dataclass(frozen=True)
class Family:
    """All classes of one `model_type`.

    `read_config(raw, ignore)` makes the frozen config from the dict of a config.json. `prefix` is the name under
    which a class with a head holds the bare model ("" if it never does). `inputs` are those that the networks take.
    `architectures` is keyed by task: "base", "causal-lm", "sequence-classification", ... `heads` are modules that only
    some classes have: a checkpoint may hold those that a class does not want. Those in `new_heads` it may lack, and
    they are initialised. `renames`: (regular expression, replacement) pairs that turn the tensor names of older
    checkpoints into today's. `splits`: (regular expression, replacements) pairs of older tensors that hold several of
    today's, of equal size, one after another along the first axis. `unused`: regular expressions of tensors that no
    class needs. `layouts`: {regular expression of a leaf: layout} for `jpeft.wrap`, where a shape does not tell it.
    `decodes`: whether its networks keep a cache and can generate. `prefixed`: whether, without a cache, they take a
    prefix of keys and values. `adapted_attention`: the name of a layer's attention, if that takes adaption prompts.
    `mirror(config, sizes)`: the config of a smaller model, if its networks take a shadow. `classification_loss`: of
    sequences and images.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any], Collection[str]], Any]
    prefix: str
    inputs: tuple[str, ...]
    architectures: Mapping[str, Architecture]
    heads: tuple[str, ...] = ()
    new_heads: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unused: tuple[str, ...] = ()
    layouts: Mapping[str, str] = field(default_factory=dict)
    decodes: bool = False
    prefixed: bool = False
    adapted_attention: str | None = None
    mirror: Callable[[Any, Sizes], Any] | None = None
    classification_loss: ClassificationLoss = classification_loss
