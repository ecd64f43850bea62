"""The operands of a scaled product of activations and weight codes: one check for every backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8

from pallas_kernels.formats import FORMATS
from pallas_kernels.rows import QuantizedRows
from pallas_kernels.tiles import check

OUT_DTYPES = (jnp.float32, jnp.bfloat16)
"""What a product may be returned in."""
MAX_INTEGER_K = 2**31 // (128 * 128) - 1
"""int32 holds any sum of products of int8 codes up to this k; beyond, tensor cores saturate."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Operands:
    """`y = residual + gate * (x_scale * sum_g scale[:, g] * (x_g . (codes_g - zero_g)) + bias)`.

    Made by `prepare`, which checks everything; the backends trust it.

    Attributes:
        x: int8[m, k] codes, or floating [m, k].
        w: the stored codes: int8[n, k] (int8) or uint8[n, bytes].
        scale: float32[n or 1, g].
        zero: int8, shaped like scale, or None.
        x_scale: float32[m, 1] of integer activations, None for floating ones.
        sums: int32[m, 1], row sums of integer activations, None for floating ones.
        bias: floating [n] or None.
        gate: floating [b, n] or None; entry b serves the rows b m / B to (b + 1) m / B.
        residual: floating [m, n] or None.
        format: key of `formats.FORMATS`.
        group: inputs that share a scale; None where all k do.
    """

    x: Int8[Array, "m k"] | Float[Array, "m k"]
    w: Int8[Array, "n k"] | UInt8[Array, "n p"]
    scale: Float32[Array, "n g"]
    zero: Int8[Array, "n g"] | None
    x_scale: Float32[Array, "m 1"] | None
    sums: Int32[Array, "m 1"] | None
    bias: Float[Array, "n"] | None
    gate: Float[Array, "b n"] | None
    residual: Float[Array, "m n"] | None
    format: str = field(metadata={"static": True})
    group: int | None = field(metadata={"static": True})

    def sums_of(self, size: int) -> Int32[Array, "m p"] | Float32[Array, "m p"]:
        """Sums of x over parts of `size` inputs: exact for integers, float32 otherwise."""
        m, k = self.x.shape
        if size >= k and self.sums is not None:
            return self.sums
        parts = -(-k // size)
        dtype = jnp.int32 if self.x.dtype == jnp.int8 else jnp.float32
        padded = jnp.pad(self.x, ((0, 0), (0, parts * size - k)))
        return jnp.sum(padded.reshape(m, parts, size), axis=-1, dtype=dtype)


def prepare(
    x: QuantizedRows | Float[Array, "m k"],
    w: Int8[Array, "n k"] | UInt8[Array, "n p"],
    scale: Float32[Array, "n g"],
    zero: Int8[Array, "n g"] | None,
    *,
    format: str,
    group: int | None,
    bias: Float[Array, "n"] | None,
    gate: Float[Array, "b n"] | None,
    residual: Float[Array, "m n"] | None,
    out_dtype,
) -> Operands:
    """Checks the arguments of a product; see `api.matmul` for what they are.

    Raises:
        ValueError: a wrong format, dtype, shape or group, with what was expected and found.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if isinstance(x, QuantizedRows):
        _check_rows(x)
        values, x_scale, sums = x
    else:
        _check_floating("x", x, (None, None))
        values, x_scale, sums = x, None, None
    m, k = values.shape
    stored = FORMATS[format].stored_size(k)
    check("w", w, (None, None), FORMATS[format].dtype)
    n = w.shape[0]
    if w.shape[1] != stored:
        raise ValueError(f"{k} {format} codes take {stored} bytes a row, w has {w.shape[1]}")
    groups = _check_scale(scale, n, k, group)
    if zero is not None:
        check("zero", zero, scale.shape, jnp.int8)
    if bias is not None:
        _check_floating("bias", bias, (n,))
    if gate is not None:
        _check_floating("gate", gate, (None, n))
        if gate.shape[0] == 0 or m % gate.shape[0]:
            raise ValueError(f"gate has {gate.shape[0]} rows, not a divisor of the {m} of x")
    if residual is not None:
        _check_floating("residual", residual, (m, n))
    if np.dtype(out_dtype) not in [np.dtype(dtype) for dtype in OUT_DTYPES]:
        raise ValueError(f"out_dtype must be float32 or bfloat16, got {np.dtype(out_dtype)}")
    return Operands(
        x=values,
        w=w,
        scale=scale,
        zero=zero,
        x_scale=x_scale,
        sums=sums,
        bias=bias,
        gate=gate,
        residual=residual,
        format=format,
        group=None if groups == 1 else group,
    )


def _check_rows(x: QuantizedRows) -> None:
    check("x.codes", x.codes, (None, None), jnp.int8)
    m, k = x.codes.shape
    check("x.scale", x.scale, (m, 1), jnp.float32)
    check("x.sums", x.sums, (m, 1), jnp.int32)
    if k > MAX_INTEGER_K:
        raise ValueError(f"k is {k}; int32 holds any sum of int8 products up to {MAX_INTEGER_K}")


def _check_scale(scale, n: int, k: int, group: int | None) -> int:
    """Number of groups; one scale per row, or per tensor, needs no group size."""
    check("scale", scale, (None, None), jnp.float32)
    rows, groups = scale.shape
    if groups > 1 and (group is None or group < 1):
        raise ValueError(f"scale has {groups} groups a row; group says {group}, not their size")
    wanted = 1 if group is None else -(-k // group)
    if rows not in ((1, n) if groups == 1 else (n,)) or groups != wanted:
        raise ValueError(f"scale must have shape ({n}, {wanted}), got {scale.shape}")
    return groups


def _check_floating(name: str, array: jax.Array, shape: tuple[int | None, ...]) -> None:
    check(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {array.dtype}")
