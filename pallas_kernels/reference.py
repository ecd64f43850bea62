"""Plain-jnp form of every op: what a kernel must equal, and the backend where there is none.

Shape letters: m rows (tokens), k contraction, n output channels, g groups along k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels.formats import unpack_codes
from pallas_kernels.operands import Operands

FEW_ROWS = 256
"""Up to so many rows the int8 product is faster on CPU: it reads the weights as they are."""

_LAST = (((1,), (1,)), ((), ()))  # contract the last axis of both operands: (m, k) x (n, k)


def matmul_int32(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes, summed exactly in int32, returned as float32."""
    return _product(x, w, jnp.int32).astype(jnp.float32)


def matmul_bf16(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes as a bfloat16 product accumulated in float32.

    Codes up to 256 in size are exact in bfloat16 and every product is exact in float32; the sum is
    exact below 2^24 and rounded to float32 precision above.
    """
    return _product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), jnp.float32)


def matmul_codes(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes by the platform's fastest pure-XLA form.

    XLA's CPU backend has no VNNI path: for more than `FEW_ROWS` its bfloat16 product is faster than
    its int8 one, though it makes bfloat16 of all weights first.
    """
    on_cpu = matmul_int32 if x.shape[0] <= FEW_ROWS else matmul_bf16
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=matmul_int32)


def _product(x, w, dtype):
    """`x @ w.T`, accumulated in `dtype`."""
    m = x.shape[0]
    if m == 1:  # XLA:CPU takes one row an element at a time, on one core: two rows are faster
        x = jnp.pad(x, ((0, 1), (0, 0)))
    return jax.lax.dot_general(x, w, _LAST, preferred_element_type=dtype)[:m]


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
    """`residual + gate * (y + bias)` in float32, then the cast; see `operands.Operands`."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if gate is not None:
        rows = y.reshape(gate.shape[0], -1, y.shape[1])
        y = (rows * gate[:, None].astype(jnp.float32)).reshape(y.shape)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _integer_product(operands: Operands):
    x, x_scale, sums, zero = operands.x, operands.x_scale, operands.sums, operands.zero
    assert x_scale is not None and sums is not None
    w = unpack_codes(operands.w, operands.format, x.shape[1])
    if operands.group is not None:
        return x_scale * _grouped_product(operands, w)
    y = matmul_codes(x, w)
    if zero is not None:  # x.(c - z) = x.c - z sum(x): exact, and codes stay within int8
        y = y - sums.astype(jnp.float32) * zero[:, 0].astype(jnp.float32)
    return y * x_scale * operands.scale[:, 0]


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
        y = _product(x, w.astype(x.dtype), jnp.float32)
        return y * scale[:, 0]
    spread = lambda values: jnp.repeat(values.astype(jnp.float32), group, axis=1)[:, :k]  # noqa: E731
    w = w.astype(jnp.float32)
    if zero is not None:
        w = w - spread(zero)
    w = (w * spread(scale)).astype(x.dtype)
    return _product(x, w, jnp.float32)
