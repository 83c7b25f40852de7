"""Whether an adapter's folder holds what its config says, and whether PyTorch PEFT agrees: `verify`."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jpeft
from jpeft._contract import method_of
from jpeft._paths import parent
from jpeft._patterns import matches, value_for
from jpeft._targets import saved_modules

from ._config_json import read_config
from ._files import read_tensors
from ._keys import PREFIX, TOKENS
from ._listed import listed
from ._pair import find_pair, is_unfinished
from ._resolve import with_heads
from ._surplus import EMBEDDINGS
from ._tied import HEAD

_LORA = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?"
)
_FULL = re.compile(re.escape(PREFIX) + r"(?P<path>.+?)(\.(base_layer|original_module|modules_to_save))?\.[^.]+")


VARIANT_NAMES = {
    "use_dora": ("lora_magnitude_vector",),
    "lora_bias": ("lora_B.bias",),
    "kasa_config": ("lora_diag",),
    "velora_config": ("lora_velora_embed",),
    "monteclora_config": tuple(
        f"lora_monteclora_sampler.{name}"
        for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
    ),
}
"""By the field that asks for a variant of LoRA, what its file holds besides."""


@dataclass(frozen=True)
class Report:
    """What a verified folder holds. torch: whether PyTorch PEFT loaded it, too."""

    directory: Path
    peft_type: str
    modules: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    torch: bool


def verify(directory: str | os.PathLike[str], torch_model: Any = None) -> Report:
    """Check the folder of an adapter, and say what is in it.

    Without a model: the config is understood, the weights can be read, every key is one that the config accounts
    for, the two sides of each module are there and of the rank that the config gives it, and the adapter is not zero.
    torch_model: the PyTorch base model, which is copied; then PyTorch PEFT loads the adapter into it, and every
    tensor has to arrive, none may be missing or unexpected, and the adapter must change the model.
    Raises FileNotFoundError for absent files, and ValueError with all that is wrong.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> from jpeft_interop import save_pretrained
    >>> config = jpeft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_pretrained(wrapped, directory)
    ...     verify(directory).parameters
    20
    """
    folder = Path(directory).expanduser()
    files = find_pair(folder)
    tensors = read_tensors(files.weights)
    config = with_heads(read_config(files.config), [key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors])
    problems = list(_problems(config, tensors))
    if is_unfinished(folder):
        problems.append("a save was interrupted, so that PyTorch PEFT may not see the new adapter; save it again")
    elif torch_model is not None and not problems:
        from ._torch import problems_in_torch

        problems += problems_in_torch(folder, tensors, torch_model)
    if problems:
        raise ValueError(f"{folder} is not an adapter that can be relied on: {'; '.join(problems)}")
    return Report(
        directory=folder,
        peft_type=getattr(config.peft_type, "value", str(config.peft_type)),
        modules=len(_sides(tensors) if isinstance(config, jpeft.LoraConfig) else _targets_in(config, tensors)),
        tensors=len(tensors),
        parameters=sum(tensor.size for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype) for tensor in tensors.values()})),
        torch=torch_model is not None,
    )


def _problems(config: jpeft.PeftConfig, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    of_lora = isinstance(config, jpeft.LoraConfig)
    yield from _problems_of_lora(config, tensors) if of_lora else _problems_of_others(config, tensors)


def _problems_of_others(config: jpeft.PeftConfig, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Of a method whose arrays are not known here: each tensor is of a target, of the whole model, or explained."""
    shared = [key for key in tensors if not key.startswith(PREFIX)]
    if not _targets_in(config, tensors) and not shared:
        yield f"it has no tensor of a module that target_modules={getattr(config, 'target_modules', None)!r} means"
    rest = [key for key in tensors if key not in shared and not _target_of(key, config)]
    if unexplained := [key for key in rest if not _is_explained(key, config)]:
        yield f"keys that the config does not account for: {listed(unexplained)}"


def _targets_in(config: jpeft.PeftConfig, tensors: Mapping[str, np.ndarray]) -> set[str]:
    return {module for module in (_target_of(key, config) for key in tensors) if module}


def _target_of(key: str, config: jpeft.PeftConfig) -> str | None:
    """The target whose tensor a key names; None if it is of none."""
    names = key.removeprefix(PREFIX).split(".")
    holders = [".".join(names[:count]) for count in range(1, len(names))]
    return next((module for module in holders if _is_target(module, config)), None)


def _problems_of_lora(config: jpeft.LoraConfig, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    sides, misshapen = _sides(tensors), []
    if not sides:
        yield f"it has no tensor {PREFIX}<module>.lora_A.weight"
    if lone := [module for module, arrays in sides.items() if arrays.keys() != {"A", "B"}]:
        yield f"modules with one of lora_A and lora_B alone: {listed(lone)}"
    for module, arrays in sides.items():
        rank = value_for(module, config.rank_pattern, config.r)
        if not _is_target(module, config) and _may_hold_targets(module, config) and len(arrays) == 2:
            # Of a parameter: which one the key does not say, nor how many experts it stacks.
            rank = arrays["A"].shape[0]
        shapes = {side: array.shape for side, array in arrays.items()}
        blocks = getattr(config.use_bdlora, "nblocks", 1)
        fits = {"A": ((rank,),), "B": ((rank,), (rank // blocks,))}
        axis = {"A": slice(0, 1), "B": slice(1, 2)}
        misshapen += [
            f"{module}.lora_{side} {s} (rank {rank})" for side, s in shapes.items() if s[axis[side]] not in fits[side]
        ]
    if misshapen:
        yield f"tensors of another rank than the config gives them: {listed(misshapen)}"
    if strange := [module for module in sides if not (_is_target(module, config) or _may_hold_targets(module, config))]:
        yield f"modules that target_modules={config.target_modules!r} does not mean: {listed(strange)}"
    own = [f".{name}" for field, names in VARIANT_NAMES.items() if getattr(config, field) for name in names]
    rest = [key for key in tensors if not _LORA.fullmatch(key) and not key.endswith(tuple(own))]
    if unexplained := [key for key in rest if not _is_explained(key, config)]:
        yield f"keys that the config does not account for: {listed(unexplained)}"
    if config.arrow_config is not None:
        return  # of a router nothing but its config counts
    if sides and not any(np.any(array) for arrays in sides.values() for side, array in arrays.items() if side == "B"):
        yield "lora_B is zero in every module, so the adapter changes nothing"
    elif sides and not any(np.any(array) for arrays in sides.values() for side, array in arrays.items() if side == "A"):
        yield "lora_A is zero in every module, so the adapter changes nothing"


def _sides(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"A": array, "B": array}} of the tensors that are LoRA's by their keys."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        found = _LORA.fullmatch(key)
        if found and bool(found["embedding"]) != bool(found["weight"]):
            sides.setdefault(found["module"], {})[found["side"]] = array
    return sides


def _is_target(module: str, config: Any) -> bool:
    if module == HEAD and (getattr(config, "ensure_weight_tying", False) or method_of(config).rows is not None):
        return True
    targets, excluded = (getattr(config, name, None) or () for name in ("target_modules", "exclude_modules"))
    if isinstance(config, jpeft.AdaptionPromptConfig):
        targets = (str(config.target_modules),)  # a name, and no regular expression
    return matches(module, targets) and not matches(module, excluded)


def _may_hold_targets(module: str, config: jpeft.LoraConfig) -> bool:
    """Whether the module, wrapped or not, may be that of a parameter among the targets."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    holders = [parent(name) for name in config.target_parameters or ()]
    return any(not holder or matches(module, [holder]) for holder in holders)


def _is_explained(key: str, config: Any) -> bool:
    found = _FULL.fullmatch(key)
    if found is None:
        return False
    if key.endswith(f".{TOKENS}"):
        return getattr(config, "trainable_token_indices", None) is not None
    names = found["path"].split(".")
    holders = [".".join(names[:count]) for count in range(1, len(names) + 1)]
    trained = getattr(config, "bias", "none")
    bias = key.endswith(".bias") and (trained == "all" or (trained.endswith("_only") and ".base_layer." in key))
    return bias or bool(saved_modules(holders, config)) or names[-1] in EMBEDDINGS or "embed" in names[-1]
