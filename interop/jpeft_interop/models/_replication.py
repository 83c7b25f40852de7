"""A deeper model of the same layers: ranges of them one after another, as PEFT's `layer_replication` does it.

The idea is "depth up-scaling" (https://arxiv.org/abs/2312.15166) without copies of the weights: every layer of the new
model refers to the arrays of an old one, and adapters tell them apart.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jpeft._paths import map_leaves
from jpeft._stacks import stacked_numbers

from ._leaves import flatten, leaves_of
from ._model import FlaxModel

LISTS = ("layers", "layer", "h")
"""What the list of layers is called in the models that can be replicated."""


def replicate_layers(model: FlaxModel, layer_replication: Sequence[Sequence[int]]) -> FlaxModel:
    """A model whose layers are ranges of another one's, one range after another, with the very same arrays.

    layer_replication: (start, end) pairs, the end not included, as in the config: `[[0, 4], [2, 5]]` makes seven layers
    of five. Its parameters refer to the arrays of `model.params`; `jpeft.wrap` them with a config that says the same
    `layer_replication`, so that PyTorch PEFT builds the same model, and adapt layers by their new numbers. Training the
    base, or merging, gives each layer arrays of its own. Donate the base to no jitted function: its buffers repeat.
    Raises ValueError for ranges that are empty or not there, and for a model whose layers are stacked
    (scan_layers=True) or in no list, or in several.

    >>> from jpeft_interop.models import FlaxAutoModelForCausalLM
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    >>> model = FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **sizes})
    >>> deeper = replicate_layers(model, [[0, 2], [1, 2]])
    >>> sorted(deeper.params["model"]["layers"])
    ['0', '1', '2']
    >>> deeper.params["model"]["layers"]["2"]["mlp"] is model.params["model"]["layers"]["1"]["mlp"]
    True
    """
    path, old = _list_of_layers(model.params)
    numbers = _numbers(layer_replication, len(old))

    def fresh() -> Any:
        return nnx.merge(model.blueprint.graphdef, abstract)

    abstract = map_leaves(lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    module = fresh()
    *holders, name = path
    # A module of its own for each, for one that is used twice would be one set of parameters.
    setattr(
        _inside(module, holders),
        name,
        nnx.Dict({str(new): _inside(fresh(), path)[str(number)] for new, number in enumerate(numbers)}),
    )
    graphdef, state = nnx.split(module)
    changed = {"num_hidden_layers": len(numbers)}
    config = _replaced(model.config, {**changed, **_by_layer(model.config, numbers, len(old))})
    raw = {**model.config_dict, **changed, **_by_layer(model.config_dict, numbers, len(old))}
    params = _with(model.params, path, {str(new): old[str(number)] for new, number in enumerate(numbers)})
    blueprint = dataclasses.replace(model.blueprint, config=config, graphdef=graphdef, leaves=leaves_of(state))
    return dataclasses.replace(model, params=params, config=config, config_dict=raw, blueprint=blueprint)


def _list_of_layers(params: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    paths = {tuple(path.split(".")) for path, _ in flatten(params)}
    holders = {names[:place] for names in paths for place in range(1, len(names)) if names[place - 1] in LISTS}
    found = {holder: _inside(params, holder) for holder in holders}
    lists = {
        holder: node for holder, node in found.items() if all(name.isdigit() or stacked_numbers(name) for name in node)
    }
    if len(lists) != 1:
        raise ValueError(
            f"layers can be replicated where they are in one list, but the model has: "
            f"{', '.join('.'.join(holder) for holder in sorted(lists)) or 'none'}"
        )
    [(path, node)] = lists.items()
    if stacked := [name for name in node if stacked_numbers(name)]:
        raise ValueError(
            f"the layers {'.'.join((*path, stacked[0]))} are stacked in one array, which cannot be referred to in "
            "parts; load the model with scan_layers=False"
        )
    return path, node


def _numbers(ranges: Sequence[Sequence[int]], count: int) -> list[int]:
    for entry in ranges:
        if len(entry) != 2 or not 0 <= entry[0] < entry[1] <= count:
            raise ValueError(
                f"layer_replication has the range {list(entry)!r}; expected (start, end) with 0 <= start < end <= "
                f"{count}, the number of layers"
            )
    if not ranges:
        raise ValueError("layer_replication has no ranges; expected (start, end) pairs")
    return [number for start, end in ranges for number in range(start, end)]


def _inside(node: Any, names: Sequence[str]) -> Any:
    for name in names:
        node = node[name] if isinstance(node, Mapping) or name.isdigit() else getattr(node, name)
    return node


def _by_layer(config: Any, numbers: Sequence[int], count: int) -> dict[str, Any]:
    """The entries of a config that have one value for each layer, such as layer_types, with those of the new layers."""
    entries = (
        config if isinstance(config, Mapping) else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    )
    lists = {
        name: entries[name] for name in ("layer_types", "mlp_types") if isinstance(entries.get(name), (list, tuple))
    }
    return {name: type(own)(own[n] for n in numbers) for name, own in lists.items() if len(own) == count}


def _replaced(config: Any, changed: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in changed.items() if name in names})


def _with(tree: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**tree, first: _with(tree[first], rest, value) if rest else value}
