"""Adapters to files: `save_pretrained`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jpeft import PeftParams
from jpeft._folded import folded
from jpeft._hotswap import check_says_its_scaling
from jpeft._params import Adapter, is_peft_params
from jpeft._paths import leaves_by_path
from jpeft._sites import candidates
from jpeft._stacks import unstacked
from jpeft._targets import module_paths, saved_leaves

from ._card import model_card
from ._config_json import SECOND_NAMES, config_dict, to_json
from ._experts_layout import is_module, with_named_parameters
from ._extra_file import STATE_NAME, kept_arrays, kept_encoder
from ._family import Family, family_of
from ._initial import with_plain_lora, writable
from ._keys import leaf_slots, slots
from ._listed import listed
from ._orientation import to_torch
from ._pair import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, write_if_absent, write_pair
from ._processes import by_one_process, whole, with_whole_adapters
from ._resolve import with_heads, with_named_targets
from ._segments import split
from ._stacked import is_abstract, unstacked_adapter, unstacked_layouts
from ._surplus import chosen_embeddings, original_biases, second_names
from ._tied import tied_tensors
from ._topk import shortened
from ._xlora_files import experts_to_write, with_places

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Contents:
    """What the two files of one adapter will hold, and what is kept beside them."""

    config: str
    tensors: Mapping[str, np.ndarray]
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def save_pretrained(
    wrapped: PeftParams,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    family: str = "hf",
    selected_adapters: Sequence[str] | None = None,
    layouts: Mapping[str, str] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    path_initial_model_for_weight_conversion: str | os.PathLike[str] | bool | None = None,
) -> None:
    """Write adapters as PyTorch PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    wrapped: from `jpeft.wrap` or `load_pretrained`. directory: made if absent; the adapter "default" goes into it, any
    other into its subfolder of that name. base_model_name_or_path: put into the config; the config's own by default.
    family: how the tree's names lead to those of the PyTorch model. selected_adapters: names; all by default.
    layouts: as for `jpeft.wrap`, of kernels that are saved in full and whose layout does not show.
    save_embedding_layers: whether the base weights of embeddings and output layers are written too; "auto" writes
    those that the adapter acts on.
    path_initial_model_for_weight_conversion: write an adapter of "pissa" or "olora" as plain LoRA of twice the rank,
    which goes with any other: True, or the folder of the untrained adapter. Adapters of "pissa_niter_<number>", "corda"
    and "lora_ga" are always written so, as no file tells what they took out of the base.
    Stacks of layers, named by the slice of their numbers, are written layer by layer. The experts of an X-LoRA adapter
    go into subfolders of its own.
    What follows from the base, but not alike on every machine (PSOFT's singular vectors), and the encoder of which a
    prompt is made (P-tuning, prefix tuning with a projection, CPT), to train on, go into a third file that PyTorch PEFT
    does not look at, `jpeft_state.safetensors`.
    A README.md is added if there is none. Two files change as one: a save that is interrupted at any point leaves the
    old adapter or the new one, and other files in the folder are left alone. One program may save at a time.
    In a program of several processes (`jax.distributed`) all of them make the call: they gather the adapter, never the
    base, process 0 writes, and the others wait for it and raise what it raises.
    Raises TypeError if `wrapped` does not come from `wrap`; ValueError for unknown or unsafe adapter names, other
    stacks of modules, abstract arrays, kernels of unknown layout; OSError if a file cannot be written.

    >>> import tempfile, jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_pretrained(wrapped, directory)
    ...     sorted(os.listdir(directory))
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if not is_peft_params(wrapped):
        raise TypeError(f"expected the PeftParams that jpeft.wrap returns, not a {type(wrapped).__name__}")
    root, table = Path(directory).expanduser(), family_of(family)
    names = _checked_names(wrapped, selected_adapters)
    wrapped = with_whole_adapters(wrapped, names)
    wrapped = with_plain_lora(wrapped, names, path_initial_model_for_weight_conversion, table, layouts or {})
    wrapped = with_places(wrapped, names, root)
    # Everything that can be wrong with the adapters is found out before the first file changes.
    plans = {
        name: contents_of(wrapped, name, base_model_name_or_path, table, layouts or {}, save_embedding_layers)
        for name in names
    }
    for folder, (name, own) in experts_to_write(wrapped, names).items():
        _check_folder_name(name)
        plans[folder] = contents_of(own, name, base_model_name_or_path, table, layouts or {}, save_embedding_layers)
    card = model_card(wrapped.adapters[names[0]].config, base_model_name_or_path)
    by_one_process(lambda: _write(root, plans, card))


def _write(root: Path, plans: Mapping[str, Contents], card: str) -> None:
    if root.exists() and not root.is_dir():
        raise ValueError(f"directory is {str(root)!r}, which is a file; expected a folder, or a path for a new one")
    for name, contents in plans.items():
        write_pair(root if name == "default" else root / name, contents.config, contents.tensors, contents.kept)
    write_if_absent(root / CARD_NAME, card)


def _checked_names(wrapped: PeftParams, selected: Sequence[str] | None) -> list[str]:
    names = list(wrapped.adapters) if selected is None else [selected] if isinstance(selected, str) else list(selected)
    unknown = [name for name in names if name not in wrapped.adapters]
    if unknown or not names:
        raise ValueError(
            f"selected_adapters is {selected!r}; expected at least one name, all of them among: "
            f"{', '.join(map(repr, wrapped.adapters))}"
        )
    for name in names:
        _check_folder_name(name)
    return list(dict.fromkeys(names))


def _check_folder_name(name: str) -> None:
    if not _is_folder_name(name):
        raise ValueError(
            f"the adapter name {name!r} cannot be the name of a folder of its own; expected one without slashes, "
            "colons, control characters and outer blanks, that is not the name of a file here"
        )


def _is_folder_name(name: str) -> bool:
    files = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, CARD_NAME, STATE_NAME)
    safe = all(letter.isprintable() and letter not in '/\\:*?"<>|' for letter in name)
    return safe and name.strip(" .") == name and name != "" and name.lower() not in map(str.lower, files)


def contents_of(
    wrapped: PeftParams,
    name: str,
    base_model: str | None,
    family: Family,
    layouts: Mapping[str, str],
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> Contents:
    """The config and the tensors of one adapter, as `save_pretrained` writes them, which says what the rest means.

    The adapter's arrays have to be whole in this process.
    """
    check_says_its_scaling(name, wrapped.adapters[name])
    leaves = leaves_by_path(wrapped.base)
    layouts = unstacked_layouts({**family.layouts, **layouts}, leaves)
    leaves = unstacked(leaves)
    adapter = _with_head(unstacked_adapter(writable(wrapped.adapters[name])), leaves, layouts)
    _refuse_abstract(name, adapter)
    kept, adapter = {**kept_arrays(adapter, family), **kept_encoder(adapter)}, folded(adapter)
    table = slots(adapter, leaves, family, layouts)
    arrays = {key: slot.take(adapter) for key, slot in table.items()}
    for key, slot in leaf_slots(
        chosen_embeddings(adapter, leaves, save_embedding_layers), adapter, leaves, family, layouts
    ).items():
        arrays[key] = to_torch(whole(leaves[slot.path]), slot.layout)
    for key, path in original_biases(adapter, family).items():
        arrays[key] = whole(leaves[path])
    copies = {**second_names(table, family), **adapter.config.extra.get(SECOND_NAMES, {})}
    arrays.update({second: arrays[first] for second, first in copies.items() if first in arrays})
    arrays.update(tied_tensors(arrays, adapter, leaves, family))
    arrays = split(shortened(arrays, adapter.config), kept, adapter.config)
    config = _written_config(adapter, leaves, family, layouts)
    if base_model is not None:
        config["base_model_name_or_path"] = str(base_model)
    held, kept = ({k: np.asarray(a) for k, a in own.items()} for own in (arrays, kept))
    return Contents(to_json(config), held, kept)


def _with_head(adapter: Adapter, leaves: Mapping[str, Any], layouts: Mapping[str, str]) -> Adapter:
    found = candidates(leaves, layouts)
    config = with_heads(adapter.config, module_paths(leaves, found))
    if config is adapter.config:
        return adapter
    head = saved_leaves(leaves, found, config)
    adapted = [path for path, site in adapter.sites.items() if site.leaf in head]
    if adapted:
        raise ValueError(
            f"for task_type={config_dict(config)['task_type']!r} PEFT trains the head in full, but the adapter acts on "
            f"{listed(adapted)}; expected other target_modules, or task_type=None"
        )
    replaced = {**{path: whole(leaves[path]) for path in head}, **adapter.replaced}
    return dataclasses.replace(adapter, config=config, replaced=replaced)


def _refuse_abstract(name: str, adapter: Adapter) -> None:
    leaves = jax.tree.leaves((adapter.weights, adapter.shared, adapter.replaced, adapter.rows))
    abstract = [leaf for leaf in leaves if is_abstract(leaf)]
    if abstract:
        raise ValueError(
            f"adapter {name!r} has {len(abstract)} abstract arrays and no values to save; expected one that was "
            "wrapped around real arrays"
        )


def _written_config(
    adapter: Adapter, leaves: Mapping[str, Any], family: Family, layouts: Mapping[str, str]
) -> dict[str, Any]:
    paths = [family.module(path) for path in module_paths(leaves, candidates(leaves, layouts))]
    modules = [family.module(path) for path, site in adapter.sites.items() if is_module(site)]
    return config_dict(with_named_parameters(with_named_targets(adapter.config, modules, paths), adapter.sites))
