"""What PixArt (Chen et al. 2023) and the text-to-video networks after it share: adaLN-single.

One projection of the time makes the shifts, scales and gates of all blocks; each block adds a
`scale_shift_table` of its own. Shape letters: b batch, s tokens of the caption, c channels of the
text encoder, t tokens, k width.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from lowbit_jax.models.layers import MLP, AdaLN, Linear, MLPEmbedder, timestep_embedding

SINUSOIDS = 256  # width of the sinusoidal embeddings of numbers


def embed_number(
    number: Num[Array, "b"], features: int, dtype: Any, name: str
) -> Float[Array, "b k"]:
    """A submodule `name` of the caller: an MLP of the sinusoids of a step, a rate or a size."""
    sinusoids = timestep_embedding(number, SINUSOIDS, scale=1.0)
    return MLPEmbedder(features, dtype, name=name)(sinusoids.astype(dtype))


def scale_shift_table(module: nn.Module, rows: int, width: int) -> Float[Array, "r k"]:
    """A parameter of the calling module: what it adds to the shared shifts, scales and gates."""
    init = nn.initializers.normal(width**-0.5)
    table = module.param("scale_shift_table", init, (rows, width), jnp.float32)
    return jnp.asarray(table).astype(module.dtype)


class CaptionEmbedder(nn.Module):
    """Linear, tanh GELU, Linear of the text encoder's states; keeps the null caption.

    Attributes:
        features: k.
        null_length: tokens of the caption for "no text" that a checkpoint stores, the parameter
            `y_embedding` (s, c): the text input of the unconditional half of classifier-free
            guidance. 0 where there is none.
        dtype: of activations and products.
    """

    features: int
    null_length: int
    dtype: Any

    @nn.compact
    def __call__(
        self, caption: Float[Array, "b s c"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s k"]:
        """Embed; whatever padding holds counts as 0, a caption of nothing but padding is NaN."""
        if self.null_length:
            shape = (self.null_length, caption.shape[-1])
            self.param("y_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        caption = jnp.where(mask[..., None], caption, 0).astype(self.dtype)
        out = MLP(self.features, self.features, self.dtype, name="y_proj")(caption)
        return jnp.where(mask.any(axis=1)[:, None, None], out, jnp.nan)


class FinalLayer(nn.Module):
    """AdaLN (shift, scale: the time embedding plus a table) and the projection to the patches."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ... t k"], time: Float[Array, "b ... k"]
    ) -> Float[Array, "b ... t n"]:
        """Patches of every token; `time` is per sample or per frame, see `ops.over_tokens`."""
        table = scale_shift_table(self, 2, x.shape[-1])
        linear = Linear(self.features, dtype=self.dtype, name="linear")
        return linear(x, before=AdaLN(time + table[0], time + table[1]))


def check_caption(caption: tuple[int, ...], mask: tuple[int, ...], batch: int, channels: int):
    """Compare the shapes of a caption and its mask with what a network needs.

    Raises:
        ValueError: they do not fit.
    """
    if caption[0] != batch or caption[2:] != (channels,) or mask != caption[:2]:
        raise ValueError(
            f"caption has shape {caption}, its mask {mask}; this network needs "
            f"({batch}, tokens, {channels}) and ({batch}, tokens)"
        )
