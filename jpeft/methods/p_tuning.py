"""P-tuning (Liu et al., 2021, https://arxiv.org/abs/2103.10385).

    input = [P; E[tokens]],   P = MLP(X),   or P = MLP(BiLSTM(X)),   X (n submodules, dim) trained

An MLP has three layers, `mlp_head.{0,2,4}` by way of `encoder_hidden_size`; that after an LSTM two, `mlp_head.{0,2}`,
as wide as both of its directions. X is `embedding.weight`, `lstm_head.*` the LSTM's arrays. Files hold the prompt that
the encoder makes, `prompt_embeddings (n submodules, dim)`; the encoder is kept beside them, to train on. Costs about
2 h dim + h² parameters while it trains, with an LSTM of l layers 10 h dim + (24 l - 12) h², and n dim afterwards.
Of an encoder-decoder's 2 n rows the first n are used, as in PEFT. PEFT saves what the encoder makes with dropout on, if
the model is in training; here dropout needs a key, which saving has not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from .._begin import Beginning, Tree
from .._config import PeftType, PromptLearningConfig
from .._contract import Arrays, beside, dropped, fold_in_name, register
from ._lstm import lstm, lstm_bound, lstm_shapes
from ._prompts import checked_sizes

MLP, LSTM = "MLP", "LSTM"
PROMPT, ROWS, HEAD, RECURRENT = "prompt_embeddings", "embedding.weight", "mlp_head", "lstm_head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """What makes the prompt of P-tuning; PEFT's name, fields and defaults.

    encoder_reparameterization_type: "MLP", or "LSTM" for one before it. encoder_hidden_size: None for that of an
    embedding. encoder_num_layers, encoder_dropout: of the LSTM; dropout acts between its layers, in training.
    Raises ValueError for other types and values out of range.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> config = PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=3)
    >>> jpeft.wrap(params, config).adapters["default"].shared["mlp_head.0.weight"].shape
    (3, 4)
    """

    peft_type: PeftType | None = PeftType.P_TUNING
    encoder_reparameterization_type: str = MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type not in (MLP, LSTM):
            raise ValueError(
                f"encoder_reparameterization_type is {self.encoder_reparameterization_type!r}; expected {MLP!r} or "
                f"{LSTM!r}"
            )
        for name in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout is {self.encoder_dropout!r}; expected a rate of at least 0 and below 1")


def begin(key: jax.Array, tree: Tree, config: PromptEncoderConfig) -> Beginning:
    site = tree.token_table()
    config = checked_sizes(config, site)
    config = dataclasses.replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)
    return Beginning(config, sites={site.path: site}, shared=initial(key, config))


def initial(key: jax.Array, config: Any) -> dict[str, jax.Array]:
    rows = (config.num_virtual_tokens * config.submodules, config.token_dim)
    if config.inference_mode:
        return {PROMPT: jax.random.normal(fold_in_name(key, PROMPT), rows)}
    found = {ROWS: jax.random.normal(fold_in_name(key, ROWS), rows)}
    for name, (shape, bound) in encoder_shapes(config).items():
        found[name] = jax.random.uniform(fold_in_name(key, name), shape, minval=-bound, maxval=bound)
    return found


def encoder_shapes(config: Any) -> dict[str, tuple[tuple[int, ...], float]]:
    """{name: (shape, bound of the uniform initial values)} of the encoder's arrays, X left out."""
    dim, hidden = config.token_dim, config.encoder_hidden_size
    recurrent = config.encoder_reparameterization_type == LSTM
    sizes = (2 * hidden, 2 * hidden, dim) if recurrent else (dim, hidden, hidden, dim)
    shapes = lstm_shapes(dim, hidden, config.encoder_num_layers) if recurrent else {}
    found = {f"{RECURRENT}.{name}": (shape, lstm_bound(hidden)) for name, shape in shapes.items()}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        bound = 1 / math.sqrt(inputs)
        found[f"{HEAD}.{2 * layer}.weight"] = ((outputs, inputs), bound)
        found[f"{HEAD}.{2 * layer}.bias"] = ((outputs,), bound)
    return found


def prompt(p: Arrays, config: Any, context: Mapping[str, Any]) -> jax.Array:
    if PROMPT in p:
        return p[PROMPT]
    x, context = p[ROWS], {**context, "config": config}
    if config.encoder_reparameterization_type == LSTM:
        own = {name.removeprefix(f"{RECURRENT}."): array for name, array in p.items() if name.startswith(RECURRENT)}
        x = lstm(own, x, config.encoder_num_layers, lambda y, layer: dropped(y, _of_layer(context, layer)))
    for layer in range(0, sum(name.startswith(HEAD) for name in p), 2):
        x = jax.nn.relu(x) if layer else x
        x = x @ p[f"{HEAD}.{layer}.weight"].T + p[f"{HEAD}.{layer}.bias"]
    return x


def _of_layer(context: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    return {**context, "rng": fold_in_name(context["rng"], f"l{layer}")} if "rng" in context else context


def folded(p: Arrays, config: Any) -> dict[str, jax.Array]:
    return {PROMPT: prompt(p, config, {})}


P_TUNING = register(
    beside(
        what="a prompt",
        config=PromptEncoderConfig,
        begin=begin,
        prompt=prompt,
        folded=folded,
        dropout=lambda config: config.encoder_dropout if config.encoder_reparameterization_type == LSTM else 0.0,
    )
)
