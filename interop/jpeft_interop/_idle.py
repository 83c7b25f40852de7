"""Arguments of PEFT's that say how PyTorch is to work: taken, and answered with a warning that they do nothing."""

import warnings
from typing import Any

_WHY = {
    "torch_device": "what is read from a file is on JAX's default device; jax.device_put(model.params, ...) moves it",
    "ephemeral_gpu_offload": "nothing is kept away from the device that computes",
    "svd_driver": "JAX's backend chooses how it decomposes",
    "svd_full_matrices": "the factors that are kept are the same either way",
}


def warn_idle(**given: Any) -> None:
    """Warn (UserWarning) of each argument that was given, that is, not None.

    >>> warn_idle(torch_device=None)
    """
    for name, value in given.items():
        if value is not None:
            warnings.warn(f"{name}={value!r} does nothing here: {_WHY[name]}", stacklevel=3)
