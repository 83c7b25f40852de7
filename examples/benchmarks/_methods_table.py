"""What `methods.py` measures: every method of jpeft, with sizes like those of LoRA at rank 8.

Methods whose authors mean another size, as their rank is that of random matrices that do not train or counts something
else, have the default of their config.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from _models import PROJECTIONS

import jpeft

INVOCATION = (1, 2)  # tokens in the middle of each row, from where on an activated LoRA acts
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row.

    config: the name of the config class, in both packages. settings: what it gets besides all seven projections as
    target_modules. context(tokens) -> what a call in jpeft needs beside them. added: a term of the loss in jpeft;
    peft_added: the name of that of PEFT's model, where the caller has to add it. projected: see `Variant`.
    without: {"jpeft" or "PEFT": why it has no such step}.
    """

    config: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: Callable[[jax.Array], Mapping[str, Any]] = lambda tokens: {}
    added: Callable[[jpeft.PeftParams], Any] = lambda wrapped: 0
    peft_added: str | None = None
    projected: Callable[[Any, Any, Any], Any] = lambda gradient, trainable, frozen: gradient
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)


def noise(tokens: jax.Array) -> Mapping[str, Any]:
    return {"rng": jax.random.key(0)}


def invocations(tokens: jax.Array) -> Mapping[str, Any]:
    return {"alora_offsets": jpeft.alora_offsets(tokens, INVOCATION)}


def osf_projected(gradient: Any, trainable: Any, frozen: Any) -> Any:
    projection = jpeft.osf_gradient_projection()
    return projection.update(gradient, projection.init(trainable), jpeft.combine(trainable, frozen))[0]


def lora(**settings: Any) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 8, **settings}


BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": [*PROJECTIONS[:3], *PROJECTIONS[4:6]]}
NO_STEP = "no step: it routes among adapters that are trained already"

METHODS = {
    "lora": Method("LoraConfig", lora()),
    "dora": Method("LoraConfig", lora(use_dora=True)),
    "pissa": Method("LoraConfig", lora(init_lora_weights="pissa")),
    "mica": Method("LoraConfig", lora(init_lora_weights="mica")),
    "lora_bias": Method("LoraConfig", lora(lora_bias=True)),
    "bdlora": Method("LoraConfig", lora(use_bdlora={**BLOCKS, "nblocks": 4})),
    "kasa": Method("LoraConfig", lora(kasa_config={}), added=jpeft.kasa_loss, peft_added="_get_kasa_loss"),
    "velora": Method("LoraConfig", lora(velora_config={})),
    "monteclora": Method(
        "LoraConfig",
        lora(monteclora_config={}),
        context=noise,
        added=lambda wrapped: jpeft.monteclora_loss(wrapped, rng=jax.random.key(1)),
        peft_added="_get_monteclora_loss",
    ),
    "alora": Method(
        "LoraConfig", lora(alora_invocation_tokens=list(INVOCATION), task_type="CAUSAL_LM"), context=invocations
    ),
    "qalora": Method("LoraConfig", lora(use_qalora=True), without={"PEFT": "for GPTQ's layers alone"}),
    "arrow": Method("LoraConfig", without={"jpeft": NO_STEP, "PEFT": NO_STEP}),
    "adalora": Method("AdaLoraConfig", {"total_step": 1000}, added=jpeft.adalora_orthogonality_loss),
    "adamss": Method("AdamssConfig"),
    "beft": Method("BeftConfig"),
    "boft": Method("BOFTConfig"),
    "c3a": Method("C3AConfig", {"block_size": 128}),
    "deft": Method("DeftConfig", {"r": 8}),
    "delora": Method("DeloraConfig", {"r": 8}),
    "fourierft": Method("FourierFTConfig"),
    "frod": Method("FrodConfig"),
    "glora": Method("GloraConfig", {"r": 8}),
    "gralora": Method("GraloraConfig", {"r": 8}),
    "hira": Method("HiraConfig", {"r": 8}),
    "hra": Method("HRAConfig", {"r": 8}),
    "ia3": Method("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "lily": Method("LilyConfig", {"r": 8}),
    "ln_tuning": Method("LNTuningConfig", {"target_modules": NORMS}),
    "loha": Method("LoHaConfig", {"r": 8}),
    "lokr": Method("LoKrConfig", {"r": 8}),
    "miss": Method("MissConfig", {"r": 8}),
    "oft": Method("OFTConfig"),
    "osf": Method("OSFConfig", projected=osf_projected),
    "peanut": Method("PeanutConfig", {"r": 8}),
    "psoft": Method("PsoftConfig"),
    "pvera": Method("PveraConfig", context=noise),
    "randlora": Method("RandLoraConfig"),
    "road": Method("RoadConfig"),
    "shira": Method("ShiraConfig", {"r": 8}),
    "supertuning": Method("SupertuningConfig"),
    "tinylora": Method("TinyLoraConfig"),
    "trainable_tokens": Method(
        "TrainableTokensConfig", {"token_indices": list(range(8)), "target_modules": ["embed_tokens"]}
    ),
    "unilora": Method("UniLoraConfig"),
    "vblora": Method("VBLoRAConfig", {"vector_length": 128}),
    "vera": Method("VeraConfig"),
    "waveft": Method("WaveFTConfig"),
}


def config_of(package: Any, method: Method) -> Any:
    """The config of a method. package: jpeft or peft."""
    return getattr(package, method.config)(**{"target_modules": list(PROJECTIONS), **method.settings})


def checked_complete() -> None:
    """Raise ValueError if a config class of jpeft has no row."""
    configs = {cls for name, cls in vars(jpeft).items() if isinstance(cls, type) and issubclass(cls, jpeft.TunerConfig)}
    missing = {cls.__name__ for cls in configs - {jpeft.TunerConfig}} - {method.config for method in METHODS.values()}
    if missing:
        raise ValueError(f"no row of METHODS has the configs {sorted(missing)}; expected one of each")
