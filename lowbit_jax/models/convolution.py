"""Convolutions as layers that take a float kernel or a quantised one, like `layers.Linear`.

Shape letters: b batch, y rows, x columns, c channels, k = c * rows * columns of the window, n out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import ops
from lowbit_jax.models.layers import Linear

Dtype = Any


class Conv(Linear):
    """Convolution over rows and columns; its kernel is the matrix (k, n) that `Linear` would have.

    k counts channels, then rows, then columns of the window, as a PyTorch weight (n, c, rows,
    columns) flattened and transposed: so one table, one quantiser and one file format serve both. A
    quantised kernel is multiplied with the windows themselves, k numbers for each pixel; a float
    one is convolved without making them.

    Attributes:
        window: rows and columns of the kernel, the same number.
        stride: pixels from one window to the next.
        padding: zeros before and after each axis of pixels; None to keep the size (odd windows).
    """

    window: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 n"]:  # type: ignore[override]
        """Convolve.

        Raises:
            ValueError: the stored kernel does not fit, with both shapes.
        """
        channels, n, window = x.shape[-1], self.features, (self.window, self.window)
        k = channels * self.window**2
        kernel = self._leaf("kernel", nn.initializers.lecun_normal(), (k, n))
        bias = self._leaf("bias", nn.initializers.zeros, (n,)) if self.use_bias else None
        x = x.astype(self.dtype)
        form: dict[str, Any] = {
            "window_strides": (self.stride, self.stride),
            "padding": [self.padding or (self.window // 2, self.window // 2)] * 2,
        }
        if not isinstance(kernel, jax.Array | np.ndarray):
            windows = lax.conv_general_dilated_patches(
                x,
                window,
                dimension_numbers=("NHWC", "OIHW", "NHWC"),
                precision=lax.Precision.HIGHEST,  # a product with ones: nothing may be rounded
                **form,
            )
            return ops.linear(windows, kernel, bias)
        weights = jnp.asarray(kernel, self.dtype).reshape(channels, *window, n)
        y = lax.conv_general_dilated(x, weights, dimension_numbers=("NHWC", "IHWO", "NHWC"), **form)
        return y if bias is None else y + bias.astype(self.dtype)


def upsample_nearest(x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 c"]:
    """Twice the rows and columns, every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
