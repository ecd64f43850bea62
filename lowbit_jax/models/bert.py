"""BERT encoder (post-norm), here as MiniLM: the small text encoder that plays T5's and CLIP's part.

Source: Devlin et al. 2018, section 3 and appendix A.2; sizes of all-MiniLM-L6-v2 by default.
Shape letters: b batch, t tokens, k width, h heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lowbit_jax.models.attention import attention
from lowbit_jax.models.layers import BlockStack, Linear


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT encoder; default all-MiniLM-L6-v2.

    Raises:
        ValueError: when `hidden_size` is not a multiple of `num_heads`.
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    mlp_size: int = 1536
    max_positions: int = 512
    type_vocab_size: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )


class BertBlock(nn.Module):
    """Self-attention and MLP, each added to its input and then normalised."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t k"], mask: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b t k"]]:
        """Update the states; padding is not attended to. Returns a 1-tuple (the stack's carry)."""
        config = self.config
        linear = partial(Linear, dtype=self.dtype)
        norm = partial(nn.LayerNorm, epsilon=config.norm_eps, dtype=self.dtype)

        def heads(name: str) -> Float[Array, "b t h d"]:
            out = linear(config.hidden_size, name=name)(x)
            return out.reshape(*out.shape[:2], config.num_heads, -1)

        mixed = attention(heads("query"), heads("key"), heads("value"), mask).reshape(x.shape)
        x = norm(name="attn_norm")(x + linear(config.hidden_size, name="proj")(mixed))
        hidden = nn.gelu(linear(config.mlp_size, name="mlp_in")(x), approximate=False)
        return (norm(name="mlp_norm")(x + linear(config.hidden_size, name="mlp_out")(hidden)),)


class BertEncoder(nn.Module):
    """Token ids -> token states and their mean.

    Attributes:
        config: sizes.
        dtype: dtype of activations and products; parameters keep their own.
    """

    config: BertConfig = BertConfig()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b t k"], Float[Array, "b k"]]:
        """Encode; all tokens are of segment 0.

        Args:
            ids: token ids.
            mask: True for real tokens, False for padding.

        Returns:
            states: the last layer's states, zero where padded.
            pooled: mean of the states of the real tokens (not normalised).

        Raises:
            ValueError: more tokens than positions.
        """
        config = self.config
        if ids.shape[1] > config.max_positions:
            raise ValueError(
                f"{ids.shape[1]} tokens, but BERT has {config.max_positions} positions; truncate"
            )
        embed = partial(nn.Embed, features=config.hidden_size, dtype=self.dtype)
        x = embed(config.vocab_size, name="word_embed")(ids)
        x += embed(config.max_positions, name="position_embed")(jnp.arange(ids.shape[1]))
        x += embed(config.type_vocab_size, name="type_embed")(jnp.zeros_like(ids))
        x = nn.LayerNorm(epsilon=config.norm_eps, dtype=self.dtype, name="embed_norm")(x)

        block = BertBlock(config, self.dtype, parent=None)
        (x,) = BlockStack(lambda layer: block, config.num_layers, name="blocks")((x,), mask)
        return masked_mean(x, mask)


def masked_mean(
    x: Float[Array, "b t k"], mask: Bool[Array, "b t"]
) -> tuple[Float[Array, "b t k"], Float[Array, "b k"]]:
    """`x` with padding set to zero, and the mean of the rest (zero where nothing is left)."""
    x = x * mask[..., None].astype(x.dtype)
    count = jnp.maximum(mask.sum(axis=1), 1).astype(jnp.float32)
    return x, (x.sum(axis=1, dtype=jnp.float32) / count[:, None]).astype(x.dtype)
