"""Fused matrices in parts: joining and cutting along features, and which device has what.

A fused matrix, such as `[q, k, v, mlp]`, has parts along its outputs or its inputs. On d devices
each has a d-th of every part, so that its heads and its share of the MLP meet on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def join(x: Array | tuple[Array, ...] | list[Array]) -> Float[Array, "... k"]:
    """An array as it is, or the parts of one side by side along the last axis."""
    if not isinstance(x, tuple | list):
        return x
    return x[0] if len(x) == 1 else jnp.concatenate(x, axis=-1)


def width(x: Array | tuple[Array, ...] | list[Array]) -> int:
    """The size of the last axis of `join(x)`."""
    return sum(part.shape[-1] for part in x) if isinstance(x, tuple | list) else x.shape[-1]


def cut(x: Float[Array, "... n"], sizes: Sequence[int]) -> tuple[Array, ...]:
    """`x` in parts of these sizes along the last axis; the inverse of `join`.

    Raises:
        ValueError: the sizes do not add up, with both numbers.
    """
    if sum(sizes) != x.shape[-1]:
        raise ValueError(f"parts {tuple(sizes)} are {sum(sizes)} features, x has {x.shape[-1]}")
    return tuple(jnp.split(x, offsets(sizes)[1:], axis=-1)) if len(sizes) > 1 else (x,)


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where each part begins."""
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def device_order(sizes: Sequence[int], shards: int) -> Int[np.ndarray, "n"] | None:
    """Indices that put a fused axis in the order of devices: the first one's share of every part,
    then the second's; None where that changes nothing. Sizes are multiples of `shards`.
    """
    if len(sizes) == 1 or shards == 1:
        return None
    parts = [
        np.arange(start, start + size).reshape(shards, -1)
        for start, size in zip(offsets(sizes), sizes, strict=True)
    ]
    return np.concatenate(parts, axis=1).reshape(-1)
