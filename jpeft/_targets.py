"""Which modules a config selects: PEFT's rules for targets, exclusions, layers and modules saved in full."""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ._config import TaskType, TunerConfig
from ._contract import LINEAR, Method, Site, method_of
from ._parameters import check_disjoint, parameter_sites
from ._paths import BIAS_NAMES, WEIGHT_NAMES, last_name, parent
from ._patterns import checked_regex, found_in, key_matches, matches
from ._sites import Candidate
from ._stacks import layer_paths, spelled_out

ALL_LINEAR = "all-linear"
OUTPUT_EMBEDDINGS = (
    "lm_head",
    "embed_out",
    "logits_dense",
    "output_projection",
    "output_embedding",
    "output_embeddings",
    "unembed",
)
SEQ_CLS_HEADS = ("score", "classifier")
EXPERTS = "experts"


def by_layer(config: TunerConfig) -> TunerConfig:
    """The config with the paths of layers where it names stacks of them, as files and other trees have them.

    >>> import jpeft
    >>> by_layer(jpeft.LoraConfig(target_modules=["layers.0:2.q"])).target_modules
    ('layers.0.q', 'layers.1.q')
    """
    lists = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
    names = {name: getattr(config, name) for name in lists if hasattr(config, name)}
    changed: dict[str, Any] = {name: spelled_out(value) for name, value in names.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        names[name] = getattr(config, name, None) or {}
        changed[name] = {spelled_out(key): value for key, value in names[name].items()}
    changed = {name: value for name, value in changed.items() if value != names[name]}
    return dataclasses.replace(config, **changed) if changed else config


def module_paths(leaves: Iterable[str], found: Mapping[str, Candidate]) -> list[str]:
    """Every module of a tree, containers before what they hold, and every leaf that is a module by itself.

    >>> module_paths(["layers.0.dense.kernel"], {})
    ['layers', 'layers.0', 'layers.0.dense']
    """
    bare = {candidate.leaf for path, candidate in found.items() if candidate.leaf == path}
    paths: dict[str, None] = {}
    for leaf in leaves:
        names = leaf.split(".")
        paths.update((".".join(names[:count]), None) for count in range(1, len(names) + (leaf in bare)))
    return list(paths)


def select_sites(
    leaves: Mapping[str, Any], found: Mapping[str, Candidate], config: Any, method: Method
) -> dict[str, Site]:
    """The modules that `config` adapts, in the tree's order.

    leaves: {leaf path: leaf}. found: the tree's `candidates`. Raises ValueError if nothing is selected, if a selected
    module is of no kind that the method acts on, or if its layout is unknown; warns (UserWarning) about names
    and patterns that had no effect.

    >>> import jax.numpy as jnp, jpeft
    >>> from jpeft._contract import method_of
    >>> from jpeft._sites import candidates
    >>> leaves = {"a.kernel": jnp.ones((2, 2)), "b.kernel": jnp.ones((2, 2))}
    >>> config = jpeft.LoraConfig(target_modules=["a"])
    >>> list(select_sites(leaves, candidates(leaves), config, method_of(config)))
    ['a']
    """
    parameters = parameter_sites(leaves, found, config, method)
    if not config.target_modules and parameters:
        _warn_of_idle_names([], (), parameters, config)
        return parameters
    if not config.target_modules:
        raise ValueError(
            f"target_modules is {config.target_modules!r}; name the modules to adapt, for example "
            f"target_modules={_examples(found)}, or use {ALL_LINEAR!r}"
        )
    paths = module_paths(leaves, found)
    excluded, remaining, asked = _asked(paths, found, config)
    everything = is_all_linear(config)
    supported = {path: found[path] for path in asked if _is_supported(path, found, method)}
    if not everything:
        _check_supported(asked, supported, leaves, found, config, method)
    if not supported and not parameters:
        raise ValueError(_no_match(remaining, excluded, found, config))
    modules = {path: candidate.site() for path, candidate in supported.items()}
    check_disjoint(modules, parameters)
    sites = {**modules, **parameters}
    if everything:
        _warn_of_unknown_layouts(remaining, found)
    _warn_of_idle_names(paths, excluded, sites, config)
    return sites


def targeted_modules(leaves: Mapping[str, Any], found: Mapping[str, Candidate], config: TunerConfig) -> list[str]:
    """The modules with leaves that `config` means, of whatever kind: those of methods that adapt none.

    Raises ValueError if there is none, or if one lies in another; warns (UserWarning) about names without effect.

    >>> import jax.numpy as jnp, jpeft
    >>> targeted_modules({"norm.scale": jnp.ones(2)}, {}, jpeft.LNTuningConfig(target_modules=["norm"]))
    ['norm']
    """
    paths = module_paths(leaves, found)
    if not config.target_modules:
        raise ValueError(
            f"target_modules is {config.target_modules!r}; name the modules to train, for example "
            f"target_modules={list(dict.fromkeys(last_name(parent(path)) for path in leaves))[:4]}"
        )
    excluded, remaining, asked = _asked(paths, found, config)
    holders = {".".join(path.split(".")[:count]) for path in leaves for count in range(1, len(path.split(".")))}
    chosen = [path for path in asked if path in holders]
    if not chosen:
        raise ValueError(_no_match(remaining, excluded, dict.fromkeys(holders), config))  # pyright: ignore
    for path in chosen:
        outer = next((other for other in chosen if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"target_modules={config.target_modules!r} means {path!r} and {outer!r}, which holds it; expected one "
                "of them: name the modules themselves"
            )
    _warn_of_idle_names(paths, excluded, {}, config)
    return chosen


def targeted_holder(path: str, config: TunerConfig) -> str | None:
    """The module with this leaf that `config.target_modules` names; None if it names none.

    >>> import jpeft
    >>> targeted_holder("block.norm.scale", jpeft.LNTuningConfig(target_modules=["norm"]))
    'block.norm'
    """
    names = path.split(".")
    holders = [".".join(names[:count]) for count in range(1, len(names))]
    saved = saved_modules(holders, config)
    return next((h for h in holders if _is_asked(h, config) and not _is_excluded(h, config) and h not in saved), None)


def is_all_linear(config: TunerConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def _asked(
    paths: list[str], found: Mapping[str, Candidate], config: TunerConfig
) -> tuple[dict[str, None], list[str], list[str]]:
    """The modules that are taken away, those that remain, and of these the ones that the config means."""
    saved = saved_modules(paths, config)
    excluded = {path: None for path in paths if _is_excluded(path, config) or _is_within(path, saved)}
    remaining = [path for path in paths if path not in excluded]
    if not is_all_linear(config):
        return excluded, remaining, [path for path in remaining if _is_asked(path, config)]
    mixtures = _mixtures(found)
    remaining = [path for path in remaining if path not in mixtures]
    return excluded, remaining, [path for path in remaining if _is_linear(path, found, config)]


def saved_modules(paths: Iterable[str], config: Any) -> list[str]:
    """The modules among `paths` that `config.modules_to_save` means: PEFT asks only that the path ends so.

    A module in a stack is meant if the same module of its layers is.

    >>> import jpeft
    >>> saved_modules(["body", "head", "body.head"], jpeft.LoraConfig(modules_to_save=["head"]))
    ['head', 'body.head']
    """
    names = getattr(config, "modules_to_save", None) or ()
    return [path for path in paths if any(_ends_in(path, name) for name in names)]


def _ends_in(path: str, name: str) -> bool:
    return any(layer.endswith(name) for layer in layer_paths(path) or [path])


def saved_leaves(leaves: Mapping[str, Any], found: Mapping[str, Candidate], config: Any) -> list[str]:
    """The leaves of the modules to save; warns (UserWarning) about names that no module has.

    >>> import jax.numpy as jnp, jpeft
    >>> leaves = {"head.kernel": jnp.ones((2, 2)), "head.bias": jnp.ones(2), "body.kernel": jnp.ones((2, 2))}
    >>> saved_leaves(leaves, {}, jpeft.LoraConfig(modules_to_save=["head"]))
    ['head.kernel', 'head.bias']
    """
    paths = module_paths(leaves, found)
    saved = saved_modules(paths, config)
    names = getattr(config, "modules_to_save", None) or ()
    idle = [name for name in names if not any(path.endswith(name) for path in saved)]
    # PEFT itself lists both names of a classification head, although a model has only one of them.
    if saved:
        idle = [name for name in idle if name not in SEQ_CLS_HEADS]
    if idle:
        warnings.warn(f"modules_to_save names no module of the tree: {_with_nearest(idle, paths)}", stacklevel=3)
    return [path for path in leaves if _is_within(path, saved)]


def bias_leaves(leaves: Mapping[str, Any], sites: Mapping[str, Site], config: Any) -> list[str]:
    """The biases that `config.bias` trains: none, all, or those of the adapted modules.

    >>> import jax.numpy as jnp, jpeft
    >>> leaves = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones(2), "norm.bias": jnp.ones(2)}
    >>> bias_leaves(leaves, {}, jpeft.LoraConfig(bias="all"))
    ['a.bias', 'norm.bias']
    """
    if getattr(config, "bias", "none") == "none":
        return []
    if config.bias == "all":
        return [path for path in leaves if last_name(path) in BIAS_NAMES]
    return [site.bias for site in sites.values() if site.bias is not None]


def _is_within(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _is_excluded(path: str, config: TunerConfig) -> bool:
    return bool(config.exclude_modules) and matches(path, config.exclude_modules or ())


def _is_asked(path: str, config: TunerConfig) -> bool:
    targets = config.target_modules or ()
    if not matches(path, targets):
        return False
    return isinstance(targets, str) or path in targets or _is_in_layers(path, config)


def _is_in_layers(path: str, config: TunerConfig) -> bool:
    """PEFT's rule: the first number of the path that stands after a name (of the layers_pattern) and before another."""
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None or wanted == ():
        return True
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        names = [patterns] if isinstance(patterns, str) else patterns
        found = next(
            filter(None, (re.match(rf"(?:^|.*?\.){checked_regex(name)}\.(\d+)\.", path) for name in names)), None
        )
    layers = (wanted,) if isinstance(wanted, int) else wanted
    return found is not None and int(found[1]) in layers


def _is_linear(path: str, found: Mapping[str, Candidate], config: TunerConfig) -> bool:
    if path not in found or last_name(path) in OUTPUT_EMBEDDINGS:
        return False
    if config.task_type == TaskType.SEQ_CLS and path in SEQ_CLS_HEADS:
        return False
    candidate = found[path]
    # A kernel whose layout is unknown is linear as far as anyone knows; taking it leads to the error that asks for it.
    return candidate.kind == LINEAR or (candidate.kind is None and last_name(candidate.leaf) in WEIGHT_NAMES)


def _mixtures(found: Mapping[str, Candidate]) -> set[str]:
    """The kernels of experts that are stacked in one leaf, and the routers beside them.

    In `transformers` these are parameters of no linear layer, so that "all-linear" does not mean them.
    """
    stacks = {path: found[path] for path in found if last_name(parent(path)) == EXPERTS and found[path].leaf == path}
    counts = {parent(parent(path)): candidate.shape[0] for path, candidate in stacks.items()}
    routers = {path for path in found if found[path].shape[-1] == counts.get(parent(path))}
    return stacks.keys() | routers


def _is_supported(path: str, found: Mapping[str, Candidate], method: Method) -> bool:
    return path in found and (found[path].kind is None or found[path].kind in method.kinds)


def _check_supported(
    asked: list[str],
    supported: Mapping[str, Candidate],
    leaves: Mapping[str, Any],
    found: Mapping[str, Candidate],
    config: TunerConfig,
    method: Method,
) -> None:
    targets = config.target_modules or ()
    for entry in [targets] if isinstance(targets, str) else targets:
        met = [path for path in asked if matches(path, entry if isinstance(targets, str) else [entry])]
        refused = [path for path in met if path not in supported]
        # A regular expression easily meets the containers of the modules that it is meant for.
        if any(path in supported for path in met):
            refused = [path for path in refused if path in found or any(parent(leaf) == path for leaf in leaves)]
        if refused:
            kinds = ", ".join(sorted(method.kinds))
            raise ValueError(
                f"target_modules entry {entry!r} means {_described(refused[0], leaves, found)}, which "
                f"{method.config.__name__} cannot adapt; expected a module of one of the kinds: {kinds}. "
                "Name other modules, or take this one away with exclude_modules"
            )


def _described(path: str, leaves: Mapping[str, Any], found: Mapping[str, Candidate]) -> str:
    if path in found:
        return f"{path!r}, a module of kind {found[path].kind} and weight shape {found[path].shape}"
    own = [f"{last_name(leaf)} {tuple(getattr(leaves[leaf], 'shape', ()))}" for leaf in leaves if parent(leaf) == path]
    if own:
        return f"{path!r}, a module of kind other with the leaves {', '.join(own)}"
    children = sorted({leaf[len(path) + 1 :].split(".")[0] for leaf in leaves if leaf.startswith(f"{path}.")})
    return f"{path!r}, a container of {', '.join(children)}"


def _no_match(
    remaining: list[str], excluded: Iterable[str], found: Mapping[str, Candidate], config: TunerConfig
) -> str:
    targets = config.target_modules or ()
    message = f"target_modules={targets!r} selects no module"
    if any(_is_asked(path, config) for path in excluded):
        return (
            f"{message}: all that it means is taken away by exclude_modules={config.exclude_modules!r} "
            f"or modules_to_save={config.modules_to_save!r}"
        )
    if config.layers_to_transform is not None:
        message += (
            f" with layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} "
            "(layers stacked in one leaf have no number in their path and cannot be chosen so)"
        )
    names = [path for path in remaining if path in found]
    if isinstance(targets, str):
        return f"{message}; the tree's modules are, for example: {', '.join(names[:8]) or 'none with a weight'}"
    return f"{message}; nearest: {_with_nearest(targets, names)}"


def _with_nearest(asked: Iterable[str], paths: Iterable[str]) -> str:
    by_name = {last_name(path): path for path in reversed(list(paths))} | {path: path for path in paths}
    lines = []
    for name in asked:
        near = dict.fromkeys(by_name[close] for close in difflib.get_close_matches(name, by_name, n=3, cutoff=0.5))
        lines.append(f"{name!r} (nearest: {', '.join(near) or ', '.join(list(paths)[:4]) or 'no module'})")
    return "; ".join(lines)


def _examples(found: Mapping[str, Candidate]) -> list[str]:
    return list(dict.fromkeys(last_name(path) for path in found))[:4]


def _warn_of_unknown_layouts(remaining: list[str], found: Mapping[str, Candidate]) -> None:
    unknown = [found[path] for path in remaining if path in found and found[path].layout is None]
    bare = [c for c in unknown if last_name(c.leaf) not in WEIGHT_NAMES and "embed" not in last_name(c.leaf)]
    if bare:
        warnings.warn(
            f"{ALL_LINEAR!r} leaves out what may be linear, for its layout is unknown: "
            f"{', '.join(f'{c.leaf!r} {c.shape}' for c in bare)}; name the layout in layouts=, "
            "or take it away with exclude_modules",
            stacklevel=4,
        )


def _warn_of_idle_names(
    paths: list[str], excluded: Iterable[str], sites: Mapping[str, Site], config: TunerConfig
) -> None:
    if isinstance(config.target_modules, tuple):
        idle = [name for name in config.target_modules if not any(matches(path, [name]) for path in paths)]
        if idle:
            warnings.warn(f"target_modules entries that match no module: {_with_nearest(idle, paths)}", stacklevel=4)
    if config.exclude_modules and not excluded:
        warnings.warn(f"exclude_modules={config.exclude_modules!r} excluded no module", stacklevel=4)
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field, None) or {}
        matching = found_in if field in method_of(config).searched else key_matches
        end = method_of(config).ranked if field == "rank_pattern" else ""
        idle = [key for key in keys if not any(matching(path, key.removesuffix(end)) for path in sites)]
        if idle:
            warnings.warn(f"{field} keys that match no adapted module and were ignored: {idle}", stacklevel=4)
