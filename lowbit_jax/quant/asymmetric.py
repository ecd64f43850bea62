"""Activations with a zero point for each row (ViDiT-Q's first version): x ~ scale * (codes - zero).

Of codes c and integer weights w, sum_k (c - z) w = sum_k c w - z sum_k w: the product of the codes,
less the zero point times the sums of the weights' columns. One more row, of ones, gives those sums
in the same product, whatever the format; it runs in the same kernel as symmetric rows do. What is
not in a kernel: quantising the rows, and all that comes after the sum.

Shape letters: m rows, k inputs, n outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

from lowbit_jax.quant.qtensor import QTensor
from pallas_kernels import api
from pallas_kernels.rows import QuantizedRows


class ShiftedRows(NamedTuple):
    """Rows `x ~ rows.scale * (rows.codes - zero)`.

    Attributes:
        rows: codes from -2^(bits-1) to 2^(bits-1) - 1, scales and sums.
        zero: the code of 0.
    """

    rows: QuantizedRows
    zero: Int8[Array, "... 1"]

    def dequantize(self) -> Float32[Array, "... k"]:
        """The numbers that the codes stand for."""
        codes = self.rows.codes.astype(jnp.float32) - self.zero.astype(jnp.float32)
        return codes * self.rows.scale


def asymmetric_rows(
    x: Float32[Array, "... k"], bits: int, axis_name: str | None = None
) -> ShiftedRows:
    """Dynamic quantisation between the least and the greatest of each row and 0.

    With low = min(x, 0) and high = max(x, 0) of a row, `scale = (high - low) / (2^bits - 1)`,
    `zero = round(-low / scale) - 2^(bits-1)`, `codes = clip(round(x / scale) + zero)`: ViDiT-Q's
    `dynamic_quantizer.py`, in signed codes. Zero is exact; halves round to even; where both ends
    round up the greatest code would be one too large, hence the clip. Divisions are products with a
    reciprocal, as in `pallas_kernels.reference_rows.quantize_rows`.

    A row of zeros has scale 1; one with NaN or infinity a scale of NaN.

    Args:
        x: rows, masked and rotated as they will be multiplied.
        bits: 2 to 8.
        axis_name: mesh axis that the rows are split over, in `jax.shard_map`: the ends are those of
            the whole row, the sums those of the share.
    """
    low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    broken = ~jnp.isfinite(x).all(axis=-1, keepdims=True)
    if axis_name is not None:
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
        broken = jax.lax.psum(broken.astype(jnp.int32), axis_name) > 0
    step, half = jnp.float32(2 / (2**bits - 1)), 2 ** (bits - 1)
    scale = (0.5 * high - 0.5 * low) * step  # the difference itself may be beyond float32
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    inverse = 1 / scale
    zero = jnp.clip(jnp.round(-low * inverse) - half, -half, half - 1)
    codes = jnp.clip(jnp.round(x * inverse) + zero, -half, half - 1).astype(jnp.int8)
    sums = jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32)
    rows = QuantizedRows(codes, jnp.where(broken, jnp.nan, scale), sums)
    return ShiftedRows(rows, zero.astype(jnp.int8))


def asymmetric_product(
    x: ShiftedRows, weight: QTensor, total: Callable[[Array], Array] = lambda y: y
) -> Float32[Array, "m n"]:
    """`x @ weight.T`: exact integers up to the scales, where one output has one scale.

    As those of symmetric rows, sums beyond 2^24 are rounded to float32; so is what is taken off.

    Args:
        x: rows, (m, k).
        weight: of any format; groups have scales of their own, so there sums are float32.
        total: of what devices have summed, each over its inputs.
    """
    codes, scale, sums = x.rows
    m, k = codes.shape
    more = QuantizedRows(
        jnp.concatenate([codes, jnp.ones((1, k), jnp.int8)]),
        jnp.ones((m + 1, 1), jnp.float32),
        jnp.concatenate([sums, jnp.full((1, 1), k, jnp.int32)]),
    )
    grouped = weight.scale.shape[-1] > 1
    scales = weight.scale if grouped else jnp.ones_like(weight.scale)
    found = api.matmul(
        more, weight.codes, scales, weight.zero, format=weight.format, group=weight.group
    )
    y = total(found)
    y = (y[:-1] - x.zero.astype(jnp.float32) * y[-1:]) * scale
    return y if grouped else y * weight.scale[:, 0]
