"""The blocks of a decoder in a tree of parameters, and a smaller decoder of the same kind: ShadowPEFT's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._begin import Tree
from ._contract import EMBEDDING
from ._paths import BIAS_NAMES, WEIGHT_NAMES, last_name, parent
from ._stacks import layer_paths, spelled_layers
from ._targets import targeted_modules

HOLDERS = ("layers", "h")
"""What the list of a decoder's blocks is called where PEFT finds it by itself."""

DIFFUSION = ("transformer_blocks", "single_transformer_blocks")

SHARED_TABLE = "embed_tokens"
"""The one table that the shadow can do without: of others PEFT keeps a copy that it does not use."""

DEVIATION = 0.02
"""Of the first values of matrices: `initializer_range` of nearly all models."""

Tensors = dict[str, tuple[tuple[int, ...], float, float]]
"""{name: (shape, mean, standard deviation)}."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Some blocks of a decoder. holder: the path of its list of blocks. paths: of the blocks, in their order.

    groups: {path under which the tree has them, of a single block or a stack: the paths of its blocks}.
    """

    holder: str
    paths: list[str]
    groups: dict[str, list[str]]


def blocks_of(tree: Tree, config: Any) -> Blocks:
    """The blocks that a config means; all if it names none. Raises ValueError if they are none, or not in a row."""
    lists = _lists(tree.layers)
    if config.target_modules is None:
        holder = _only(lists)
        wanted = config.layers_to_transform
        numbers = (wanted,) if isinstance(wanted, int) else wanted
        names = [f"{holder}.{n}" for n in lists[holder] if numbers is None or n in numbers]
        if not names:
            raise ValueError(f"layers_to_transform is {wanted!r}; expected numbers of {holder!r}: {lists[holder]}")
        config = dataclasses.replace(config, target_modules=tuple(names), layers_to_transform=None, layers_pattern=None)
    chosen = targeted_modules(tree.layers, tree.found, config)
    strange = [path for path in chosen if not last_name(path).isdigit() or parent(path) not in lists]
    if strange:
        raise ValueError(
            f"target_modules={config.target_modules!r} means {strange[0]!r}, which is no block of a decoder; expected "
            f"whole blocks, such as {next(iter(lists), 'layers')}.0, or None for all"
        )
    chosen = sorted(chosen, key=lambda path: int(last_name(path)))
    numbers = [int(last_name(path)) for path in chosen]
    if len({parent(path) for path in chosen}) > 1 or numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ValueError(
            "the side state goes from block to block, but those chosen do not follow one another: "
            f"{', '.join(chosen)}; expected blocks of one list, in a row"
        )
    return Blocks(parent(chosen[0]), chosen, _groups(tree, parent(chosen[0]), chosen))


def _lists(leaves: Mapping[str, Any]) -> dict[str, list[int]]:
    """{path of a list of modules: their numbers}, of those lists that are in no other."""
    found: dict[str, dict[int, None]] = {}
    for path in leaves:
        names = path.split(".")
        place = next((place for place, name in enumerate(names[:-1]) if name.isdigit() and place), None)
        if place is not None:
            found.setdefault(".".join(names[:place]), {})[int(names[place])] = None
    return {holder: sorted(numbers) for holder, numbers in found.items()}


def _only(lists: Mapping[str, list[int]]) -> str:
    """The list of a decoder's blocks; raises ValueError if it is not known which one that is."""
    named = [holder for holder in lists if last_name(holder) in HOLDERS]
    if len(named) == 1:
        return named[0]
    if not named and any(last_name(holder) in DIFFUSION for holder in lists):
        raise ValueError(
            f"the model is a diffusion transformer, with blocks in {', '.join(lists)}; ShadowPEFT is implemented for "
            "decoders of text"
        )
    raise ValueError(
        f"ShadowPEFT goes along the blocks of one decoder, a list called {' or '.join(HOLDERS)}; the model has "
        f"{'several: ' + ', '.join(named) if named else 'none among ' + (', '.join(lists) or 'no lists')}. Name the "
        "blocks in target_modules if they are those of a decoder, or use a model that is one"
    )


def _groups(tree: Tree, holder: str, chosen: list[str]) -> dict[str, list[str]]:
    depth = holder.count(".") + 2
    groups = dict.fromkeys(".".join(path.split(".")[:depth]) for path in tree.leaves if path.startswith(f"{holder}."))
    kept: dict[str, list[str]] = {}
    for group in groups:
        blocks = layer_paths(group) or [group]
        present = [path for path in blocks if path in chosen]
        if present and len(present) < len(blocks):
            absent = [path for path in blocks if path not in chosen]
            raise ValueError(
                f"ShadowPEFT is for {spelled_layers(group, present)} of the stack {group!r}, but not "
                f"{spelled_layers(group, absent)}; layers stacked in one leaf are adapted alike: load the model with "
                "scan_layers=False, or choose all of them"
            )
        kept |= {group: blocks} if present else {}
    return dict(sorted(kept.items(), key=lambda own: int(last_name(own[0]).partition(":")[0])))


def shadow_tensors(tree: Tree, blocks: Blocks, config: Any) -> Tensors:
    """The tensors of the shadow, as the config or the model's own blocks have them.

    Raises ValueError where neither tells them.
    """
    sizes = ("shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")
    other = [f"{name}={getattr(config, name)}" for name in sizes if getattr(config, name) is not None]
    if config.shadow_tensors is not None:
        return dict(config.shadow_tensors)
    if other or last_name(blocks.holder) != HOLDERS[0]:
        why = ", ".join(other) or f"blocks in {blocks.holder!r}"
        raise ValueError(
            f"the tensors of a shadow with {why} are not told by the parameters alone; wrap the model with "
            "jpeft_interop.get_peft_model, which knows its sizes, or give them as shadow_tensors={name: (shape, mean, "
            "standard deviation)}"
        )
    return _mirrored(tree, blocks, config)


def _mirrored(tree: Tree, blocks: Blocks, config: Any) -> Tensors:
    outside = f"{parent(blocks.holder)}." if parent(blocks.holder) else ""
    last = _lists(tree.layers)[blocks.holder][-1]
    place, tensors = f"{last_name(blocks.holder)}.", Tensors()
    for path in tree.layers:
        name = path.removeprefix(outside)
        if not path.startswith(outside) or config.share_embeddings and last_name(parent(name)) == SHARED_TABLE:
            continue
        if not name.startswith(place):
            tensors |= _tensor(tree, path, name)
            continue
        number, _, rest = name.removeprefix(place).partition(".")
        for own in range(config.shadow_num_hidden_layers or 1):
            if int(number) == min(own, last):
                tensors |= _tensor(tree, path, f"{place}{own}.{rest}")
    return tensors


def _tensor(tree: Tree, path: str, name: str) -> Tensors:
    """A leaf as a tensor of PyTorch: (out, in) where a kernel is (in, out)."""
    shape, last = tuple(tree.layers[path].shape), last_name(path)
    module = ".".join(name.split(".")[:-1])
    if last in BIAS_NAMES:
        return {f"{module}.bias": (shape, 0.0, 0.0)}
    if len(shape) == 1:
        return {f"{module}.weight": (shape, 1.0, 0.0)}
    candidate = tree.found.get(parent(path))
    if len(shape) != 2 or candidate is None or last not in WEIGHT_NAMES:
        raise ValueError(
            f"{path!r} of the shape {shape} is of no linear layer, lookup table or norm, so that the shadow's is not "
            "known; give shadow_tensors={name: (shape, mean, standard deviation)}"
        )
    return {f"{module}.weight": (shape if candidate.kind == EMBEDDING else shape[::-1], 0.0, DEVIATION)}
