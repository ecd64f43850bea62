"""Latte's text-to-video model (Latte-1): pairs of a spatial block with cross-attention to the
caption and a temporal block without, adaLN-single.

Parameter names are PixArt's; the pair i of diffusers' `transformer_blocks.i` and
`temporal_transformer_blocks.i` is `blocks/i/spatial` and `blocks/i/temporal`. Shape letters:
b batch, c latent channels, f frames, y and x rows and columns of the latent video, s tokens of the
caption, t patches of one frame, k width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lowbit_jax.models.adaln_single import (
    CaptionEmbedder,
    FinalLayer,
    check_caption,
    embed_number,
)
from lowbit_jax.models.layers import BlockStack, Linear
from lowbit_jax.models.patches import position_table
from lowbit_jax.models.video import (
    Size,
    VideoBlock,
    VideoEmbedder,
    check_latents,
    frame_positions,
    join_video,
    patch_grid,
)


@dataclass(frozen=True, kw_only=True)
class LatteT2VConfig:
    """Sizes of a text-to-video Latte; default Latte-1 for 16 x 512 x 512 pixels.

    Attributes:
        sample_size: rows and columns of the latent frames that positions are scaled to; frames of
            other sizes, square or not, span the same positions.
        num_frames: frames of the videos it was trained on. Others run: frame i has position i.
        patch_size: rows and columns of a patch.
        in_channels: c, latent channels.
        hidden_size: k, a multiple of 4 (position table) and of `num_heads`.
        pairs: number of pairs of blocks.
        num_heads: attention heads.
        caption_channels: width of the text encoder's states.
        learn_sigma: whether the output also has the c channels of the variance.

    Raises:
        ValueError: sizes that do not fit together, or no blocks.
    """

    sample_size: int = 64
    num_frames: int = 16
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    pairs: int = 28
    num_heads: int = 16
    caption_channels: int = 4096
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}"
            )
        for divisor, name in ((self.num_heads, f"num_heads {self.num_heads}"), (4, "4")):
            if self.hidden_size % divisor:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {name}")
        if self.pairs < 1:
            raise ValueError(f"pairs {self.pairs}: a Latte has at least one pair of blocks")

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, and variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch(self) -> Size:
        """Frames, rows and columns of a patch."""
        return 1, self.patch_size, self.patch_size

    @property
    def interpolation(self) -> float:
        """What positions are divided by: diffusers' rule, one for every 512 pixels of a side."""
        return max(self.sample_size // 64, 1)


LATTE_1 = LatteT2VConfig()


class Pair(nn.Module):
    """A spatial block with cross-attention and a temporal one without."""

    config: LatteT2VConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f t k"],
        positions: Float[Array, "f k"],
        mod: Float[Array, "b 6 k"],
        caption: Float[Array, "b s k"],
        mask: Bool[Array, "b s"],
    ):
        """The carry: the tokens, and no positions, as only the first pair adds them."""
        heads = self.config.num_heads
        x = VideoBlock(heads, self.dtype, name="spatial")(x, mod, (caption, mask))
        x = x + positions[:, None]
        x = VideoBlock(heads, self.dtype, temporal=True, name="temporal")(x, mod)
        return x, jnp.zeros_like(positions)


class LatteT2VTransformer(nn.Module):
    """Latte-1: (noisy latents, step, caption) -> noise, and variance where it is learned.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each pair in the backward pass instead of storing it.
    """

    config: LatteT2VConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b c f y x"],
        timestep: Float[Array, "b"] | Int[Array, "b"],
        caption: Float[Array, "b s c"],
        caption_mask: Bool[Array, "b s"] | Int[Array, "b s"],
    ) -> Float[Array, "b out f y x"]:
        """Predicted noise (channels 0..c-1), then what the variance is interpolated by.

        Args:
            x: noisy latents of any number of frames and any size in whole patches.
            timestep: diffusion step, 0 to 999 for a model trained on 1000; not divided by 1000.
            caption: last states of the text encoder.
            caption_mask: True (or 1) for tokens, False (0) for padding, which has no influence. A
                caption of nothing but padding makes its video NaN.

        Raises:
            ValueError: latents or captions that do not fit.
        """
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        check_latents(x.shape, config.in_channels, config.patch)
        check_caption(caption.shape, caption_mask.shape, len(x), config.caption_channels)
        frames, rows, columns = patch_grid(x.shape, config.patch)
        base = config.sample_size // config.patch_size
        positions = position_table(
            (rows, columns), width, base=base, interpolation=config.interpolation
        )
        embed = VideoEmbedder(width, config.patch, dtype, name="x_embedder")
        tokens = (embed(x) + positions).astype(dtype)

        time = embed_number(timestep, width, dtype, "t_embedder")
        mod = Linear(6 * width, dtype=dtype, name="t_block")(nn.silu(time)).reshape(-1, 6, width)
        mask = jnp.asarray(caption_mask, bool)
        caption = CaptionEmbedder(width, 0, dtype, name="y_embedder")(caption, mask)
        # a picture, one frame, has no position in time
        in_time = jnp.asarray(frame_positions(frames, width) * (frames > 1), dtype)
        pair = Pair(config, dtype, parent=None)
        stack = BlockStack(lambda layer: pair, config.pairs, remat=self.remat, name="blocks")
        tokens, _ = stack((tokens, in_time), mod, caption, mask)
        features = config.patch_size**2 * config.out_channels
        out = FinalLayer(features, dtype, name="final_layer")(tokens, time)
        return join_video(out, x.shape, config.patch)


def abstract_params(config: LatteT2VConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    model = LatteT2VTransformer(config)
    params = jax.eval_shape(
        model.init,
        jax.random.key(0),
        shape((1, config.in_channels, 2, config.sample_size, config.sample_size), jnp.float32),
        shape((1,), jnp.float32),
        shape((1, 1, config.caption_channels), jnp.float32),
        shape((1, 1), jnp.bool_),
    )["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
