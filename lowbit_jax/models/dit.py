"""DiT (Peebles & Xie 2023): a class-conditional diffusion transformer with adaLN-Zero blocks.

Parameter names follow facebook's code (fused `qkv`; one timestep and one label embedder for all
blocks). Shape letters: b batch, c latent channels, s sample size, t tokens, k width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lowbit_jax.models.attention import SelfAttention
from lowbit_jax.models.layers import MLP, AdaLN, BlockStack, Linear, MLPEmbedder, timestep_embedding
from lowbit_jax.models.patches import PatchEmbedder, picture, position_table

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


class Block(nn.Module):
    """adaLN-Zero: attention and MLP, each shifted, scaled and gated by the condition."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b ... t k"], condition: Float[Array, "b k"]):
        """Update the tokens; `condition` is SiLU(c). Returns a 1-tuple (the carry of the stack).

        Axes between b and t (the frames of a video) are batch to the attention.
        """
        config, dtype = self.config, self.dtype
        mod = Linear(6 * config.hidden_size, dtype=dtype, name="adaLN_modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mod, 6, axis=-1)
        attend = SelfAttention(config.num_heads, dtype, name="attn")
        x = attend(x, before=AdaLN(shift1, scale1), gate=gate1, residual=x)
        mlp = MLP(config.mlp_size, config.hidden_size, dtype, name="mlp")
        before = AdaLN(shift2, scale2, config.mlp_norm_eps)
        return (mlp(x, before=before, gate=gate2, residual=x),)


class FinalLayer(nn.Module):
    """AdaLN (shift, scale) and the projection to the pixels of every patch."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b ... t k"], condition: Float[Array, "b k"]):
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
        embed = PatchEmbedder(config.hidden_size, config.patch_size, self.dtype, name="x_embedder")
        grid = (config.grid, config.grid)
        positions = position_table(grid, config.hidden_size)
        tokens = (embed(x.astype(self.dtype)) + positions).astype(self.dtype)
        time = timestep_embedding(timestep, TIME_DIM, scale=1.0, shift=config.time_shift)
        embed_time = MLPEmbedder(config.hidden_size, self.dtype, name="t_embedder")
        embed_label = LabelEmbedder(config, self.dtype, name="y_embedder")
        condition = nn.silu(embed_time(time.astype(self.dtype)) + embed_label(labels))

        block = Block(config, self.dtype, parent=None)
        stack = BlockStack(lambda layer: block, config.depth, remat=self.remat, name="blocks")
        (tokens,) = stack((tokens,), condition)
        out = FinalLayer(config, self.dtype, name="final_layer")(tokens, condition)
        return picture(out, config.patch_size, grid)


def abstract_params(config: DiTConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    size = (1, config.in_channels, config.sample_size, config.sample_size)
    arguments = shape(size, jnp.float32), shape((1,), jnp.float32), shape((1,), jnp.int32)
    model = DiTTransformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
