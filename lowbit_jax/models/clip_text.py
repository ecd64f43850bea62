"""CLIP's text encoder: FLUX.1 takes its pooled vector.

Source: Radford et al. 2021, section 2.4: a causal pre-norm transformer whose state at the
end-of-text token stands for the text. GELU is x sigmoid(1.702 x) in OpenAI's models.
Shape letters: b batch, t tokens, k width, h heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lowbit_jax.models.layers import BlockStack, Linear

LEGACY_EOS = 2  # in configs older than July 2023, whatever the tokeniser's end-of-text token is

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": partial(nn.gelu, approximate=False),
}


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Sizes of a CLIP text encoder, named as in its `config.json`; default CLIP ViT-L/14.

    Attributes:
        hidden_act: key of `ACTIVATIONS`.
        eos_token_id: the end-of-text token. `LEGACY_EOS` stands for the largest id of each text,
            which the end-of-text token is in every published vocabulary.

    Raises:
        ValueError: a width that the heads do not divide, or an unknown activation.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act '{self.hidden_act}' is none of {', '.join(ACTIVATIONS)}")


CLIP_L = ClipTextConfig()


class ClipTextBlock(nn.Module):
    """Causal self-attention and MLP, each on its normalised input and added to it."""

    config: ClipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t k"]) -> tuple[Float[Array, "b t k"]]:
        """Update the states; a token attends to none after it. Returns a 1-tuple (the carry)."""
        config = self.config
        linear = partial(Linear, dtype=self.dtype)
        norm = partial(nn.LayerNorm, epsilon=config.layer_norm_eps, dtype=self.dtype)
        h = norm(name="layer_norm1")(x)

        def heads(name: str) -> Float[Array, "b t h d"]:
            out = linear(config.hidden_size, name=name)(h)
            return out.reshape(*out.shape[:2], config.num_attention_heads, -1)

        mixed = jax.nn.dot_product_attention(
            heads("q_proj"), heads("k_proj"), heads("v_proj"), is_causal=True, implementation="xla"
        )
        x = linear(config.hidden_size, name="out_proj")(mixed.reshape(x.shape), residual=x)
        hidden = linear(config.intermediate_size, name="fc1")(norm(name="layer_norm2")(x))
        hidden = ACTIVATIONS[config.hidden_act](hidden)
        return (linear(config.hidden_size, name="fc2")(hidden, residual=x),)


class ClipTextEncoder(nn.Module):
    """Token ids -> token states and the pooled vector.

    Attributes:
        config: sizes.
        dtype: dtype of activations and products; parameters keep their own.
    """

    config: ClipTextConfig = CLIP_L
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"]) -> tuple[Float[Array, "b t k"], Float[Array, "b k"]]:
        """The last layer's states, normalised, and of each text the state that stands for it.

        Args:
            ids: token ids, of texts that end in the end-of-text token; what follows it has no
                influence on the pooled vector. Without that token it is the first state.

        Raises:
            ValueError: more tokens than positions.
        """
        config = self.config
        tokens = ids.shape[1]
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"{tokens} tokens, but this CLIP has {config.max_position_embeddings} positions; "
                "truncate"
            )
        embed = partial(nn.Embed, features=config.hidden_size, dtype=self.dtype)
        x = embed(config.vocab_size, name="token_embedding")(ids)
        x += embed(config.max_position_embeddings, name="position_embedding")(jnp.arange(tokens))
        block = ClipTextBlock(config, self.dtype, parent=None)
        (x,) = BlockStack(lambda layer: block, config.num_hidden_layers, name="blocks")((x,))
        norm = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")
        x = norm(x)
        at = end_of_text(ids, config.eos_token_id)
        return x, jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


def end_of_text(ids: Int[Array, "b t"], eos_token_id: int) -> Int[Array, "b"]:
    """Index of the first end-of-text token of each text; see `ClipTextConfig.eos_token_id`."""
    marks = ids if eos_token_id == LEGACY_EOS else (ids == eos_token_id)
    return jnp.argmax(marks, axis=1)


def abstract_params(config: ClipTextConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(ClipTextEncoder(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
