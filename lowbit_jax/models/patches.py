"""Pictures as tokens: patches and back, and their fixed sin-cos positions; shared by the DiTs.

Shape letters: b batch, c latent channels, y and x rows and columns of the latent picture, t tokens,
k width. A grid is (rows, columns) of patches; tokens go row by row.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lowbit_jax.models.layers import Linear

Grid = tuple[int, int]


def position_table(
    grid: Grid, width: int, *, base: float | None = None, interpolation: float = 1.0
) -> Float[Array, "t k"]:
    """Fixed sin-cos positions of a picture; float32.

    Half of the channels for the column, half for the row, each [sin, cos] at frequencies
    10000^(-i / (width/4)), computed in float64. On an axis of n patches the positions are
    `i / (n / base) / interpolation` in float32, as PixArt's code has them: a picture of any size
    spans what one of `base` patches does.

    Args:
        grid: rows and columns.
        width: k, a multiple of 4.
        base: patches that positions are scaled to; None counts them, as DiT does.
        interpolation: divides all positions (PixArt: pixels of a side / 512).
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = (
        np.arange(n, dtype=np.float32) / (n / (base or n)) / interpolation for n in grid
    )
    row, column = (
        np.concatenate([wave(axis[:, None] * omega) for wave in (np.sin, np.cos)], axis=-1)
        for axis in (rows, columns)
    )
    # one axis each is a constant of the compiled program, their (large) table is not
    halves = jnp.asarray(column, jnp.float32)[None], jnp.asarray(row, jnp.float32)[:, None]
    full = [jnp.broadcast_to(half, (*grid, width // 2)) for half in halves]
    return jnp.concatenate(full, axis=-1).reshape(-1, width)


def patches(x: Float[Array, "b c y x"], size: int) -> Float[Array, "b t c_p_p"]:
    """Cut into `size` x `size` patches, row by row; inside a patch "c row column"."""
    b, c, height, width = x.shape
    cut = x.reshape(b, c, height // size, size, width // size, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * size * size)


def picture(x: Float[Array, "b t p_p_c"], size: int, grid: Grid) -> Float[Array, "b c y x"]:
    """Join patches laid out "row column c", as the final layers make them."""
    b = x.shape[0]
    rows, columns = grid
    cut = x.reshape(b, rows, columns, size, size, -1)
    return cut.transpose(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * size, columns * size)


class PatchEmbedder(nn.Module):
    """A linear over flattened patches: the published convolution, whose stride is its size."""

    features: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b c y x"]) -> Float[Array, "b t k"]:
        """Embed every patch."""
        return Linear(self.features, dtype=self.dtype, name="proj")(patches(x, self.patch_size))
