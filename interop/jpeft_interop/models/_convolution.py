"""Convolutions, stored as the PyTorch modules store them."""

from collections.abc import Sequence

import jax
from flax import nnx

from ._parameters import normal, parameter, whole, zeros

_AXES = {1: "W", 2: "HW"}


class Conv(nnx.Module):
    """A convolution over one or two axes, kernel `(*window, in / groups, out)`: `nn.Conv1d` and `nn.Conv2d`.

    `strides` default to 1, `padding` (zeros on both sides of each axis) to none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        window: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
        groups: int = 1,
        bias: bool = True,
    ):
        rank = len(window)
        axes = (*range(2, rank + 2), 1, 0)
        self.kernel = parameter((*window, in_features // groups, out_features), normal, whole("weight", axes))
        self.bias = parameter((out_features,), zeros, whole("bias", (0,))) if bias else None
        self.strides = (1,) * rank if strides is None else tuple(strides)
        self.padding = tuple((size, size) for size in ((0,) * rank if padding is None else padding))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, *places, in) -> (batch, *places, out)`."""
        axes = _AXES[len(self.strides)]
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            self.strides,
            self.padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
