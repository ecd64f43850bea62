"""DiT (Peebles & Xie 2023): a class-conditional diffusion transformer with adaLN-Zero blocks.

Parameter names follow facebook's code (fused `qkv`; one timestep and one label embedder for all
blocks). Shape letters: b batch, c latent channels, s sample size, t tokens, k width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lowbit_jax.models.layers import (
    AdaLN,
    BlockStack,
    Gelu,
    Linear,
    MLPEmbedder,
    attention,
    split_heads,
    timestep_embedding,
)

TIME_DIM = 256  # width of the sinusoidal embedding of time


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a DiT; default DiT-XL/2 for 256 x 256 pixels as diffusers has it.

    diffusers departs from facebook's code in two numbers, so that both are fields: `time_shift`
    (facebook 0) and `mlp_norm_eps` (facebook 1e-6).

    Attributes:
        sample_size: rows and columns of the latent picture; a multiple of `patch_size`.
        patch_size: rows and columns of a patch, one token each.
        in_channels: c, latent channels.
        hidden_size: k, a multiple of 4 (position table) and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: labels 0 to num_classes - 1; `num_classes` itself is the unconditional label.
        learn_sigma: whether the output also has the c channels of the variance.
        time_shift: the time frequencies are 10000^(-i / (128 - time_shift)).
        mlp_norm_eps: epsilon of the norm before each MLP; the other norms have 1e-6.

    Raises:
        ValueError: sizes that do not fit together, or no blocks.
    """

    sample_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    learn_sigma: bool = True
    time_shift: int = 1
    mlp_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}"
            )
        for divisor, name in ((self.num_heads, f"num_heads {self.num_heads}"), (4, "4")):
            if self.hidden_size % divisor:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {name}")
        if self.depth < 1:
            raise ValueError(f"depth {self.depth}: a DiT has at least one block")

    @property
    def grid(self) -> int:
        """Rows and columns of patches."""
        return self.sample_size // self.patch_size

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLPs."""
        return 4 * self.hidden_size

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, and variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def dit(size: str, patch_size: int, sample_size: int = 32) -> DiTConfig:
    """DiT-`size`/`patch_size` of table 1 of the paper; sizes are the keys of `SIZES`."""
    hidden_size, depth, num_heads = SIZES[size]
    return DiTConfig(
        sample_size=sample_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
    )


DIT_XL_2_256 = dit("XL", 2)
DIT_XL_2_512 = dit("XL", 2, sample_size=64)


def position_table(grid: int, width: int) -> Float[np.ndarray, "t k"]:
    """Fixed sin-cos positions of a `grid` x `grid` picture, row by row; float32.

    Half of the channels for the column, half for the row, each [sin, cos] at frequencies
    10000^(-i / (width/4)); computed in float64.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def patches(x: Float[Array, "b c s s"], size: int) -> Float[Array, "b t c_p_p"]:
    """Cut into `size` x `size` patches, row by row; inside a patch "c row column"."""
    b, c, s, _ = x.shape
    cut = x.reshape(b, c, s // size, size, s // size, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(b, (s // size) ** 2, c * size * size)


def picture(x: Float[Array, "b t p_p_c"], size: int, channels: int) -> Float[Array, "b c s s"]:
    """Join patches laid out "row column c", as the final layer makes them."""
    b, t, _ = x.shape
    grid = round(t**0.5)
    cut = x.reshape(b, grid, grid, size, size, channels)
    return cut.transpose(0, 5, 1, 3, 2, 4).reshape(b, channels, grid * size, grid * size)


class PatchEmbedder(nn.Module):
    """A linear over flattened patches: the published convolution, whose stride is its size."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b c s s"]) -> Float[Array, "b t k"]:
        """Embed every patch."""
        tokens = patches(x, self.config.patch_size)
        return Linear(self.config.hidden_size, dtype=self.dtype, name="proj")(tokens)


class LabelEmbedder(nn.Module):
    """One vector per class and one, the last, for no class."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, labels: Int[Array, "b"]) -> Float[Array, "b k"]:
        """Look labels up; a label outside 0..num_classes gives NaN."""
        shape = (self.config.num_classes + 1, self.config.hidden_size)
        table = self.param("embedding_table", nn.initializers.normal(0.02), shape, jnp.float32)
        rows = jnp.asarray(table).at[labels]
        out = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return out.astype(self.dtype)


class Attention(nn.Module):
    """Fused qkv, softmax attention, output projection, on a residual stream."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t k"], before: AdaLN, gate: Float[Array, "b k"]
    ) -> Float[Array, "b t k"]:
        """x plus the gated result of attending over all tokens."""
        width = self.config.hidden_size
        qkv = Linear(3 * width, dtype=self.dtype, name="qkv")(x, before=before)
        out = attention(*split_heads(qkv, self.config.num_heads)).reshape(x.shape)
        return Linear(width, dtype=self.dtype, name="proj")(out, gate=gate, residual=x)


class MLP(nn.Module):
    """Linear, tanh GELU, Linear, on a residual stream."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t k"], before: AdaLN, gate: Float[Array, "b k"]
    ) -> Float[Array, "b t k"]:
        """x plus the gated result."""
        hidden = Linear(self.config.mlp_size, dtype=self.dtype, name="fc1")(x, before=before)
        out = Linear(self.config.hidden_size, dtype=self.dtype, name="fc2")
        return out(hidden, before=Gelu(), gate=gate, residual=x)


class Block(nn.Module):
    """adaLN-Zero: attention and MLP, each shifted, scaled and gated by the condition."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t k"], condition: Float[Array, "b k"]):
        """Update the tokens; `condition` is SiLU(c). Returns a 1-tuple (the carry of the stack)."""
        config, dtype = self.config, self.dtype
        mod = Linear(6 * config.hidden_size, dtype=dtype, name="adaLN_modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mod, 6, axis=-1)
        x = Attention(config, dtype, name="attn")(x, AdaLN(shift1, scale1), gate1)
        before = AdaLN(shift2, scale2, config.mlp_norm_eps)
        return (MLP(config, dtype, name="mlp")(x, before, gate2),)


class FinalLayer(nn.Module):
    """AdaLN (shift, scale) and the projection to the pixels of every patch."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t k"], condition: Float[Array, "b k"]):
        """Patches, inside a patch "row column c"; `condition` is SiLU(c)."""
        config = self.config
        mod = Linear(2 * config.hidden_size, dtype=self.dtype, name="adaLN_modulation")(condition)
        shift, scale = jnp.split(mod, 2, axis=-1)
        features = config.patch_size**2 * config.out_channels
        return Linear(features, dtype=self.dtype, name="linear")(x, before=AdaLN(shift, scale))


class DiTTransformer(nn.Module):
    """The DiT: (noisy latents, step, class) -> noise, and variance where it is learned.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each block in the backward pass instead of storing it.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b c s s"],
        timestep: Float[Array, "b"] | Int[Array, "b"],
        labels: Int[Array, "b"],
    ) -> Float[Array, "b out s s"]:
        """Predicted noise (channels 0..c-1), then what the variance is interpolated by.

        Args:
            x: noisy latents of exactly the config's sample size, as the position table is fixed.
            timestep: diffusion step, 0 to 999 for a model trained on 1000; not divided by 1000.
            labels: classes; `config.num_classes` for none (classifier-free guidance). A label out
                of range makes its picture NaN.

        Raises:
            ValueError: latents of another size or number of channels.
        """
        config = self.config
        needed = (config.in_channels, config.sample_size, config.sample_size)
        if x.shape[1:] != needed:
            raise ValueError(f"latents have shape {x.shape[1:]}, this DiT needs {needed}")
        tokens = PatchEmbedder(config, self.dtype, name="x_embedder")(x.astype(self.dtype))
        positions = position_table(config.grid, config.hidden_size)
        tokens = (tokens + positions).astype(self.dtype)
        time = timestep_embedding(timestep, TIME_DIM, scale=1.0, shift=config.time_shift)
        embed_time = MLPEmbedder(config.hidden_size, self.dtype, name="t_embedder")
        embed_label = LabelEmbedder(config, self.dtype, name="y_embedder")
        condition = nn.silu(embed_time(time.astype(self.dtype)) + embed_label(labels))

        block = partial(Block, config, self.dtype, parent=None)
        stack = BlockStack(block, config.depth, remat=self.remat, name="blocks")
        (tokens,) = stack((tokens,), condition)
        out = FinalLayer(config, self.dtype, name="final_layer")(tokens, condition)
        return picture(out, config.patch_size, config.out_channels)


def abstract_params(config: DiTConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    size = (1, config.in_channels, config.sample_size, config.sample_size)
    arguments = shape(size, jnp.float32), shape((1,), jnp.float32), shape((1,), jnp.int32)
    model = DiTTransformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
