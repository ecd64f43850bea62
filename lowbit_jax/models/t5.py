"""T5 v1.1 encoder: the text encoder of FLUX.1, PixArt, Latte-1 and Open-Sora.

Source: Raffel et al. 2020, section 2.1 (pre-norm, relative positions, no biases); v1.1 is that with
the gated GELU of Shazeer 2020. The product of queries and keys is not scaled.
Shape letters: b batch, t tokens, s tokens attended to, k width, h heads, d head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int

from lowbit_jax.models.layers import BlockStack, Linear, RMSNorm, gelu_tanh


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, named as in its `config.json`; default T5-XXL.

    Raises:
        ValueError: position buckets that cannot be halved twice, or that reach no further than
            the exact ones.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    def __post_init__(self) -> None:
        buckets, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or reach <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets {buckets} must be a multiple of 4 and "
                f"relative_attention_max_distance {reach} more than a quarter of it"
            )


T5_XXL = T5Config()


class T5Block(nn.Module):
    """Self-attention and gated MLP, each on its normalised input and added to it."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t k"],
        bias: Float32[Array, "h t s"],
        mask: Bool[Array, "b s"] | None,
    ) -> tuple[Float[Array, "b t k"]]:
        """Update the states; `bias` is added to the scores. Returns a 1-tuple (the carry)."""
        config = self.config
        linear = partial(Linear, use_bias=False, dtype=self.dtype)
        inner = config.num_heads * config.d_kv
        h = RMSNorm(self.dtype, name="attn_norm")(x)

        def heads(name: str) -> Float[Array, "b t h d"]:
            return linear(inner, name=name)(h).reshape(*h.shape[:2], config.num_heads, -1)

        mixed = jax.nn.dot_product_attention(
            heads("q"),
            heads("k"),
            heads("v"),
            bias=bias[None],
            mask=None if mask is None else mask[:, None, None],
            scale=1.0,
            implementation="xla",  # softmax in float32; cuDNN's form has no such bias on every GPU
        )
        x = linear(config.d_model, name="o")(mixed.reshape(*h.shape[:2], inner), residual=x)
        h = RMSNorm(self.dtype, name="mlp_norm")(x)
        gate = gelu_tanh(linear(config.d_ff, name="wi_0")(h))
        hidden = gate * linear(config.d_ff, name="wi_1")(h)
        return (linear(config.d_model, name="wo")(hidden, residual=x),)


class T5Encoder(nn.Module):
    """Token ids -> token states.

    Attributes:
        config: sizes.
        dtype: dtype of activations and products; parameters keep their own. In float16 the states
            of the published XXL overflow.
    """

    config: T5Config = T5_XXL
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t k"]:
        """The last layer's states, normalised.

        Args:
            ids: token ids; one outside the vocabulary makes its sample NaN.
            mask: tokens that may be attended to. None for all, padding too, as FLUX.1 has it.
        """
        config = self.config
        table = nn.Embed(config.vocab_size, config.d_model, dtype=self.dtype, name="shared")
        heads = nn.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            dtype=jnp.float32,
            name="relative_attention_bias",
        )
        buckets = relative_buckets(
            ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        bias = jnp.moveaxis(heads(buckets), -1, 0)
        block = T5Block(config, self.dtype, parent=None)
        blocks = BlockStack(lambda layer: block, config.num_layers, name="blocks")
        (x,) = blocks((table(ids),), bias, mask)
        return RMSNorm(self.dtype, name="final_layer_norm")(x)


def relative_buckets(tokens: int, buckets: int, reach: int) -> Int[np.ndarray, "t s"]:
    """The bucket of every pair of query t and key s (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half are single
    distances; the rest grow logarithmically up to `reach`, the last one takes all beyond.
    """
    positions = np.arange(tokens)
    relative = positions[None] - positions[:, None]
    half, distance = buckets // 2, np.abs(relative)
    exact = half // 2
    # float32, as the published code: a distance on the edge of a bucket must fall on its side
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(math.log(reach / exact)) * np.float32(half - exact)
    far = np.minimum(exact + grown.astype(np.int64), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)


def abstract_params(config: T5Config, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
