"""FLUX.1 (dev, schnell, any smaller one): a rectified-flow transformer, double and single blocks.

Parameter names follow Black Forest Labs' checkpoint (fused `qkv`, `linear1`, `linear2`), so one
input serves each fused matrix. Shape letters: b batch, i image tokens, x text tokens, t all tokens,
k width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from lowbit_jax.models.attention import apply_rotary, attention, rotary_angles, split_heads
from lowbit_jax.models.layers import (
    AdaLN,
    BlockStack,
    Gelu,
    Linear,
    MLPEmbedder,
    RMSNorm,
    gelu_tanh,
    timestep_embedding,
)

TIME_DIM = 256  # width of the sinusoidal embeddings of time and guidance


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a FLUX transformer, named as in Black Forest Labs' `FluxParams`; default FLUX.1-dev.

    Raises:
        ValueError: when `hidden_size`, `num_heads` and `axes_dim` do not fit together.
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000.0
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even and sum to the head dim {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)


FLUX_DEV = FluxConfig()
FLUX_SCHNELL = FluxConfig(guidance_embed=False)


def image_ids(height: int, width: int) -> Num[np.ndarray, "i 3"]:
    """Positions (0, row, column) of a `height` x `width` grid of latent patches, row by row."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)


def text_ids(tokens: int) -> Num[np.ndarray, "x 3"]:
    """Positions of text tokens: all zero, so rotary embedding leaves them unturned."""
    return np.zeros((tokens, 3), np.float32)


class Modulation(nn.Module):
    """`count` vectors of the model's width from SiLU(vec)."""

    count: int
    dtype: Any

    @nn.compact
    def __call__(self, vec: Float[Array, "b k"]) -> list[Float[Array, "b k"]]:
        """Return the `count` modulation vectors."""
        out = Linear(self.count * vec.shape[-1], dtype=self.dtype, name="lin")(nn.silu(vec))
        return jnp.split(out, self.count, axis=-1)


class QKNorm(nn.Module):
    """RMS norm of queries and keys over the head dim."""

    dtype: Any

    @nn.compact
    def __call__(self, q, k):
        """Normalise both."""
        return RMSNorm(self.dtype, name="query_norm")(q), RMSNorm(self.dtype, name="key_norm")(k)


class SelfAttention(nn.Module):
    """Fused qkv, query/key norm and output projection of one stream; the attention is joint."""

    config: FluxConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers."""
        width = self.config.hidden_size
        self.qkv = Linear(3 * width, dtype=self.dtype)
        self.norm = QKNorm(self.dtype)
        self.proj = Linear(width, dtype=self.dtype)

    def heads(self, x: Float[Array, "b t k"], before: AdaLN):
        """q, k, v of one stream, each (b, t, h, d); q and k normalised."""
        parts = 3 * (self.config.hidden_size,)
        q, k, v = split_heads(self.qkv(x, before=before, parts=parts), self.config.num_heads)
        q, k = self.norm(q, k)
        return q, k, v


class MLP(nn.Module):
    """Linear, tanh GELU, Linear, on a residual stream."""

    config: FluxConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t k"], before: AdaLN, gate: Float[Array, "b k"]
    ) -> Float[Array, "b t k"]:
        """x plus the gated result."""
        wide, narrow = self.config.mlp_size, self.config.hidden_size
        hidden = Linear(wide, dtype=self.dtype, name="in_layer")(x, before=before)
        out = Linear(narrow, dtype=self.dtype, name="out_layer")
        return out(hidden, before=Gelu(), gate=gate, residual=x)


class DoubleBlock(nn.Module):
    """Two streams, image and text, each with its own weights, joined in one attention."""

    config: FluxConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers of both streams."""
        self.img_mod, self.txt_mod = (Modulation(6, self.dtype) for _ in range(2))
        self.img_attn, self.txt_attn = (SelfAttention(self.config, self.dtype) for _ in range(2))
        self.img_mlp, self.txt_mlp = (MLP(self.config, self.dtype) for _ in range(2))

    def __call__(self, img, txt, vec, angles, modulation=None):
        """Update (img, txt); text tokens come first in the joint sequence."""
        img_mod, txt_mod = modulation or (self.img_mod(vec), self.txt_mod(vec))
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod
        img_heads = self.img_attn.heads(img, AdaLN(img_shift1, img_scale1))
        txt_heads = self.txt_attn.heads(txt, AdaLN(txt_shift1, txt_scale1))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_heads, img_heads, strict=True))
        joint = rotary_attention(q, k, v, angles)
        txt_out, img_out = joint[:, : txt.shape[1]], joint[:, txt.shape[1] :]

        img = self.img_attn.proj(img_out, gate=img_gate1, residual=img)
        img = self.img_mlp(img, AdaLN(img_shift2, img_scale2), img_gate2)
        txt = self.txt_attn.proj(txt_out, gate=txt_gate1, residual=txt)
        txt = self.txt_mlp(txt, AdaLN(txt_shift2, txt_scale2), txt_gate2)
        return img, txt


class SingleBlock(nn.Module):
    """One stream; attention and MLP in parallel from one `linear1`, merged by one `linear2`."""

    config: FluxConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, vec, angles, modulation=None):
        """Update the joint sequence; returns a 1-tuple (the carry of the stack)."""
        width, mlp = self.config.hidden_size, self.config.mlp_size
        shift, scale, gate = modulation or Modulation(3, self.dtype, name="modulation")(vec)
        linear1 = Linear(3 * width + mlp, dtype=self.dtype, name="linear1")
        parts = (*3 * (width,), mlp)
        *qkv, hidden = linear1(x, before=AdaLN(shift, scale), parts=parts)
        q, k, v = split_heads(qkv, self.config.num_heads)
        q, k = QKNorm(self.dtype, name="norm")(q, k)
        merged = rotary_attention(q, k, v, angles), gelu_tanh(hidden)
        out = Linear(width, dtype=self.dtype, name="linear2")
        return (out(merged, gate=gate, residual=x),)


class FinalLayer(nn.Module):
    """AdaLN (shift, scale in Black Forest Labs' order) and the projection to latent channels."""

    config: FluxConfig
    dtype: Any

    @nn.compact
    def __call__(self, img, vec, modulation=None):
        """Velocity of every image token."""
        if modulation is None:
            width = 2 * self.config.hidden_size
            mod = Linear(width, dtype=self.dtype, name="adaLN_modulation")(nn.silu(vec))
            modulation = jnp.split(mod, 2, axis=-1)
        shift, scale = modulation
        return Linear(self.config.in_channels, dtype=self.dtype, name="linear")(
            img, before=AdaLN(shift, scale)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Modulations:
    """Shifts, scales and gates of all layers: all that FLUX makes of time, guidance, pooled text.

    From `flux_modulation.modulations`, for many steps, with a leading axis of steps; one of them
    is what a forward pass takes.

    Attributes:
        double: six vectors for the image stream and six for the text stream, in each double block.
        single: three vectors, in each single block.
        final: shift and scale of the last layer.
    """

    double: tuple[list[Float[Array, "*s l b k"]], list[Float[Array, "*s l b k"]]]
    single: list[Float[Array, "*s l b k"]]
    final: list[Float[Array, "*s b k"]]


class FluxTransformer(nn.Module):
    """The FLUX.1 transformer: (noisy latent tokens, text, time) -> velocity.

    Attributes:
        config: sizes.
        dtype: of activations and products (accumulated in float32); parameters keep their own.
        remat: for training: recompute each block in the backward pass instead of storing it.
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        img: Float[Array, "b i c"],
        txt: Float[Array, "b x context"],
        timestep: Float[Array, "b"] | None,
        pooled: Float[Array, "b vec"] | None,
        img_ids: Num[Array, "i 3"],
        txt_ids: Num[Array, "x 3"],
        guidance: Float[Array, "b"] | None = None,
        modulations: Modulations | None = None,
    ) -> Float[Array, "b i c"]:
        """Velocity dx/dt of the flow at `timestep`.

        Args:
            img: latent tokens (2x2 patches, channels outermost).
            txt: text states; padding tokens are attended to, as in FLUX.
            timestep: flow time in [0, 1]; 1 is pure noise. Not multiplied by 1000.
            pooled: pooled text vector.
            img_ids: token positions, see `image_ids`.
            txt_ids: text positions, see `text_ids`.
            guidance: distilled guidance scale (such as 3.5); exactly when `config.guidance_embed`.
            modulations: in place of timestep, pooled and guidance, which are None then: what
                `flux_modulation.modulations` made of them. The parameters of the embedders and
                modulations are not read and may be missing.

        Raises:
            ValueError: if guidance is missing or unexpected, or modulations come with what they
                stand for.
        """
        config, vec = self.config, None
        if modulations is None:
            if timestep is None or pooled is None:
                raise ValueError("give timestep and pooled, or modulations")

            def embed(x, name):
                return MLPEmbedder(config.hidden_size, self.dtype, name=name)(x.astype(self.dtype))

            vec = condition(config, embed, timestep, pooled, guidance)
        elif not (timestep is None and pooled is None and guidance is None):
            raise ValueError("modulations stand for timestep, pooled and guidance: those are None")
        given = modulations or Modulations(None, None, None)  # type: ignore[arg-type]
        img = Linear(config.hidden_size, dtype=self.dtype, name="img_in")(img)
        txt = Linear(config.hidden_size, dtype=self.dtype, name="txt_in")(txt)
        ids = jnp.concatenate([jnp.asarray(txt_ids), jnp.asarray(img_ids)], axis=0)
        angles = rotary_angles(ids, config.axes_dim, config.theta)

        double = DoubleBlock(config, self.dtype, parent=None)
        single = SingleBlock(config, self.dtype, parent=None)
        stack = partial(BlockStack, remat=self.remat)
        run_double = stack(lambda layer: double, config.depth, name="double_blocks")
        img, txt = run_double((img, txt), vec, angles, layers=given.double)
        run_single = stack(lambda layer: single, config.depth_single_blocks, name="single_blocks")
        joint = jnp.concatenate([txt, img], axis=1)
        (joint,) = run_single((joint,), vec, angles, layers=given.single)
        final = FinalLayer(config, self.dtype, name="final_layer")
        return final(joint[:, txt.shape[1] :], vec, given.final)


def condition(
    config: FluxConfig,
    embed: Callable[[Float[Array, "..."], str], Float[Array, "..."]],
    timestep: Float[Array, "*s b"],
    pooled: Float[Array, "b vec"],
    guidance: Float[Array, "b"] | None,
) -> Float[Array, "*s b k"]:
    """The vector that all modulations are made of: embedded time, guidance and pooled text, added.

    Args:
        config: sizes.
        embed: runs the embedder of a name.
        timestep: of one step, or of many.
        pooled: pooled text vectors.
        guidance: guidance scales.

    Raises:
        ValueError: if guidance is missing or unexpected.
    """
    if (guidance is not None) != config.guidance_embed:
        word = "needs" if config.guidance_embed else "has no embedder for"
        raise ValueError(f"this FLUX {word} `guidance` (guidance_embed={config.guidance_embed})")
    time = timestep_embedding(timestep.reshape(-1), TIME_DIM)
    vec = embed(time, "time_in").reshape(*timestep.shape, -1)
    if guidance is not None:
        vec = vec + embed(timestep_embedding(guidance, TIME_DIM), "guidance_in")
    return vec + embed(pooled, "vector_in")


def rotary_attention(q, k, v, angles) -> Float[Array, "b t k"]:
    """Attention with rotary positions; heads merged again."""
    out = attention(apply_rotary(q, angles), apply_rotary(k, angles), v)
    return out.reshape(*out.shape[:2], -1)


def abstract_params(config: FluxConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    model = FluxTransformer(config)
    shape = jax.ShapeDtypeStruct
    b, i, x = 1, 4, 4
    example = [
        (b, i, config.in_channels),
        (b, x, config.context_in_dim),
        (b,),
        (b, config.vec_in_dim),
    ]
    arguments = [shape(size, jnp.float32) for size in example]
    arguments += [shape((i, 3), jnp.float32), shape((x, 3), jnp.float32)]
    if config.guidance_embed:
        arguments.append(shape((b,), jnp.float32))
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), params)
