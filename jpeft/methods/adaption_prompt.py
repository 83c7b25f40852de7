"""LLaMA-Adapter: adaption prompts in the last layers' attention (Zhang et al., 2023, https://arxiv.org/abs/2303.16199).

    attention(x) + g softmax(q (P K)ᵀ / sqrt(head_dim)) (P V)

q: the layer's queries, rotated where it rotates them; K, V: its own projections to keys and values, of which those of
the prompt P are not rotated; the softmax is over the n rows of P alone. Of each of the last `adapter_layers` layers
`adaption_prompt` (1, n, hidden) and `adaption_gate` (1), g, which begins at 0, so that nothing is changed at first.
They are kept by the path of the single layer's attention, in a model with stacked layers, too.
A model's attention has to add it: Llama, Mistral and GPT-2 of jpeft_interop do, others by `jpeft.adaption_attention`.
Costs n hidden + 1 parameters a layer, and n more keys and values.

Of PEFT's: in GPT-2 the sum is behind the output projection, here, too; in the others it is before it, but PEFT projects
both terms by themselves and so adds a bias of `o_proj` twice, which here, as in the paper, is added once; and it fails
where the heads of all queries are not as wide as the model, which here they may be.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp

from .._begin import Beginning, Tree
from .._config import PeftConfig, PeftType
from .._contract import LINEAR, beside, fold_in_name, register

NAMES = ("self_attn", "attn")
"""What a layer's attention is called, if the config does not say: in Llama and Mistral, and in GPT-2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """How long the prompts are, and in how many layers; PEFT's fields and defaults.

    adapter_len: rows of a prompt. adapter_layers: how many of the last layers have one. Both have to be given.
    target_modules: the name of a layer's attention; None: "self_attn", or "attn" if no module is called so.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {str(n): {"attn": {name: {"kernel": jnp.ones((4, 4))} for name in "qkvo"}} for n in range(3)}
    >>> adapter = jpeft.wrap(params, AdaptionPromptConfig(adapter_len=5, adapter_layers=2)).adapters["default"]
    >>> {path: arrays["adaption_prompt"].shape for path, arrays in adapter.weights.items()}
    {'1.attn': (1, 5, 4), '2.attn': (1, 5, 4)}
    """

    peft_type: PeftType | None = PeftType.ADAPTION_PROMPT
    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            raise TypeError(f"target_modules is {self.target_modules!r}; expected the one name of a layer's attention")
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")


def begin(key: jax.Array, tree: Tree, config: AdaptionPromptConfig) -> Beginning:
    count, rows = config.adapter_layers, config.adapter_len
    if count is None or rows is None:
        raise ValueError(
            f"adapter_len is {rows} and adapter_layers is {count}; expected the rows of a prompt and the number of the "
            "last layers that have one: AdaptionPromptConfig(adapter_len=10, adapter_layers=30)"
        )
    name, attentions = _attentions(tree, config.target_modules)
    if len(attentions) < count:
        raise ValueError(
            f"adapter_layers is {count}, but the model has {len(attentions)} modules called {name!r}; expected at most "
            "as many"
        )
    weights = {
        path: {
            "adaption_prompt": jax.random.normal(fold_in_name(key, path), (1, rows, _hidden(tree, path))),
            "adaption_gate": jnp.zeros((1,)),
        }
        for path in attentions[-count:]
    }
    return Beginning(dataclasses.replace(config, target_modules=name), weights=weights)


def _attentions(tree: Tree, name: str | None) -> tuple[str, list[str]]:
    """The name of the attention modules, and their paths in the order of the layers."""
    for one in NAMES if name is None else (name,):
        if found := tree.called(one):
            return one, found
    raise ValueError(
        f"target_modules is {name!r}, and the model has no module called "
        f"{' or '.join(map(repr, NAMES)) if name is None else repr(name)}; expected the name of a layer's attention"
    )


def _hidden(tree: Tree, path: str) -> int:
    """The size of what goes into an attention: the input of most of the layers in it."""
    sizes = Counter(
        candidate.site().in_features
        for module, candidate in tree.found.items()
        if module.startswith(f"{path}.") and candidate.kind == LINEAR
    )
    most = [size for size, number in sizes.items() if number == max(sizes.values(), default=0)]
    if len(most) != 1:
        raise ValueError(
            f"the linear layers in {path!r} have inputs of the sizes {sorted(sizes.elements())}; expected most of "
            "them to have that of the attention's input: the projections to queries, keys and values"
        )
    return most[0]


ADAPTION_PROMPT = register(beside(what="an adaption prompt", config=AdaptionPromptConfig, begin=begin))
