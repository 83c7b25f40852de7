"""The settings of LoRA's variants: sub-configs under PEFT's names, and which variant a config means."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class BdLoraConfig:
    """BD-LoRA: which factors are block-diagonal.

    target_modules_bd_a, target_modules_bd_b: parts of module paths whose A, or B, is block-diagonal. nblocks: blocks on
    the diagonal, at least 1. match_strict: whether a module that matches neither is an error; else it is plain LoRA.
    Raises ValueError if a name is in both lists.

    >>> BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2).nblocks
    2
    """

    target_modules_bd_a: tuple[str, ...] | list[str] | None = None
    target_modules_bd_b: tuple[str, ...] | list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} is {value!r}; expected a list of names")
            object.__setattr__(self, name, None if value is None else tuple(value))
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        if both:
            raise ValueError(f"target_modules_bd_a and target_modules_bd_b both have {both}; expected each name in one")
        _check(self, "nblocks", self.nblocks >= 1, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KasaConfig:
    """KaSA: weights, at least 0, of what `kasa_loss` adds to the loss.

    beta: of the sum of the squared singular values. gamma: of the factors' distance from orthogonality.

    >>> KasaConfig().beta
    0.0001
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        _check(self, "beta", self.beta >= 0, "at least 0")
        _check(self, "gamma", self.gamma >= 0, "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeloraConfig:
    """VeLoRA: how the inputs that the backward pass needs are compressed.

    num_groups: numbers that are kept of each input vector, at least 1. scale: above 0, on what is reconstructed.
    init_type: the direction to project on: "batch_average" (of this batch's inputs, each time), "batch_average_once"
    (the stored one; random until a file brings another) or "random".

    >>> VeloraConfig(num_groups=4).init_type
    'batch_average'
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        _check(self, "num_groups", self.num_groups >= 1, "at least 1")
        _check(self, "scale", self.scale > 0, "a positive number")
        known = ("batch_average", "batch_average_once", "random")
        _check(self, "init_type", self.init_type in known, f"one of {', '.join(map(repr, known))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MontecloraConfig:
    """MonteCLoRA: the noise on A during training, and what `monteclora_loss` adds to the loss.

    num_samples: draws that are averaged, at least 1. use_entropy: whether the loss keeps the average from leaning on
    one of them. dirichlet_prior: above 0, of the weights of the average. sample_scaler: of the noise. kl_loss_weight:
    of the loss. buffer_size: PEFT's, of its buffer of draws; here each step draws anew.

    >>> MontecloraConfig().num_samples
    8
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _check(self, "num_samples", self.num_samples >= 1, "at least 1")
        _check(self, "dirichlet_prior", self.dirichlet_prior > 0, "a positive number")
        _check(self, "buffer_size", self.buffer_size >= 1, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowConfig:
    """Arrow: how a router chooses among LoRA adapters, token by token.

    top_k: how many of them act on a token, at least 1. router_temperature: above 0; the higher, the more alike their
    shares. use_gks: whether general knowledge is subtracted from them (GenKnowSub). task_adapter_names,
    gks_adapter_names: the adapters, and those of general knowledge, filled in by `jpeft.create_arrow_adapter`.
    rng_seed: PEFT's, of the start of its iteration for singular vectors; here they are exact.

    >>> ArrowConfig(top_k=2).router_temperature
    1.0
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: tuple[str, ...] | list[str] | None = None
    gks_adapter_names: tuple[str, ...] | list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("task_adapter_names", "gks_adapter_names"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} is {value!r}; expected a list of names")
            object.__setattr__(self, name, None if value is None else tuple(value))
        _check(self, "top_k", isinstance(self.top_k, int) and self.top_k >= 1, "an integer of at least 1")
        _check(self, "router_temperature", self.router_temperature > 0, "a positive number")


def _check(config: Any, name: str, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} of {type(config).__name__} is {getattr(config, name)!r}; expected {expected}")


SUB_CONFIGS = {
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "velora_config": VeloraConfig,
}
"""The fields of a LoraConfig that hold a config of their own, or None."""

VARIANTS = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", *SUB_CONFIGS)


def check_variants(config: Any) -> None:
    """Make sub-configs of the dicts of a file, and refuse variants that do not go together."""
    for name, kind in SUB_CONFIGS.items():
        value = getattr(config, name)
        if isinstance(value, Mapping):
            object.__setattr__(config, name, _sub_config(name, kind, value))
        elif value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}; expected a jpeft.{kind.__name__}, a dict of its fields, or None")
    asked = [f"{name}={getattr(config, name)!r}" for name in VARIANTS if getattr(config, name)]
    if config.init_lora_weights == "mica":
        asked.append("init_lora_weights='mica'")
    if len(asked) > 1:
        raise ValueError(f"variants of LoRA exclude each other, but there are {', '.join(asked)}; expected one of them")
    if asked and config.target_parameters:
        raise ValueError(
            f"target_parameters is {config.target_parameters!r} with {asked[0]}; expected plain LoRA, as in PEFT"
        )
    how = config.init_lora_weights
    if asked and how not in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        raise ValueError(
            f"init_lora_weights={how!r} with {asked[0]} is not implemented; expected True, False, 'gaussian', "
            "'orthogonal' or 'eva'"
        )
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        raise ValueError(
            f"lora_bias=True with init_lora_weights={config.init_lora_weights!r}; expected True or False, as in PEFT"
        )
    size = config.qalora_group_size
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"qalora_group_size is {size!r}; expected an integer of at least 1")
    tokens = config.alora_invocation_tokens
    if tokens is not None:
        _check_invocation(tokens, config.task_type)


def _check_invocation(tokens: Any, task_type: Any) -> None:
    if not isinstance(tokens, tuple) or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError(f"alora_invocation_tokens is {tokens!r}; expected a list of the ids of tokens, or None")
    if task_type != "CAUSAL_LM":
        warnings.warn(
            f"alora_invocation_tokens is given with task_type={getattr(task_type, 'value', None)!r}; PEFT has aLoRA "
            "for 'CAUSAL_LM' alone, and in models of other tasks without an effect",
            stacklevel=5,
        )


def _sub_config(name: str, kind: Any, entries: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(entries.keys() - set(known))
    if unknown:
        raise ValueError(f"{name} has the fields {unknown}, which it does not have; expected some of {known}")
    return kind(**entries)
