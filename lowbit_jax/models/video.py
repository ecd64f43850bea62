"""Videos as tokens: patches of (frames, rows, columns), kept apart by frame, and their positions.

Shape letters: b batch, c latent channels, f frames, y and x rows and columns of the latent video;
t patches of one frame, p numbers of one patch, k width.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lowbit_jax.models.layers import Linear

Size = tuple[int, int, int]  # frames, rows, columns


def frame_positions(frames: int, width: int, scale: float = 1.0) -> Float[np.ndarray, "f k"]:
    """Fixed positions `i / scale` of the frames: [sin, cos] at 10000^(-i / (width/2)); float32."""
    omega = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(frames)[:, None] / scale * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def patch_grid(shape: tuple[int, ...], size: Size) -> Size:
    """Patches along each axis of a video (..., f, y, x); a part of a patch counts as one."""
    frames, rows, columns = (-(-n // p) for n, p in zip(shape[-3:], size, strict=True))
    return frames, rows, columns


def video_patches(x: Float[Array, "b c f y x"], size: Size) -> Float[Array, "b f t p"]:
    """Cut into patches, row by row; inside a patch "c frame row column", as a convolution has it.

    Zeros are appended to an axis that is no multiple of its patch.
    """
    b, c, *sizes = x.shape
    (f, rows, columns), (pf, py, px) = patch_grid(x.shape, size), size
    missing = [-n % p for n, p in zip(sizes, size, strict=True)]
    x = jnp.pad(x, [(0, 0), (0, 0), *((0, n) for n in missing)])
    cut = x.reshape(b, c, f, pf, rows, py, columns, px).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(b, f, rows * columns, c * pf * py * px)


def join_video(
    x: Float[Array, "b f t p"], shape: tuple[int, ...], size: Size
) -> Float[Array, "b c f y x"]:
    """Join patches laid out "frame row column c", as the final layers make them.

    Args:
        x: the patches.
        shape: (..., f, y, x) of the video; what lies beyond it is cut off.
        size: of a patch.
    """
    (f, rows, columns), (pf, py, px) = patch_grid(shape, size), size
    cut = x.reshape(len(x), f, rows, columns, pf, py, px, -1).transpose(0, 7, 1, 4, 2, 5, 3, 6)
    whole = cut.reshape(len(x), -1, f * pf, rows * py, columns * px)
    return whole[:, :, : shape[-3], : shape[-2], : shape[-1]]


class VideoEmbedder(nn.Module):
    """A linear over flattened patches: the published convolution, whose stride is its size."""

    features: int
    patch_size: Size
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b c f y x"]) -> Float[Array, "b f t k"]:
        """Embed every patch."""
        tokens = video_patches(x.astype(self.dtype), self.patch_size)
        return Linear(self.features, dtype=self.dtype, name="proj")(tokens)
