"""From images to tokens: patches, the token of the class, the positions of patches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ._convolution import Conv

Size = tuple[int, int]
"""Height and width."""

TOKEN_LAYOUTS = {r".*embeddings\.cls_token": "bvo", r".*embeddings\.mask_token": "vo"}
"""For `jpeft.wrap`: tokens that a model learns are rows of a table, not the weights of a linear layer."""


def read_size(value: int | Sequence[int]) -> Size:
    """The height and width that a config gives, or the one number that is both.

    >>> read_size(16), read_size([16, 8])
    ((16, 16), (16, 8))
    """
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def number_of_patches(image: Size, patch: Size) -> int:
    """How many patches an image is cut into; what is left at its edges is none."""
    return (image[0] // patch[0]) * (image[1] // patch[1])


def patch_convolution(config: Any, *, bias: bool = True) -> Conv:
    """The layer that makes a token of each patch."""
    return Conv(config.num_channels, config.hidden_size, config.patch_size, strides=config.patch_size, bias=bias)


def embed_patches(projection: Conv, pixel_values: jax.Array | None, dtype: DTypeLike | None) -> jax.Array:
    """`(batch, channels, height, width) -> (batch, patches, features)`, row by row, in `dtype` or the kernel's.

    Raises ValueError for another shape, or if there is no image.
    """
    channels = projection.kernel.shape[-2]
    if pixel_values is None or pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        given = None if pixel_values is None else pixel_values.shape
        raise ValueError(f"pixel_values must be (batch, {channels} channels, height, width), got {given}")
    x = jnp.moveaxis(pixel_values, 1, -1).astype(projection.kernel.dtype if dtype is None else dtype)
    x = projection(x)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def check_size(pixel_values: jax.Array, image: Size) -> None:
    """Raise ValueError unless the images have the size of the config."""
    if pixel_values.shape[2:] != image:
        raise ValueError(
            f"pixel_values are {pixel_values.shape[2]} x {pixel_values.shape[3]}, the model's image_size is "
            f"{image[0]} x {image[1]}: resize the images"
        )


def with_class_token(token: jax.Array, x: jax.Array) -> jax.Array:
    """`x (batch, patches, features)` with the token (of as many features) before the first patch."""
    first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1)


def resized_positions(positions: jax.Array, image: Size, patch: Size) -> jax.Array:
    """`positions (1, 1 + patches, features)` of a square image as those of an `image`; the class keeps its own.

    As they are if the image is a square of as many patches, otherwise by bicubic interpolation. Raises ValueError if
    they are not those of a square.
    """
    known = positions.shape[1] - 1
    if image[0] == image[1] and number_of_patches(image, patch) == known:
        return positions
    side = math.isqrt(known)
    if side * side != known:
        raise ValueError(
            f"{known} positions are not those of a square image, so there are none for {image[0]} x {image[1]}"
        )
    grid = positions[0, 1:].astype(jnp.float32).reshape(side, side, -1)
    rows, columns = bicubic(side, image[0] // patch[0]), bicubic(side, image[1] // patch[1])
    resized = jnp.einsum("hi,wj,ijf->hwf", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    resized = resized.reshape(1, -1, positions.shape[-1]).astype(positions.dtype)
    return jnp.concatenate([positions[:, :1], resized], axis=1)


def bicubic(known: int, wanted: int) -> np.ndarray:
    """The matrix `(wanted, known)` that interpolates a row of values, as PyTorch does without antialiasing.

    Keys' cubic kernel with a slope of -0.75 (JAX's is -0.5), between centres of pixels; the values at the ends go on
    beyond them.

    >>> bicubic(2, 2)
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    weights = np.zeros((wanted, known))
    places = (np.arange(wanted) + 0.5) * known / wanted - 0.5
    for tap in range(-1, 3):
        nearby = np.floor(places) + tap
        np.add.at(weights, (np.arange(wanted), np.clip(nearby, 0, known - 1).astype(int)), _keys(places - nearby))
    return weights.astype(np.float32)


def _keys(distance: np.ndarray, slope: float = -0.75) -> np.ndarray:
    x = np.abs(distance)
    near = (slope + 2) * x**3 - (slope + 3) * x**2 + 1
    far = slope * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


class PatchEmbeddings(nnx.Module):
    def __init__(self, config: Any):
        self.projection = patch_convolution(config)
