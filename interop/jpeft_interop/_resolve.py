"""What PEFT makes of a config when it meets the model: "all-linear" as names, the head among the modules to save."""

import dataclasses
from collections.abc import Iterable, Sequence

from jpeft._config import PeftConfig, PromptLearningConfig, TaskType, TunerConfig
from jpeft._targets import ALL_LINEAR, saved_modules

from ._fields import format_of

HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Modules that PEFT trains and saves in full for a task, whatever the config says; without them it cannot load."""

_WITH_MODULES = (TunerConfig, PromptLearningConfig)

MANY = 20
"""From this number of target modules on PEFT writes the shortest names that still tell them apart."""


def with_heads(config: PeftConfig, paths: Iterable[str]) -> PeftConfig:
    """The config with the head of its task among the modules to save, if the model has that head.

    paths: of the model's modules.

    >>> import jpeft
    >>> with_heads(jpeft.LoraConfig(task_type="SEQ_CLS"), ["bert", "classifier"]).modules_to_save
    ('classifier', 'score')
    """
    heads = HEADS.get(config.task_type) if isinstance(config.task_type, TaskType) else None
    if heads is None or not isinstance(config, _WITH_MODULES) or "modules_to_save" in format_of(config).lacks:
        return config
    paths, named = list(paths), config.modules_to_save or ()
    present = saved_modules(paths, dataclasses.replace(config, modules_to_save=heads))
    if set(present) <= set(saved_modules(paths, config)):
        return config
    return dataclasses.replace(config, modules_to_save=(*named, *(head for head in heads if head not in named)))


def with_named_targets(config: PeftConfig, adapted: Sequence[str], paths: Iterable[str]) -> PeftConfig:
    """The config with the names of the adapted modules where it says "all-linear", as PEFT writes it.

    adapted: paths of the adapted modules. paths: of all of the model's modules, both as they are in PyTorch.
    """
    if not isinstance(config, TunerConfig) or not isinstance(config.target_modules, str):
        return config
    if config.target_modules.lower() != ALL_LINEAR:
        return config
    names = sorted(adapted) if len(adapted) < MANY else shortest_names(adapted, set(paths) - set(adapted))
    return dataclasses.replace(config, target_modules=tuple(names))


def shortest_names(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest trailing parts of paths that mean all the wanted modules and none of the others.

    >>> shortest_names(["layers.0.q_proj", "layers.1.q_proj"], ["layers.0", "layers.0.norm", "head"])
    ['q_proj']
    """
    taken = {ending for path in others for ending in _endings(path)}
    chosen: dict[str, None] = {}
    for path in sorted(wanted):
        if not any(ending in chosen for ending in _endings(path)):
            # A path that others end in can only be named in full; a list's entry means the module that equals it, too.
            chosen[next((ending for ending in _endings(path) if ending not in taken), path)] = None
    return sorted(chosen)


def _endings(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[first:]) for first in range(len(names) - 1, -1, -1)]


def check_replicated(config: PeftConfig, paths: Iterable[str]) -> None:
    """Raise ValueError if a config is of a model with replicated layers, and no list of modules has as many.

    paths: of the model's modules.

    >>> import jpeft
    >>> check_replicated(jpeft.LoraConfig(layer_replication=[[0, 1], [0, 1]]), ["layers.0", "layers.1"])
    """
    ranges = getattr(config, "layer_replication", None) or ()
    expected = sum(end - start for start, end in ranges)
    counts: dict[str, int] = {}
    for path in paths:
        holder, _, name = path.rpartition(".")
        if name.isdigit():
            counts[holder] = max(counts.get(holder, 0), int(name) + 1)
    if expected and expected not in counts.values():
        found = ", ".join(f"{count} in {holder!r}" for holder, count in counts.items()) or "none"
        raise ValueError(
            f"the adapter is for a model of {expected} layers, layer_replication={[list(r) for r in ranges]!r}, but "
            f"there are: {found}; build it with jpeft_interop.models.replicate_layers(model, layer_replication)"
        )
