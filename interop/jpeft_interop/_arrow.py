"""Arrow: a model that sends each token to those of several saved adapters that fit it best."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jpeft

from ._peft_model import PeftModel

ROUTER, TASK_PREFIX, GENERAL_PREFIX = "arrow_router", "task_", "gks_"


def create_arrow_model(
    base_model: Any,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: jpeft.ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model with saved LoRA adapters, "task_0" and so on, and the active adapter "arrow_router" that chooses.

    base_model: as for `get_peft_model`. task_specific_adapter_paths: folders, or Hub ids, also "owner/name/subfolder".
    general_adapter_paths: those whose mean is subtracted from the others, "gks_0" and so on, if
    `arrow_config.use_gks`; else they are not read, with a UserWarning. adapter_kwargs: of `PeftModel.from_pretrained`.
    The router is made once: after other adapters were loaded or trained, make it anew with
    `jpeft.create_arrow_adapter`. Saving writes a folder each; `load_adapter` of the router's asks for its adapters
    under their names. PyTorch's PEFT writes adapters from which general knowledge was subtracted already, once the
    model has run: read those with use_gks=False.
    Raises ValueError for no paths at all, and what `from_pretrained` and `jpeft.create_arrow_adapter` raise.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> from jpeft_interop import save_pretrained
    >>> params = {"q": {"kernel": jnp.ones((4, 6))}}
    >>> config = jpeft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_pretrained(jpeft.wrap(params, config), directory)
    ...     base = (lambda params, x: x @ params["q"]["kernel"], params)
    ...     model = create_arrow_model(base, [directory, directory], jpeft.ArrowConfig(top_k=1))
    >>> list(model.peft_config), model.active_adapter
    (['task_0', 'task_1', 'arrow_router'], 'arrow_router')
    """
    if isinstance(task_specific_adapter_paths, str) or not task_specific_adapter_paths:
        raise ValueError(f"task_specific_adapter_paths is {task_specific_adapter_paths!r}; expected a list of paths")
    tasks = _named(TASK_PREFIX, task_specific_adapter_paths)
    general = _named(GENERAL_PREFIX, general_adapter_paths or ())
    if general and not arrow_config.use_gks:
        warnings.warn(
            f"general_adapter_paths are {list(general.values())}, but use_gks of the ArrowConfig is False; they are "
            "not read",
            stacklevel=2,
        )
        general = {}
    first, *others = {**tasks, **general}.items()
    model = PeftModel.from_pretrained(base_model, adapter_name=first[0], **_source(first[1], adapter_kwargs))
    for name, path in others:
        model.load_adapter(adapter_name=name, **_source(path, adapter_kwargs))
    model.params = jpeft.create_arrow_adapter(model.params, list(tasks), arrow_config, list(general), ROUTER)
    model.set_adapter(ROUTER)
    return model


def _named(prefix: str, paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    return {f"{prefix}{index}": os.fspath(path) for index, path in enumerate(paths)}


def _source(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that mean a path: what comes after a Hub id's two names is a subfolder."""
    owner, *rest = path.strip("/").split("/")
    if Path(path).expanduser().is_dir() or os.path.isabs(path) or len(rest) < 2:
        return {"model_id": path, **given}
    return {"model_id": f"{owner}/{rest[0]}", "subfolder": "/".join(rest[1:]), **given}
