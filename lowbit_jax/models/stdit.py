"""STDiT of Open-Sora 1.0 (Zheng et al. 2024): text to video, adaLN-single; every block attends in
space, then in time, then to the caption.

Parameter names follow the published code. Shape letters: b batch, c latent channels, f frames,
y and x rows and columns of the latent video, s tokens of the caption, t patches of one frame,
k width.
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
    scale_shift_table,
)
from lowbit_jax.models.attention import CrossAttention, SelfAttention
from lowbit_jax.models.layers import MLP, AdaLN, BlockStack, Linear
from lowbit_jax.models.patches import position_table
from lowbit_jax.models.video import (
    Size,
    VideoEmbedder,
    check_latents,
    frame_positions,
    join_video,
    patch_grid,
)


@dataclass(frozen=True, kw_only=True)
class STDiTConfig:
    """Sizes of an STDiT; default STDiT-XL/2 for 16 x 512 x 512 pixels.

    Attributes:
        input_size: frames, rows and columns of the latents it was trained on; the published files
            hold position tables of this size. Latents of other sizes run: patch i of an axis has
            position i / scale.
        space_scale: positions in space are divided by this.
        time_scale: positions in time are divided by this.
        patch_size: frames, rows and columns of a patch.
        in_channels: c, latent channels.
        hidden_size: k, a multiple of 4 (position table) and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        caption_channels: width of the text encoder's states.
        null_caption_length: tokens of the stored caption for "no text".
        learn_sigma: whether the output also has the c channels of the variance.

    Raises:
        ValueError: sizes that do not fit together, or no blocks.
    """

    input_size: Size = (16, 64, 64)
    space_scale: float = 1.0
    time_scale: float = 1.0
    patch_size: Size = (1, 2, 2)
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    caption_channels: int = 4096
    null_caption_length: int = 120
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        check_latents((1, self.in_channels, *self.input_size), self.in_channels, self.patch_size)
        for divisor, name in ((self.num_heads, f"num_heads {self.num_heads}"), (4, "4")):
            if self.hidden_size % divisor:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {name}")
        if self.depth < 1:
            raise ValueError(f"depth {self.depth}: an STDiT has at least one block")
        if min(self.space_scale, self.time_scale) <= 0:
            raise ValueError(
                f"space_scale {self.space_scale} and time_scale {self.time_scale} divide positions"
            )

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, and variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid(self) -> Size:
        """Patches of the trained size: along frames, rows and columns."""
        return patch_grid(self.input_size, self.patch_size)


STDIT_XL_2_16X256 = STDiTConfig(input_size=(16, 32, 32), space_scale=0.5)
STDIT_XL_2_16X512 = STDiTConfig()
STDIT_XL_2_64X512 = STDiTConfig(input_size=(64, 64, 64), time_scale=2 / 3)


class Block(nn.Module):
    """Attention in space, in time and to the caption, then an MLP; adaLN-single.

    The temporal attention is not normalised or modulated, and has the gate of the spatial one.
    """

    config: STDiTConfig
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
        """The carry: the tokens, and no positions, as only the first block adds them.

        `mod` is the same for all blocks, which add a table of their own.
        """
        width, heads, dtype = x.shape[-1], self.config.num_heads, self.dtype
        mod = mod + scale_shift_table(self, 6, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(mod, 1, 0)
        attend = SelfAttention(heads, dtype, name="attn")
        x = attend(x, before=AdaLN(shift1, scale1), gate=gate1, residual=x)
        by_patch = jnp.swapaxes(x, 1, 2)
        attend = SelfAttention(heads, dtype, name="attn_temp")
        by_patch = attend(by_patch + positions, gate=gate1, residual=by_patch)
        tokens = jnp.swapaxes(by_patch, 1, 2).reshape(len(x), -1, width)
        cross = CrossAttention(heads, dtype, name="cross_attn")
        x = cross(tokens, caption, mask, residual=tokens).reshape(x.shape)  # no norm
        mlp = MLP(4 * width, width, dtype, name="mlp")
        x = mlp(x, before=AdaLN(shift2, scale2), gate=gate2, residual=x)
        return x, jnp.zeros_like(positions)


class STDiTTransformer(nn.Module):
    """STDiT: (noisy latents, step, caption) -> noise, and variance where it is learned.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each block in the backward pass instead of storing it.
    """

    config: STDiTConfig
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
            x: noisy latents of any number of frames and any size, in whole patches. (The published
                code pads other sizes and then fails.)
            timestep: diffusion step, 0 to 999 for a model trained on 1000; not divided by 1000.
            caption: last states of the text encoder; for "no text" `params["y_embedder"]
                ["y_embedding"]`, with the mask of the caption it is guided against.
            caption_mask: True (or 1) for tokens, False (0) for padding, which has no influence. A
                caption of nothing but padding makes its video NaN.

        Raises:
            ValueError: latents or captions that do not fit.
        """
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        check_latents(x.shape, config.in_channels, config.patch_size)
        check_caption(caption.shape, caption_mask.shape, len(x), config.caption_channels)
        frames, rows, columns = patch_grid(x.shape, config.patch_size)
        embed = VideoEmbedder(width, config.patch_size, dtype, name="x_embedder")
        positions = position_table((rows, columns), width, interpolation=config.space_scale)
        tokens = (embed(x) + positions).astype(dtype)

        time = embed_number(timestep, width, dtype, "t_embedder")
        mod = Linear(6 * width, dtype=dtype, name="t_block")(nn.silu(time)).reshape(-1, 6, width)
        mask = jnp.asarray(caption_mask, bool)
        embed_caption = CaptionEmbedder(width, config.null_caption_length, dtype, name="y_embedder")
        in_time = jnp.asarray(frame_positions(frames, width, config.time_scale), dtype)
        block = Block(config, dtype, parent=None)
        stack = BlockStack(lambda layer: block, config.depth, remat=self.remat, name="blocks")
        tokens, _ = stack((tokens, in_time), mod, embed_caption(caption, mask), mask)
        pf, py, px = config.patch_size
        final = FinalLayer(pf * py * px * config.out_channels, dtype, name="final_layer")
        return join_video(final(tokens, time), x.shape, config.patch_size)


def abstract_params(config: STDiTConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    model = STDiTTransformer(config)
    params = jax.eval_shape(
        model.init,
        jax.random.key(0),
        shape((1, config.in_channels, *config.patch_size), jnp.float32),
        shape((1,), jnp.float32),
        shape((1, 1, config.caption_channels), jnp.float32),
        shape((1, 1), jnp.bool_),
    )["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
