"""Latte (Ma et al. 2024), class-conditional: a DiT whose blocks attend over space and time in turn.

Variant 1 of the paper: blocks 0, 2, ... attend within each frame, blocks 1, 3, ... over the frames
of each patch. Parameter names follow the original code, but blocks 2i and 2i + 1 are the pair
`blocks/i`, its `spatial` and its `temporal` block, so that all layers are alike. Shape letters:
b batch, c latent channels, f frames, s sample size, t tokens of one frame, k width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lowbit_jax.models.dit import (
    SIZES,
    TIME_DIM,
    Block,
    DiTConfig,
    FinalLayer,
    LabelEmbedder,
)
from lowbit_jax.models.layers import BlockStack, MLPEmbedder, timestep_embedding
from lowbit_jax.models.patches import position_table
from lowbit_jax.models.video import VideoEmbedder, frame_positions, join_video


@dataclass(frozen=True, kw_only=True)
class LatteConfig(DiTConfig):
    """Sizes of a class-conditional Latte; default Latte-XL/2 as trained on UCF-101.

    Attributes:
        num_frames: f, frames of the latent video.
        num_classes: as DiT's; 0 for an unconditional model (FaceForensics, SkyTimelapse, Taichi).
        depth: number of blocks, spatial and temporal ones together; even.

    Raises:
        ValueError: sizes that do not fit together.
    """

    num_frames: int = 16
    num_classes: int = 101
    time_shift: int = 0
    mlp_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth % 2:
            raise ValueError(f"depth {self.depth}: blocks come in pairs, spatial and temporal")
        if self.num_frames < 1:
            raise ValueError(f"num_frames {self.num_frames}: a video has at least one frame")

    @property
    def pairs(self) -> int:
        """Number of pairs of blocks: the layers of the stack."""
        return self.depth // 2

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """The one shape (c, f, s, s) of latents the position tables are made for."""
        return self.in_channels, self.num_frames, self.sample_size, self.sample_size

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return 1, self.patch_size, self.patch_size


def latte(size: str, patch_size: int, sample_size: int = 32, num_classes: int = 101) -> LatteConfig:
    """Latte-`size`/`patch_size` of table 1 of the paper; sizes are the keys of `dit.SIZES`."""
    hidden_size, depth, num_heads = SIZES[size]
    return LatteConfig(
        sample_size=sample_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
    )


LATTE_XL_2_UCF101 = latte("XL", 2)


class Pair(nn.Module):
    """A spatial and a temporal block, each a DiT block."""

    config: LatteConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f t k"],
        positions: Float[Array, "f k"],
        condition: Float[Array, "b k"],
    ):
        """The carry of the stack: the tokens, and no positions, as only the first pair adds them.

        `condition` is SiLU(c).
        """
        (x,) = Block(self.config, self.dtype, name="spatial")(x, condition)
        x = jnp.swapaxes(x + positions[:, None], 1, 2)
        (x,) = Block(self.config, self.dtype, name="temporal")(x, condition)
        return jnp.swapaxes(x, 1, 2), jnp.zeros_like(positions)


class LatteTransformer(nn.Module):
    """The Latte: (noisy latents, step, class) -> noise, and variance where it is learned.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each pair in the backward pass instead of storing it.
    """

    config: LatteConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b c f s s"],
        timestep: Float[Array, "b"] | Int[Array, "b"],
        labels: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b out f s s"]:
        """Predicted noise (channels 0..c-1), then what the variance is interpolated by.

        Args:
            x: noisy latents of exactly the config's sizes, as the position tables are fixed.
            timestep: diffusion step, 0 to 999 for a model trained on 1000; not divided by 1000.
            labels: classes; `config.num_classes` for none (classifier-free guidance). A label out
                of range makes its video NaN. None for an unconditional model.

        Raises:
            ValueError: latents of another shape; labels missing, or given to a model without.
        """
        config = self.config
        if x.shape[1:] != config.latents:
            raise ValueError(f"latents have shape {x.shape[1:]}, this Latte needs {config.latents}")
        if (labels is None) != (config.num_classes == 0):
            given = "no labels" if labels is None else "labels"
            raise ValueError(f"{given} given to a Latte of {config.num_classes} classes")
        embed = VideoEmbedder(config.hidden_size, config.patch, self.dtype, name="x_embedder")
        positions = position_table((config.grid, config.grid), config.hidden_size)
        tokens = (embed(x) + positions).astype(self.dtype)
        time = timestep_embedding(timestep, TIME_DIM, scale=1.0, shift=config.time_shift)
        embed_time = MLPEmbedder(config.hidden_size, self.dtype, name="t_embedder")
        condition = embed_time(time.astype(self.dtype))
        if labels is not None:
            condition += LabelEmbedder(config, self.dtype, name="y_embedder")(labels)
        condition = nn.silu(condition)

        frames = jnp.asarray(frame_positions(config.num_frames, config.hidden_size), self.dtype)
        pair = Pair(config, self.dtype, parent=None)
        stack = BlockStack(lambda layer: pair, config.pairs, remat=self.remat, name="blocks")
        tokens, _ = stack((tokens, frames), condition)
        out = FinalLayer(config, self.dtype, name="final_layer")(tokens, condition)
        return join_video(out, x.shape, config.patch)


def abstract_params(config: LatteConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    shape = jax.ShapeDtypeStruct
    arguments = [shape((1, *config.latents), jnp.float32), shape((1,), jnp.float32)]
    if config.num_classes:
        arguments.append(shape((1,), jnp.int32))
    model = LatteTransformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
