"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    W' = W + s A B,   s = lora_alpha / r,   or lora_alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732)

`lora_A (r, in, *window)` and `lora_B (out, r, *ones)`; on lookup tables `lora_embedding_A (r, vocabulary)` and
`lora_embedding_B (out, r)`: PEFT's names, shapes and initial distributions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, EMBEDDING, LINEAR, Arrays, Site, low_rank, register
from .._patterns import value_for
from ._initialisations import (
    INITIALIZATIONS as INITIALIZATIONS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    settle_initialization,
)
from ._lora_config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig, check_variants


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(TunerConfig):
    """What LoRA trains and where; PEFT's fields and defaults.

    r: rank, at least 1. lora_alpha: the change is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with
    use_rslora. lora_dropout: rate in [0, 1) on the input of the low-rank path (not on lookups). rank_pattern,
    alpha_pattern: {name or regular expression: value}, the first match wins. target_parameters: names of parameters to
    adapt by themselves, such as stacked experts; with them target_modules may be left out.
    trainable_token_indices: rows of the table of tokens, or {module: rows}, that train themselves. ensure_weight_tying:
    what changes a table changes it as the output layer, too. layer_replication: the (start, end) ranges of layers
    of which the model was made, see `jpeft_interop.models.replicate_layers`. init_lora_weights: True (A Kaiming
    uniform, B zero), False (both random), "gaussian", "orthogonal"; of the weight: "pissa", "pissa_niter_<number>",
    "olora"; of data (see their functions): "eva", "corda", "lora_ga", "loftq", with settings in eva_config and so on.
    Variants, at most one (see their files): use_dora, lora_bias, use_bdlora, kasa_config, velora_config,
    monteclora_config, use_qalora, init_lora_weights="mica"; arrow_config: of a router, which
    `jpeft.create_arrow_adapter` makes; alora_invocation_tokens: the ids of the tokens from whose
    last occurrence on the adapter acts.
    Raises ValueError for values out of range.

    >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]).r
    8
    """

    peft_type: PeftType | None = PeftType.LORA
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    use_bdlora: BdLoraConfig | Mapping[str, Any] | None = None
    kasa_config: KasaConfig | Mapping[str, Any] | None = None
    arrow_config: ArrowConfig | Mapping[str, Any] | None = None
    velora_config: VeloraConfig | Mapping[str, Any] | None = None
    monteclora_config: MontecloraConfig | Mapping[str, Any] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    alora_invocation_tokens: tuple[int, ...] | list[int] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: tuple[str, ...] | list[str] | None = None
    trainable_token_indices: Mapping[str, Any] | tuple[int, ...] | list[int] | None = None
    ensure_weight_tying: bool = False
    layer_replication: tuple[tuple[int, int], ...] | list[tuple[int, int]] | None = None
    eva_config: EvaConfig | Mapping[str, Any] | None = None
    corda_config: CordaConfig | Mapping[str, Any] | None = None
    lora_ga_config: LoraGAConfig | Mapping[str, Any] | None = None
    loftq_config: LoftQConfig | Mapping[str, Any] | None = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters is {self.target_parameters!r}; expected a list of names")
        for where, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{where} is {rank!r}; expected an integer of at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; expected a rate in [0, 1)")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'lora_only'")
        settle_initialization(self)
        check_variants(self)


def rank_of(site: Site, config: LoraConfig) -> int:
    return value_for(site.path, config.rank_pattern, config.r)


def scaling(site: Site, config: LoraConfig) -> float:
    rank, alpha = rank_of(site, config), value_for(site.path, config.alpha_pattern, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    rank, (key_a, key_b) = rank_of(site, config), jax.random.split(key)
    shape_a = (rank, site.in_features, *site.window)
    shape_b = (site.out_features, rank, *(1 for _ in site.window))
    how = config.init_lora_weights
    if site.kind == EMBEDDING:
        # As in PEFT, whatever the kind of initialisation: A zero unless both are to be random.
        a = jax.random.normal(key_a, shape_a) if how is False else jnp.zeros(shape_a)
        return {"lora_embedding_A": a, "lora_embedding_B": jax.random.normal(key_b, shape_b)}
    if how == "orthogonal":
        a, b = _orthogonal_halves(key_a, key_b, rank, site)
    else:
        a = jax.random.normal(key_a, shape_a) / rank if how == "gaussian" else _kaiming_uniform(key_a, shape_a)
        b = _kaiming_uniform(key_b, shape_b) if how is False else jnp.zeros(shape_b)
    return {"lora_A": a, "lora_B": b}


def _kaiming_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # torch's kaiming_uniform_(a=sqrt(5)): the bound is 1 / sqrt(fan_in), fan_in over all axes but the first.
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _orthogonal_halves(key_a: jax.Array, key_b: jax.Array, rank: int, site: Site) -> tuple[jax.Array, jax.Array]:
    # A uses the even and B the odd rows of one orthogonal matrix, so A B is zero although neither is.
    if site.kind != LINEAR:
        raise ValueError(f"init_lora_weights='orthogonal' at {site.path!r}: expected a linear layer, not a {site.kind}")
    if rank % 2:
        raise ValueError(f"init_lora_weights='orthogonal' at {site.path!r}: r is {rank}; expected an even rank")
    q = jnp.linalg.qr(jax.random.normal(key_a, (rank, rank)))[0]
    key_in, key_out = jax.random.split(key_b)
    a = jax.random.normal(key_in, (site.in_features, rank // 2)) @ q[0::2] / 10
    b = q[1::2].T @ jax.random.normal(key_out, (rank // 2, site.out_features)) / 10
    return a.T, b.T


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    embedding = site.kind == EMBEDDING
    a = p["lora_embedding_A" if embedding else "lora_A"]
    b = p["lora_embedding_B" if embedding else "lora_B"]
    return a, p["scaling"].astype(b.dtype) * b.reshape(b.shape[:2]).T


LORA = register(
    low_rank(
        config=LoraConfig,
        init=init,
        factors=factors,
        scaling=scaling,
        dropout=lambda config: config.lora_dropout,
        ties=lambda config: config.ensure_weight_tying,
        kinds=frozenset({LINEAR, EMBEDDING, CONVOLUTION}),
    )
)
