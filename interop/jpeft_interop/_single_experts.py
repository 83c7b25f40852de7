"""Adapters of mixtures whose experts were modules of their own, as before `transformers` 5: read as those of a stack.

Gate and up projection are one product since. Theirs is the sum of two ranks: the factors A one above the other, the
factors B in the blocks of a diagonal.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

import jpeft
from jpeft._patterns import matches, value_for

from ._experts_layout import experts_to_file
from ._listed import listed

OLD_BLOCK, BLOCK = "block_sparse_moe", "mlp"

GATES, UPS, DOWNS = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")

_KEY = re.compile(
    r"base_model\.model\.(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight"
)

Parts = dict[str, dict[int, dict[str, np.ndarray]]]
"""{name of a projection: {expert: {side: tensor}}}."""


def with_stacked_experts(
    path: Path,
    config: jpeft.PeftConfig,
    tensors: Mapping[str, np.ndarray],
    leaves: Iterable[str],
    modules: Iterable[str],
) -> tuple[jpeft.PeftConfig, dict[str, np.ndarray]]:
    """The config and the tensors of a file for a tree whose experts are stacked; any other file's as they are.

    path: the file's, for messages. leaves, modules: paths in the base tree. Raises ValueError if experts are missing
    or of different ranks. Warns (UserWarning) if there is dropout, which stacked experts do not have.
    """
    stacks = {leaf.rpartition(".")[0] for leaf in leaves if leaf.endswith(".experts.gate_up_proj")}
    renamed = {key.replace(f".{OLD_BLOCK}.", f".{BLOCK}."): tensor for key, tensor in tensors.items()}
    found: dict[str, Parts] = {}
    rest: dict[str, np.ndarray] = {}
    for key, tensor in renamed.items():
        part = _KEY.fullmatch(key)
        if part is None or part["experts"] not in stacks:
            rest[key] = tensor
            continue
        experts = found.setdefault(part["experts"], {}).setdefault(part["name"], {})
        experts.setdefault(int(part["number"]), {})[part["side"]] = tensor
    if not found or not isinstance(config, jpeft.LoraConfig):
        return config, dict(tensors)
    settings: dict[str, tuple[int, float]] = {}
    for module, parts in found.items():
        arrays = {name: _stacked(path, f"{module}.*.{name}", own) for name, own in parts.items()}
        scalings = {name: _scaling(f"{module}.0.{name}", a.shape[1], config) for name, (a, b) in arrays.items()}
        fused = _fused(arrays, scalings)
        for name, (a, b, scaling) in fused.items():
            nested = ".base_layer" if name == "gate_up_proj" and "down_proj" in fused else ""
            rest[f"base_model.model.{module}{nested}.lora_A.weight"] = experts_to_file(a, "lora_A")
            rest[f"base_model.model.{module}{nested}.lora_B.weight"] = experts_to_file(b, "lora_B")
            rank = a.shape[1]
            alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
            settings[f"{module}.{name}"] = (rank, int(alpha) if alpha == int(alpha) else alpha)
    return _with_parameters(config, settings, stacks, modules), rest


def _stacked(path: Path, name: str, own: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    sides = {side: [own.get(number, {}).get(side) for number in range(max(own) + 1)] for side in "AB"}
    shapes = {side: {None if tensor is None else tensor.shape for tensor in sides[side]} for side in "AB"}
    if any(len(shapes[side]) > 1 or None in shapes[side] for side in "AB"):
        raise ValueError(
            f"{path}: the experts of {name} are stacked here, but their tensors are missing or of other shapes: "
            f"lora_A {listed(map(str, shapes['A']))}, lora_B {listed(map(str, shapes['B']))}; expected them all alike"
        )
    a, b = (np.stack([tensor for tensor in sides[side] if tensor is not None]) for side in "AB")
    return a, b


def _scaling(module: str, rank: int, config: jpeft.LoraConfig) -> float:
    alpha = value_for(module, config.alpha_pattern, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _fused(
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], scalings: Mapping[str, float]
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """{parameter: (A (experts, rank, in), B (experts, out, rank), scaling)}."""
    found = {}
    gate, up, down = (next((name for name in names if name in arrays), None) for names in (GATES, UPS, DOWNS))
    halves = [name for name in (gate, up) if name]
    if halves:
        scaling = scalings[halves[0]]
        experts, out, _ = arrays[halves[0]][1].shape
        b = np.zeros((experts, 2 * out, sum(arrays[name][0].shape[1] for name in halves)), arrays[halves[0]][1].dtype)
        start = 0
        for name in halves:
            part, first = arrays[name][1], 0 if name == gate else out
            b[:, first : first + out, start : start + part.shape[2]] = part * (scalings[name] / scaling)
            start += part.shape[2]
        found["gate_up_proj"] = (np.concatenate([arrays[name][0] for name in halves], axis=1), b, scaling)
    if down:
        found["down_proj"] = (*arrays[down], scalings[down])
    return found


def _with_parameters(
    config: jpeft.LoraConfig, settings: Mapping[str, tuple[int, float]], stacks: set[str], modules: Iterable[str]
) -> jpeft.LoraConfig:
    names = dict.fromkeys(path.rpartition(".")[2] for path in settings)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    targets: list[str] = []
    for name in names:
        own = {path: value for path, value in settings.items() if path.endswith(f".{name}")}
        everywhere = len(own) == len(stacks)
        targets += [name] if everywhere else own
        alike = everywhere and len(set(own.values())) == 1
        for pattern, (rank, alpha) in ({rf".*\.{name}": next(iter(own.values()))} if alike else own).items():
            if (rank, alpha) != (config.r, config.lora_alpha):
                ranks[pattern if alike else re.escape(pattern)] = rank
                alphas[pattern if alike else re.escape(pattern)] = alpha
    if config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} is read as 0.0, for the experts are stacked, which have none",
            stacklevel=5,
        )
    old = config.target_modules
    if isinstance(old, str):
        kept = old.replace(OLD_BLOCK, BLOCK)
    else:
        others = [path for path in modules if not any(path.startswith(f"{stack}.") for stack in stacks)]
        new = [name.replace(OLD_BLOCK, BLOCK) for name in old or ()]
        kept = tuple(name for name in new if any(matches(path, [name]) for path in others))
    return dataclasses.replace(
        config,
        target_modules=kept,
        target_parameters=(*(config.target_parameters or ()), *targets),
        rank_pattern={**ranks, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
        lora_dropout=0.0,
    )
