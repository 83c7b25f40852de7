"""Context-aware prompt tuning, CPT (Blau et al., 2024, https://arxiv.org/abs/2410.17222).

    input = [E[context] + D; E[tokens]],   |D_i| <= eps_i sqrt(dim / 2048),   D (n, dim) trained

The context, `cpt_token_ids`, is a text of examples. The type of each token, from `cpt_tokens_type_mask`, is counted in
fours, an example after another: 1 the template of the input, 2 the input, 3 the template of the output, 4 the label,
then 5, 6, 7, 8 and so on; 0 is padding. Labels and padding do not move. `embedding.weight` keeps the rows of the table,
`delta_embedding.weight` is D; files hold the sum, `prompt_embeddings (n, dim)`, and D is kept beside it, to train on.
D acts projected, with the gradient of what it is: `jpeft.cpt_projection` keeps D itself in its balls as PEFT does.
Costs n dim parameters. The loss counts the labels of the context, too: `jpeft.cpt_loss`. PEFT reads its decay from the
adapter "default", moves the types of a call in place, and by a number that hides all labels of a text unless the
context ends with one; here each adapter has its own decay, inputs stay as they are and types move by fours.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._begin import Beginning, Tree
from .._config import PeftType, PromptLearningConfig, TaskType
from .._contract import Arrays, beside, register
from ._cpt_projection import DELTA, projected
from ._prompts import checked_sizes, repeated_ids, token_rows

PROMPT, ROWS = "prompt_embeddings", "embedding.weight"
LOSSES = ("none", "decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPTConfig(PromptLearningConfig):
    """The context of CPT, and how far it may move; PEFT's fields and defaults.

    cpt_token_ids: the context's tokens; None is the token 0. cpt_tokens_type_mask: their types; None is all 1.
    cpt_mask: kept for PEFT, which does not use it either. opt_projection_epsilon, opt_projection_format_epsilon: how
    far inputs and templates may move, for an embedding of 2048. opt_weighted_loss_type: "none", or "decay" for labels
    that count `opt_loss_decay_factor` times those of the next example. task_type: "CAUSAL_LM", as it has to be.
    Raises ValueError for lists of unequal lengths, another task and values out of range.

    >>> CPTConfig(cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4]).num_virtual_tokens
    3
    """

    peft_type: PeftType | None = PeftType.CPT
    task_type: TaskType | str | None = TaskType.CAUSAL_LM
    cpt_token_ids: tuple[int, ...] | list[int] | None = None
    cpt_mask: tuple[int, ...] | list[int] | None = None
    cpt_tokens_type_mask: tuple[int, ...] | list[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"task_type is {self.task_type!r}; expected CAUSAL_LM, the one task that CPT is for")
        tokens = (0,) if self.cpt_token_ids is None else self.cpt_token_ids
        lists = {"cpt_token_ids": tokens, "cpt_mask": self.cpt_mask, "cpt_tokens_type_mask": self.cpt_tokens_type_mask}
        lists = {name: (1,) * len(tokens) if own is None else own for name, own in lists.items()}
        counts = {name: len(own) for name, own in lists.items()}
        counts["num_virtual_tokens"] = len(tokens) if self.num_virtual_tokens is None else self.num_virtual_tokens
        if len({*counts.values()}) > 1 or not tokens:
            raise ValueError(f"the lengths are {counts}; expected one length of at least 1, that of the context")
        for name, value in {**lists, "num_virtual_tokens": len(tokens), "num_transformer_submodules": 1}.items():
            object.__setattr__(self, name, value)
        if self.opt_weighted_loss_type not in LOSSES:
            raise ValueError(f"opt_weighted_loss_type is {self.opt_weighted_loss_type!r}; expected 'none' or 'decay'")
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number of at least 0")


def begin(key: jax.Array, tree: Tree, config: CPTConfig) -> Beginning:
    site = tree.token_table()
    config = checked_sizes(config, site)
    tokens = config.cpt_token_ids or ()
    ids = jnp.asarray(repeated_ids(tokens, len(tokens), site))
    rows = token_rows(tree, site, ids, config.embedding_scale)
    shared = {PROMPT: rows} if config.inference_mode else {ROWS: rows, DELTA: jnp.zeros_like(rows)}
    return Beginning(config, sites={site.path: site}, shared=shared)


def prompt(p: Arrays, config: Any, context: Any) -> jax.Array:
    if PROMPT in p:
        return p[PROMPT]
    moves = (np.asarray(config.cpt_tokens_type_mask) % 4 > 0)[:, None]
    delta, held = p[DELTA], lax.stop_gradient(p[DELTA])
    return p[ROWS] + projected(held, config) + jnp.where(moves, delta - held, 0.0)


CPT = register(
    beside(
        what="a prompt",
        config=CPTConfig,
        begin=begin,
        prompt=prompt,
        folded=lambda p, config: {PROMPT: prompt(p, config, {})},
        labels=lambda config: (config.cpt_token_ids, config.cpt_tokens_type_mask),
        frozen=frozenset({ROWS}),
    )
)
