"""Captions of text-conditional networks: the text encoder's states, their mask, and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lowbit_jax.samplers.guidance import Guidance

Caption = tuple[Float[Array, "b s c"], Bool[Array, "b s"] | Int[Array, "b s"]]


def double(
    guidance: Guidance, caption: Caption, negative: Caption | None, params: Mapping[str, Any]
) -> Caption:
    """The captions of both halves of classifier-free guidance, in the order of `guidance`.

    Args:
        guidance: says which half comes first.
        caption: states and mask (True or 1: no padding).
        negative: what guidance leads away from, of the caption's shape. None for the null caption
            that the network's checkpoint stores, seen through the caption's mask, as the published
            codes do.
        params: of the network.

    Raises:
        ValueError: another shape, or a network that stores no null caption.
    """
    states, mask = negative or _null(caption, params)
    if jnp.shape(states) != jnp.shape(caption[0]):
        raise ValueError(
            f"the negative caption has shape {jnp.shape(states)}, the caption "
            f"{jnp.shape(caption[0])}: pad both to as many tokens"
        )
    return guidance.double(caption[0], states), guidance.double(caption[1], mask)


def _null(caption: Caption, params: Mapping[str, Any]) -> Caption:
    if "y_embedding" not in params["y_embedder"]:
        raise ValueError("guidance needs `negative`: this network stores no null caption")
    null = params["y_embedder"]["y_embedding"]
    return jnp.broadcast_to(null, (len(caption[0]), *null.shape)), caption[1]
