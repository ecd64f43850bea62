"""Plain-jnp form of every op: what a kernel must equal, and the backend where there is none.

Shape letters: m rows (tokens), k contraction, n output channels, g groups along k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels.formats import unpack_codes
from pallas_kernels.operands import Operands

_LAST = (((1,), (1,)), ((), ()))  # contract the last axis of both operands: (m, k) x (n, k)


def quantize_rows(
    x: Float[Array, "... k"], bits: int = 8
) -> tuple[Int8[Array, "... k"], Float32[Array, "... 1"]]:
    """Symmetric dynamic quantisation, one scale per row (per token).

    `scale = max|x| / qmax`, `codes = round_half_even(x / scale)`, qmax = 2^(bits-1) - 1 (127 for 8
    bits, the convention of ViDiT-Q and torch). Both divisions are products with a reciprocal, and
    spelled so: XLA makes them of a division by a broadcast anyway, and a kernel must round alike.
    An all-zero row has scale 1 and zero codes. A row with NaN or inf has a non-finite scale, so its
    products are non-finite too: never silently 0.

    Raises:
        ValueError: bits outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activation bits {bits} outside 2..8")
    qmax = 2 ** (bits - 1) - 1
    x32 = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x32), axis=-1, keepdims=True)
    # XLA:CPU's max drops NaN on rows of 2048 and more
    peak = jnp.where(jnp.isnan(x32).any(axis=-1, keepdims=True), jnp.nan, peak)
    scale = peak * jnp.float32(1 / qmax)
    # zeros, and what is as good as zero: a denormal scale, which hardware may flush, has no inverse
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    codes = jnp.clip(jnp.round(x32 * (1 / scale)), -qmax, qmax).astype(jnp.int8)
    return codes, scale


def matmul_int32(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes, summed exactly in int32, returned as float32."""
    total = jax.lax.dot_general(x, w, _LAST, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32)


def matmul_bf16(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes as a bfloat16 product accumulated in float32.

    Codes up to 256 in size are exact in bfloat16 and every product is exact in float32; the sum is
    exact below 2^24 and rounded to float32 precision above.
    """
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, w, _LAST, preferred_element_type=jnp.float32)


def matmul_codes(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes by the platform's fastest pure-XLA form.

    XLA's CPU backend has no VNNI path: its bfloat16 product is faster than its int8 one.
    """
    return jax.lax.platform_dependent(x, w, cpu=matmul_bf16, default=matmul_int32)


def matmul(operands: Operands, *, out_dtype=jnp.float32) -> Float[Array, "m n"]:
    """The scaled product of `operands` in plain jnp: the oracle, and the backend off CUDA.

    Integer activations are multiplied with integer codes, exactly up to what `matmul_codes` says;
    floating ones with the codes (one scale per row: exact in bfloat16) or, in groups, with the
    weights the codes stand for. Both scales come after the sum.
    """
    total = _integer_product(operands) if operands.x_scale is not None else _float_product(operands)
    return epilogue(total, operands.bias, operands.gate, operands.residual, out_dtype)


def epilogue(
    y: Float32[Array, "m n"],
    bias: Float[Array, "n"] | None,
    gate: Float[Array, "b n"] | None,
    residual: Float[Array, "m n"] | None,
    out_dtype,
) -> Float[Array, "m n"]:
    """`residual + gate * (y + bias)` in float32, then the cast; entry b of the gate for its rows."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if gate is not None:
        rows = y.reshape(gate.shape[0], -1, y.shape[1])
        y = (rows * gate[:, None].astype(jnp.float32)).reshape(y.shape)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _integer_product(operands: Operands):
    x, zero = operands.x, operands.zero
    w = unpack_codes(operands.w, operands.format, x.shape[1])
    if operands.group is not None:
        return operands.x_scale * _grouped_product(operands, w)
    y = matmul_codes(x, w)
    if zero is not None:  # x.(c - z) = x.c - z sum(x): exact, and codes stay within int8
        y = y - operands.sums.astype(jnp.float32) * zero[:, 0].astype(jnp.float32)
    return y * operands.x_scale * operands.scale[:, 0]


def _grouped_product(operands: Operands, w: Int8[Array, "n k"]):
    """`sum_g scale[:, g] * (x_g @ (w_g - zero_g).T)`, one group at a time: no (m, g, n) tensor."""
    x, scale, zero, group = operands.x, operands.scale, operands.zero, operands.group
    assert group is not None
    groups = scale.shape[-1]
    pad = ((0, 0), (0, groups * group - x.shape[-1]))
    x_groups = jnp.pad(x, pad).reshape(x.shape[0], groups, group).swapaxes(0, 1)
    w_groups = jnp.pad(w, pad).reshape(w.shape[0], groups, group).swapaxes(0, 1)

    def add_group(total, part):
        x_g, w_g, scale_g = part
        return total + matmul_codes(x_g, w_g) * scale_g, None

    start = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
    total, _ = jax.lax.scan(add_group, start, (x_groups, w_groups, scale.T))
    if zero is None:
        return total
    sums = operands.sums_of(group).astype(jnp.float32)
    shift = (scale * zero).astype(jnp.float32)
    return total - jnp.dot(sums, shift.T, precision=jax.lax.Precision.HIGHEST)


def _float_product(operands: Operands):
    x, scale, zero, group = operands.x, operands.scale, operands.zero, operands.group
    k = x.shape[1]
    w = unpack_codes(operands.w, operands.format, k)
    if group is None:
        if zero is not None:
            w = w.astype(jnp.int16) - zero.astype(jnp.int16)
        y = jax.lax.dot_general(x, w.astype(x.dtype), _LAST, preferred_element_type=jnp.float32)
        return y * scale[:, 0]
    spread = lambda values: jnp.repeat(values.astype(jnp.float32), group, axis=1)[:, :k]  # noqa: E731
    w = w.astype(jnp.float32)
    if zero is not None:
        w = w - spread(zero)
    w = (w * spread(scale)).astype(x.dtype)
    return jax.lax.dot_general(x, w, _LAST, preferred_element_type=jnp.float32)
