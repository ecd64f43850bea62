"""Cutting a weight matrix into segments that share a scale, and putting codes together again."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8

SMALLEST = 2.0**-118  # with it max / 127 is still a normal number; XLA may flush smaller ones to 0


class Segments(NamedTuple):
    """w (n, k) as r rows of g segments of s entries: r = n, or r = g = 1 for one per tensor.

    A row's last segment is padded with zeros. They change no sum of magnitudes, squares or
    products and no extremum of a range around 0; for means, divide by `entries`. Segments are
    multiplied by a power of two, which changes no rounding and keeps squares and sums of very
    large and very small weights inside float32.

    Attributes:
        values: segments with max|.| in [2, 4); ones in segments without a usable scale.
        entries: numbers in each segment without the padding (from shapes alone).
        amax: largest magnitude of each segment of w.
        power: powers of two, w = values * power.
        shape: (n, k).
    """

    values: Float32[Array, "r g s"]
    entries: Float32[np.ndarray, "g 1"]
    amax: Float32[Array, "r g 1"]
    power: Float32[Array, "r g 1"]
    shape: tuple[int, int]

    @property
    def usable(self) -> Bool[Array, "r g 1"]:
        """Which segments have a scale: not all (nearly) zero, no NaN, no inf."""
        return (self.amax >= SMALLEST) & (self.amax < jnp.inf)

    def codes(self, codes: Float32[Array, "r g s"]) -> Int8[Array, "n k"]:
        """Codes of `values` as one matrix; 0 where a segment is not usable."""
        n, k = self.shape
        rows = jnp.where(self.usable, codes, 0).astype(jnp.int8).reshape(codes.shape[0], -1)
        return rows[:, : n * k // rows.shape[0]].reshape(n, k)

    def scales(self, scale: Float32[Array, "r g 1"]) -> Float32[Array, "r g"]:
        """Scales of `values` as scales of w; 1 for zeros, the NaN or inf of what holds one."""
        special = jnp.where(self.amax < SMALLEST, 1.0, self.amax)
        return jnp.where(self.usable, scale * self.power, special)[..., 0]

    def zeros(self, zero: Float32[Array, "r g 1"]) -> Int8[Array, "r g"]:
        """Zero points as integers; 0 where a segment is not usable."""
        return jnp.where(self.usable, zero, 0).astype(jnp.int8)[..., 0]


def cut(w: Float[Array, "n k"], group: int | None, per_tensor: bool) -> Segments:
    """Cuts w per output channel, per group of inputs, or not at all, in float32.

    Raises:
        ValueError: w is no floating matrix or is empty, group is below 1, or group is given
            together with per_tensor.
    """
    if w.ndim != 2 or w.size == 0 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be a floating (n, k) matrix, got {w.dtype}{list(w.shape)}")
    if group is not None and (per_tensor or group < 1):
        raise ValueError(f"group must be at least 1 and without per_tensor, got {group}")
    n, k = w.shape
    row = n * k if per_tensor else k
    size = min(group or row, row)
    parts = -(-row // size)
    rows = w.astype(jnp.float32).reshape(-1, row)
    values = jnp.pad(rows, ((0, 0), (0, parts * size - row))).reshape(-1, parts, size)
    amax = _largest(values)
    entries = np.minimum(size, row - size * np.arange(parts, dtype=np.float32))[:, None]
    seg = Segments(values, entries, amax, _power_below(amax), (n, k))
    power = jnp.where(seg.usable, seg.power, 1.0)
    return seg._replace(values=jnp.where(seg.usable, values * (1 / power), 1.0), power=power)


def _largest(values: Array) -> Array:
    """max|.| of each segment, NaN if it holds one: XLA's own maximum drops it in long CPU rows."""
    amax = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.where(jnp.any(jnp.isnan(values), axis=-1, keepdims=True), jnp.nan, amax)


def _power_below(amax: Array) -> Array:
    """A power of two in (amax / 4, amax / 2]; not the next, as 2**-127 is no normal number."""
    exponent = (lax.bitcast_convert_type(amax, jnp.int32) >> 23) - 1
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)
