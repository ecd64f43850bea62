"""Videos as tokens: patches of (frames, rows, columns), kept apart by frame, and their positions.

Shape letters: b batch, c latent channels, f frames, y and x rows and columns of the latent video;
t patches of one frame, p numbers of one patch, k width.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from lowbit_jax.models.adaln_single import scale_shift_table
from lowbit_jax.models.attention import CrossAttention, SelfAttention
from lowbit_jax.models.layers import MLP, AdaLN, Linear
from lowbit_jax.ops import over_tokens

Size = tuple[int, int, int]  # frames, rows, columns


def frame_positions(frames: int, width: int, scale: float = 1.0) -> Float[np.ndarray, "f k"]:
    """Fixed positions `i / scale` of the frames: [sin, cos] at 10000^(-i / (width/2)); float32."""
    omega = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(frames)[:, None] / scale * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def check_latents(shape: tuple[int, ...], channels: int, size: Size) -> None:
    """Compare the shape (b, c, f, y, x) of latents with a network's channels and patches.

    Raises:
        ValueError: another number of axes or channels, or parts of a patch.
    """
    whole = len(shape) == 5 and all(n and n % p == 0 for n, p in zip(shape[2:], size, strict=True))
    if not whole or shape[1] != channels:
        raise ValueError(
            f"latents have shape {shape[1:]}; this network needs {channels} channels, and frames, "
            f"rows and columns in multiples of {size}"
        )


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


class VideoBlock(nn.Module):
    """Self-attention in space or time, cross-attention to the caption, MLP; adaLN-single.

    Attributes:
        heads: attention heads.
        dtype: of activations and products.
        temporal: attend over the frames of each patch; otherwise over the patches of each frame.
        qk_norm: see `attention.SelfAttention`.
    """

    heads: int
    dtype: Any
    temporal: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f t k"],
        mod: Float[Array, "b ... 6 k"],
        context: tuple[Float[Array, "b s k"], Bool[Array, "b s"]] | None = None,
        angles: Float[Array, "n d2"] | None = None,
    ) -> Float[Array, "b f t k"]:
        """Update the tokens.

        Args:
            x: tokens.
            mod: what all blocks share, per sample (b, 6, k) or per frame (b, f, 6, k).
            context: embedded caption, and which of its tokens may be attended to; None leaves the
                cross-attention out, and its parameters.
            angles: rotary positions of what is attended over; see `attention.apply_rotary`.
        """
        width = x.shape[-1]
        mod = mod + scale_shift_table(self, 6, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(mod, -2, 0)
        attend = SelfAttention(self.heads, self.dtype, self.qk_norm, name="attn")
        before = AdaLN(shift1, scale1)
        if self.temporal:  # frames are the rows now: a vector per frame is none per sample
            out = attend(jnp.swapaxes(before(x), 1, 2), angles)
            x = x + over_tokens(gate1, x) * jnp.swapaxes(out, 1, 2)
        else:
            x = attend(x, angles, before=before, gate=gate1, residual=x)
        if context is not None:
            cross = CrossAttention(self.heads, self.dtype, name="cross_attn")
            tokens = x.reshape(len(x), -1, width)
            x = cross(tokens, *context, residual=tokens).reshape(x.shape)  # no norm
        mlp = MLP(4 * width, width, self.dtype, name="mlp")
        return mlp(x, before=AdaLN(shift2, scale2), gate=gate2, residual=x)
