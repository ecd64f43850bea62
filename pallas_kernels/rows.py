"""What quantising activations gives: one scale per row (per token)."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float32, Int8, Int32


class QuantizedRows(NamedTuple):
    """Rows `x ~ codes * scale`.

    Attributes:
        codes: int8[..., k].
        scale: float32[..., 1]; 1 for a row of zeros, non-finite for a row with NaN or inf.
        sums: int32[..., 1], sum of the codes of each row: what a zero point, or the offset of a
            packed format, is multiplied with.
    """

    codes: Int8[Array, "... k"]
    scale: Float32[Array, "... 1"]
    sums: Int32[Array, "... 1"]
