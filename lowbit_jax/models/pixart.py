"""PixArt-alpha and -Sigma (Chen et al. 2023, 2024): text to image, adaLN-single, cross-attention.

Parameter names follow the published code (fused `qkv` and `kv_linear`). Shape letters: b batch,
c latent channels, y and x rows and columns of the latent picture, t tokens of the picture, s tokens
of the caption, k width.
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
from lowbit_jax.models.attention import CrossAttention, SelfAttention, attention
from lowbit_jax.models.layers import MLP, AdaLN, BlockStack, Linear
from lowbit_jax.models.patches import Grid, PatchEmbedder, picture, position_table
from lowbit_jax.ops import Before


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Sizes of a PixArt; default PixArt-Sigma-XL/2 for 1024 x 1024 pixels.

    Attributes:
        sample_size: rows and columns of the latent picture that positions are scaled to; pictures
            of other sizes, square or not, span the same positions.
        interpolation: positions are divided by this: pixels of a side / 512 in the published ones
            (but 1 in alpha's of 256 pixels).
        patch_size: rows and columns of a patch, one token each.
        in_channels: c, latent channels.
        hidden_size: k, a multiple of 4 (position table) and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        caption_channels: width of the text encoder's states.
        learn_sigma: whether the output also has the c channels of the variance.
        micro_conditions: whether resolution and aspect ratio are inputs; `hidden_size` is then a
            multiple of 3.
        null_caption_length: tokens of the caption for "no text" that the original checkpoints
            store, `params["y_embedder"]["y_embedding"]`; 0 where there is none (diffusers).
        compressed_layers: layers whose keys and values are compressed, in order.
        compression: rows and columns of tokens that become one there.

    Raises:
        ValueError: sizes that do not fit together, no blocks, or layers that there are not.
    """

    sample_size: int = 128
    interpolation: float = 2.0
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    caption_channels: int = 4096
    learn_sigma: bool = True
    micro_conditions: bool = False
    null_caption_length: int = 0
    compressed_layers: tuple[int, ...] = ()
    compression: int = 2

    def __post_init__(self) -> None:
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}"
            )
        divisors = {self.num_heads: f"num_heads {self.num_heads}", 4: "4"}
        if self.micro_conditions:
            divisors[3] = "3, as micro_conditions need"
        for divisor, name in divisors.items():
            if self.hidden_size % divisor:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {name}")
        if self.depth < 1:
            raise ValueError(f"depth {self.depth}: a PixArt has at least one block")
        if not self.interpolation > 0:
            raise ValueError(f"interpolation {self.interpolation} is not above 0")
        if self.compressed_layers and self.compression < 2:
            raise ValueError(
                f"compression {self.compression} of layers {self.compressed_layers} is not from 2"
            )
        if list(self.compressed_layers) != sorted(set(self.compressed_layers) & set(self.layers)):
            raise ValueError(
                f"compressed_layers {self.compressed_layers} are not some of the layers 0 to "
                f"{self.depth - 1}, in order"
            )

    @property
    def layers(self) -> range:
        """Numbers of the blocks."""
        return range(self.depth)

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, and variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def compression_of(self, layer: int) -> int:
        """Rows and columns of tokens that a layer's keys and values make one of; 1 for none."""
        return self.compression if layer in self.compressed_layers else 1


# As their published checkpoints in diffusers' layout have them. The originals also store a null
# caption: of 120 tokens (alpha), of 300 (Sigma).
PIXART_ALPHA_256 = PixArtConfig(sample_size=32, interpolation=1.0)
PIXART_ALPHA_512 = PixArtConfig(sample_size=64, interpolation=1.0)
PIXART_ALPHA_1024_MS = PixArtConfig(sample_size=128, interpolation=2.0, micro_conditions=True)
PIXART_SIGMA_256 = PixArtConfig(sample_size=32, interpolation=0.5)
PIXART_SIGMA_512_MS = PixArtConfig(sample_size=64, interpolation=1.0)
PIXART_SIGMA_1024_MS = PixArtConfig(sample_size=128, interpolation=2.0)
PIXART_SIGMA_2K_MS = PixArtConfig(sample_size=256, interpolation=4.0)


class CellMean(nn.Module):
    """Every channel's weighted mean over cells of tokens: a depthwise convolution, stride its size.

    `weight` is as PyTorch has it, (k, 1, size, size). Rows and columns that fill no cell are left
    out.
    """

    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... y x k"]) -> Float[Array, "... y2 x2 k"]:
        """One token for every cell."""
        size, (*batch, rows, columns, width) = self.size, x.shape
        mean = nn.initializers.constant(size**-2)
        weight = self.param("weight", mean, (width, 1, size, size), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        rows, columns = rows // size, columns // size
        whole = x[..., : rows * size, : columns * size, :]
        cells = whole.reshape(*batch, rows, size, columns, size, width)
        out = jnp.einsum(
            "...yixjk,kij->...yxk",
            cells,
            jnp.asarray(weight)[:, 0].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return (out + jnp.asarray(bias).astype(jnp.float32)).astype(self.dtype)


class CompressedAttention(nn.Module):
    """Self-attention with one key and value for every cell of tokens (PixArt-Sigma, section 3.2).

    Attributes:
        heads: attention heads.
        cell: rows and columns of tokens in a cell.
        grid: rows and columns of tokens in the picture.
        dtype: of activations and products.
    """

    heads: int
    cell: int
    grid: Grid
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t k"],
        *,
        before: Before | None = None,
        gate: Float[Array, "b k"] | None = None,
        residual: Float[Array, "b t k"] | None = None,
    ) -> Float[Array, "b t k"]:
        """Attend from all tokens to the cells; arguments as `attention.SelfAttention` has them.

        Raises:
            ValueError: a picture of less than one cell.
        """
        if min(self.grid) < self.cell:
            raise ValueError(f"a picture of {self.grid} patches has no cell of {self.cell}")
        b, t, width = x.shape
        qkv = Linear(3 * width, dtype=self.dtype, name="qkv")
        q, *rest = qkv(x, before=before, parts=3 * (width,))
        kv = jnp.stack(rest).reshape(2, b, *self.grid, width)
        cells = CellMean(self.cell, self.dtype, name="sr")(kv)
        norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")
        k, v = norm(cells).reshape(2, b, -1, self.heads, width // self.heads)
        out = attention(q.reshape(b, t, self.heads, -1), k, v).reshape(x.shape)
        return Linear(width, dtype=self.dtype, name="proj")(out, gate=gate, residual=residual)


class Block(nn.Module):
    """Self-attention, cross-attention to the caption, MLP; adaLN-single shifts, scales and gates.

    Attributes:
        config: sizes.
        cell: see `CompressedAttention`; 1 for plain attention.
        grid: rows and columns of tokens in the picture.
        dtype: of activations and products.
    """

    config: PixArtConfig
    cell: int
    grid: Grid
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t k"],
        caption: Float[Array, "b s k"],
        mask: Bool[Array, "b s"],
        mod: Float[Array, "b 6 k"],
    ) -> tuple[Float[Array, "b t k"]]:
        """Update the tokens; `mod` is the same for all blocks, which add a table of their own."""
        config, dtype, heads = self.config, self.dtype, self.config.num_heads
        mod = mod + scale_shift_table(self, 6, config.hidden_size)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(mod, 1, 0)
        attend = (
            SelfAttention(heads, dtype, name="attn")
            if self.cell == 1
            else CompressedAttention(heads, self.cell, self.grid, dtype, name="attn")
        )
        x = attend(x, before=AdaLN(shift1, scale1), gate=gate1, residual=x)
        cross = CrossAttention(heads, dtype, name="cross_attn")
        x = cross(x, caption, mask, residual=x)  # no norm
        mlp = MLP(4 * config.hidden_size, config.hidden_size, dtype, name="mlp")
        return (mlp(x, before=AdaLN(shift2, scale2), gate=gate2, residual=x),)


class PixArtTransformer(nn.Module):
    """PixArt: (noisy latents, step, caption) -> noise, and variance where it is learned.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each block in the backward pass instead of storing it.
    """

    config: PixArtConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b c y x"],
        timestep: Float[Array, "b"] | Int[Array, "b"],
        caption: Float[Array, "b s c"],
        caption_mask: Bool[Array, "b s"] | Int[Array, "b s"],
        resolution: Float[Array, "b 2"] | None = None,
        aspect_ratio: Float[Array, "b"] | None = None,
    ) -> Float[Array, "b out y x"]:
        """Predicted noise (channels 0..c-1), then what the variance is interpolated by.

        Args:
            x: noisy latents of any size in whole patches.
            timestep: diffusion step, 0 to 999 for a model trained on 1000; not divided by 1000.
            caption: last states of the text encoder.
            caption_mask: True (or 1) for tokens, False (0) for padding, which has no influence. A
                caption of nothing but padding makes its picture NaN.
            resolution: height and width of the whole picture in pixels; with micro-conditions only.
            aspect_ratio: height / width; with micro-conditions only.

        Raises:
            ValueError: latents or captions that do not fit, micro-conditions that are missing or
                that the model does not have.
        """
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        inputs = (x, caption, caption_mask, resolution, aspect_ratio)
        _check_inputs(config, *(None if i is None else jnp.shape(i) for i in inputs))
        grid = x.shape[2] // config.patch_size, x.shape[3] // config.patch_size
        base = config.sample_size // config.patch_size
        embed = PatchEmbedder(width, config.patch_size, dtype, name="x_embedder")
        positions = position_table(grid, width, base=base, interpolation=config.interpolation)
        tokens = (embed(x.astype(dtype)) + positions).astype(dtype)

        time = embed_number(timestep, width, dtype, "t_embedder")
        if resolution is not None and aspect_ratio is not None:
            pixels = embed_number(jnp.ravel(resolution), width // 3, dtype, "csize_embedder")
            size = pixels.reshape(len(x), -1)  # height and width side by side
            ratio = embed_number(aspect_ratio, width // 3, dtype, "ar_embedder")
            time = time + jnp.concatenate([size, ratio], axis=-1)
        mod = Linear(6 * width, dtype=dtype, name="t_block")(nn.silu(time))
        mask = jnp.asarray(caption_mask, bool)
        embed_caption = CaptionEmbedder(width, config.null_caption_length, dtype, name="y_embedder")
        caption = embed_caption(caption, mask)

        def block(layer: int) -> Block:
            return Block(config, config.compression_of(layer), grid, dtype, parent=None)

        stack = BlockStack(block, config.depth, remat=self.remat, name="blocks")
        (tokens,) = stack((tokens,), caption, mask, mod.reshape(-1, 6, width))
        features = config.patch_size**2 * config.out_channels
        out = FinalLayer(features, dtype, name="final_layer")(tokens, time)
        return picture(out, config.patch_size, grid)


def _check_inputs(config: PixArtConfig, x, caption, mask, resolution, aspect_ratio) -> None:
    """Compare shapes (None for an absent micro-condition) with what a config needs."""
    batch, patch = x[0], config.patch_size
    if x[1] != config.in_channels or x[2] % patch or x[3] % patch or not x[2] * x[3]:
        raise ValueError(
            f"latents have shape {x[1:]}; this PixArt needs {config.in_channels} channels and rows "
            f"and columns in multiples of {patch}"
        )
    check_caption(caption, mask, batch, config.caption_channels)
    needed = ((batch, 2), (batch,)) if config.micro_conditions else (None, None)
    if (resolution, aspect_ratio) != needed:
        raise ValueError(
            f"resolution and aspect_ratio have shapes {resolution} and {aspect_ratio}; "
            f"this PixArt needs {needed[0]} and {needed[1]}"
        )


def abstract_params(config: PixArtConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    side = config.sample_size
    arguments = [
        shape((1, config.in_channels, side, side), jnp.float32),
        shape((1,), jnp.float32),
        shape((1, 1, config.caption_channels), jnp.float32),
        shape((1, 1), jnp.bool_),
    ]
    if config.micro_conditions:
        arguments += [shape((1, 2), jnp.float32), shape((1,), jnp.float32)]
    params = jax.eval_shape(PixArtTransformer(config).init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
