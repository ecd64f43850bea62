"""STDiT3 of Open-Sora 1.2 (Zheng et al. 2024): text to video of any size, rate and length.

Pairs of a spatial and a temporal block, each with cross-attention; RMS-normalised queries and keys;
rotary positions in time. The published `spatial_blocks.i` and `temporal_blocks.i` are
`blocks/i/spatial` and `blocks/i/temporal`, other parameter names follow the published code. Shape
letters: b batch, c latent channels, f frames, y and x rows and columns of the latent video,
s tokens of the caption, t patches of one frame, k width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num

from lowbit_jax.models.adaln_single import (
    CaptionEmbedder,
    FinalLayer,
    check_caption,
    embed_number,
)
from lowbit_jax.models.attention import rotary_angles
from lowbit_jax.models.layers import BlockStack, Linear
from lowbit_jax.models.patches import Grid
from lowbit_jax.models.video import (
    Size,
    VideoBlock,
    VideoEmbedder,
    check_latents,
    join_video,
    patch_grid,
)


@dataclass(frozen=True, kw_only=True)
class STDiT3Config:
    """Sizes of an STDiT3; default STDiT3-XL/2 as published.

    Attributes:
        base_resolution: positions in space are divided by sqrt(height * width) / this, in pixels.
        patch_size: frames, rows and columns of a patch.
        in_channels: c, latent channels.
        hidden_size: k, a multiple of 4 (positions) and of `num_heads`.
        pairs: number of pairs of blocks.
        num_heads: attention heads; of an even width, which is rotated in pairs.
        caption_channels: width of the text encoder's states.
        null_caption_length: tokens of the stored caption for "no text".
        learn_sigma: whether the output has c more channels (there in the published model, unused by
            rectified flow).
        qk_norm: whether queries and keys are RMS-normalised.

    Raises:
        ValueError: sizes that do not fit together, or no blocks.
    """

    base_resolution: int = 512
    patch_size: Size = (1, 2, 2)
    in_channels: int = 4
    hidden_size: int = 1152
    pairs: int = 28
    num_heads: int = 16
    caption_channels: int = 4096
    null_caption_length: int = 300
    learn_sigma: bool = True
    qk_norm: bool = True

    def __post_init__(self) -> None:
        divisors = {
            self.num_heads: f"num_heads {self.num_heads}",
            2 * self.num_heads: f"2 x num_heads {self.num_heads}, as rotary positions need",
            4: "4",
        }
        for divisor, name in divisors.items():
            if self.hidden_size % divisor:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {name}")
        if self.pairs < 1:
            raise ValueError(f"pairs {self.pairs}: an STDiT3 has at least one pair of blocks")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads


STDIT3_XL_2 = STDiT3Config()
STDIT3_3B_2 = STDiT3Config(hidden_size=1872, num_heads=26)


def resolution_positions(grid: Grid, width: int, scale: Num[Array, "b"]) -> Float[Array, "b t k"]:
    """Positions of the patches of a frame: half of the channels for the column, half for the row.

    Patch i of n on an axis is at `i / scale * side / n`, where `side` is that of a square of as
    many patches; then [sin, cos] at frequencies 10000^(-i / (width/4)), in float32.

    Args:
        grid: rows and columns of patches.
        width: k, a multiple of 4.
        scale: of each video: sqrt(height * width) in pixels / `base_resolution`.
    """
    side = round((grid[0] * grid[1]) ** 0.5)
    omega = (10000.0 ** (-np.arange(width // 4) / (width // 4))).astype(np.float32)

    def half(n: int) -> Array:
        positions = np.arange(n, dtype=np.float32) * (side / n) / scale[:, None]
        angles = positions[..., None] * omega
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    halves = half(grid[1])[:, None], half(grid[0])[:, :, None]
    full = [jnp.broadcast_to(part, (len(scale), *grid, width // 2)) for part in halves]
    return jnp.concatenate(full, axis=-1).reshape(len(scale), -1, width)


class Pair(nn.Module):
    """A spatial and a temporal block."""

    config: STDiT3Config
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f t k"],
        mod: Float[Array, "b ... 6 k"],
        caption: Float[Array, "b s k"],
        mask: Bool[Array, "b s"],
        angles: Float[Array, "f d2"],
    ):
        """Update the tokens; a 1-tuple (the carry of the stack)."""
        options = {
            "heads": self.config.num_heads,
            "dtype": self.dtype,
            "qk_norm": self.config.qk_norm,
        }
        x = VideoBlock(**options, name="spatial")(x, mod, (caption, mask))
        in_time = VideoBlock(**options, temporal=True, name="temporal")
        return (in_time(x, mod, (caption, mask), angles),)


class STDiT3Transformer(nn.Module):
    """STDiT3: (noisy latents, time, caption, sizes) -> velocity, from noise to data.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each pair in the backward pass instead of storing it.
    """

    config: STDiT3Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b c f y x"],
        timestep: Num[Array, "b"],
        caption: Float[Array, "b s c"],
        caption_mask: Bool[Array, "b s"] | Int[Array, "b s"],
        fps: Num[Array, "b"],
        height: Num[Array, "b"],
        width: Num[Array, "b"],
        frame_mask: Bool[Array, "b f"] | None = None,
    ) -> Float[Array, "b out f y x"]:
        """Velocity (channels 0..c-1: data minus noise), then c channels without a use.

        Args:
            x: noisy latents of any size; zeros fill the last patches, and are cut off again.
            timestep: time of rectified flow, 0 (data) to 1000 (noise).
            caption: last states of the text encoder; for "no text" `params["y_embedder"]
                ["y_embedding"]`, with the mask of the caption it is guided against.
            caption_mask: True (or 1) for tokens, False (0) for padding, which has no influence. A
                caption of nothing but padding makes its video NaN.
            fps: frames per second of the video.
            height: of the video in pixels.
            width: of the video in pixels. (The published code scales all positions by the first
                video's sizes, this one each video by its own.)
            frame_mask: False for frames (of patches) that are given, which are modulated as at time
                0; True for those to be made. None makes all.

        Raises:
            ValueError: latents, captions or a frame mask that do not fit.
        """
        config, dtype, features = self.config, self.dtype, self.config.hidden_size
        check_latents(x.shape, config.in_channels, (1, 1, 1))
        check_caption(caption.shape, caption_mask.shape, len(x), config.caption_channels)
        frames, *grid = patch_grid(x.shape, config.patch_size)
        if frame_mask is not None and frame_mask.shape != (len(x), frames):
            raise ValueError(
                f"frame_mask has shape {frame_mask.shape}; these latents need {(len(x), frames)}"
            )
        area = jnp.asarray(height, jnp.float32) * jnp.asarray(width, jnp.float32)
        scale = jnp.sqrt(area) / config.base_resolution
        positions = resolution_positions((grid[0], grid[1]), features, scale)
        embed = VideoEmbedder(features, config.patch_size, dtype, name="x_embedder")
        tokens = (embed(x) + positions[:, None]).astype(dtype)

        time = self._time(timestep, fps, frame_mask)
        mod = Linear(6 * features, dtype=dtype, name="t_block")(nn.silu(time))
        mod = mod.reshape(*mod.shape[:-1], 6, features)
        mask = jnp.asarray(caption_mask, bool)
        embed_caption = CaptionEmbedder(
            features, config.null_caption_length, dtype, name="y_embedder"
        )
        angles = rotary_angles(jnp.arange(frames)[:, None], (config.head_dim,))
        pair = Pair(config, dtype, parent=None)
        stack = BlockStack(lambda layer: pair, config.pairs, remat=self.remat, name="blocks")
        (tokens,) = stack((tokens,), mod, embed_caption(caption, mask), mask, angles)
        pf, py, px = config.patch_size
        final = FinalLayer(pf * py * px * config.out_channels, dtype, name="final_layer")
        return join_video(final(tokens, time), x.shape, config.patch_size)

    def _time(self, timestep, fps, frame_mask) -> Float[Array, "b ... k"]:
        """The embedding of time and rate, per video, or per frame if some are given."""
        features, dtype = self.config.hidden_size, self.dtype
        rate = embed_number(fps, features, dtype, "fps_embedder")
        if frame_mask is None:
            return embed_number(timestep, features, dtype, "t_embedder") + rate
        both = jnp.ravel(jnp.stack([timestep, jnp.zeros_like(timestep)], axis=1))
        embedded = embed_number(both, features, dtype, "t_embedder").reshape(-1, 2, features)
        time = jnp.where(frame_mask[..., None], embedded[:, :1], embedded[:, 1:])
        return time + rate[:, None]


def abstract_params(config: STDiT3Config, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    model = STDiT3Transformer(config)
    number = shape((1,), jnp.float32)
    params = jax.eval_shape(
        model.init,
        jax.random.key(0),
        shape((1, config.in_channels, *config.patch_size), jnp.float32),
        number,
        shape((1, 1, config.caption_channels), jnp.float32),
        shape((1, 1), jnp.bool_),
        fps=number,
        height=number,
        width=number,
    )["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
