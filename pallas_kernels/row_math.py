"""What the row-quantising kernel does to a tile of rows, in a form that Triton takes.

Triton divides approximately (div.full.f32, up to 2 ulp), has no round, and adding 1.5 * 2^23 to
round would be fused with the product before it, which skips a rounding. One PTX instruction each
does what IEEE says; interpret mode, which knows no assembly, takes the same from jnp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float32, Int32

SIDE = 16  # of the matrices that the tensor cores take, and that a rotation is made of
GROUP = SIDE * SIDE  # values of a row that are rotated together, one block of 256 or four of 64


def gelu(x: Float32[Array, "r c"]) -> Float32[Array, "r c"]:
    """GELU in its tanh form, as `x * sigmoid(2u)`, u = sqrt(2 / pi) (x + 0.044715 x^3).

    1 + tanh(u) = 2 sigmoid(2u), without the cancellation that costs the left side all digits of a
    large negative x. One exp2 and one division, each good to 2 ulp on the GPU: the result is off by
    1e-6 of itself where it matters (|x| < 6). tanh.approx.f32 would be off by 5e-4 of 1 + tanh.
    """
    slope = 2 * np.sqrt(2 / np.pi) * np.log2(np.e)
    exponent = x * (np.float32(slope) + np.float32(0.044715 * slope) * (x * x))
    return x / (1 + jnp.exp2(-exponent))


def rotate(x: Float32[Array, "r c"], rotation: int) -> Float32[Array, "r c"]:
    """`reference_rows.rotate` of a tile whose columns are a multiple of 256, on tensor cores.

    Sylvester's matrix is a Kronecker product, H_B = H_(B/16) x H_16, so a row of 256 values written
    as a 16 x 16 matrix X becomes `L X H_16`, where L = blockdiag(H_(B/16), ...): two products of
    side 16 for every B. They cost 64 multiplications a value, and not 2 B, and their matrices
    two registers, where H_B would be read from memory by every program.

    The entries are +-1, exact in bfloat16. The values go in as two bfloat16 parts, which
    leaves 2^-17 of each value out, and are summed in float32: |error| <= 2^-16 sqrt(B) max|row|
    """
    rows, columns = x.shape
    right = _hadamard_blocks(SIDE)
    left = _hadamard_blocks(rotation // SIDE)
    x = _split_dot(x.reshape(-1, SIDE), right)
    x = _split_dot(_transposed(x), left)  # left is symmetric
    return _transposed(x).reshape(rows, columns) * jnp.float32(rotation**-0.5)


def _hadamard_blocks(block: int):
    """bfloat16[16, 16]: Sylvester's matrix of size `block` along the diagonal, 0 elsewhere."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SIDE, SIDE), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (SIDE, SIDE), 1)
    shared = row & column & (block - 1)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)  # the last bit is now the parity of the four
    signs = 1 - 2 * (shared & 1)
    return jnp.where(row // block == column // block, signs, 0).astype(jnp.bfloat16)


def _split_dot(x, signs):
    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    dot = lambda part: jnp.dot(part, signs, preferred_element_type=jnp.float32)  # noqa: E731
    return dot(high) + dot(low)


def _transposed(x):
    """Each 16 x 16 matrix of a pile of them."""
    return x.reshape(-1, SIDE, SIDE).swapaxes(1, 2).reshape(-1, SIDE)


def peak(x: Float32[Array, "r c"]) -> Float32[Array, "r 1"]:
    """Largest size in each row, NaN where the row has one: no max is trusted to keep it."""
    largest = jnp.max(jnp.where(x == x, jnp.abs(x), 0.0), axis=1, keepdims=True)
    nans = jnp.max(jnp.where(x == x, 0.0, 1.0), axis=1, keepdims=True)
    return jnp.where(nans > 0, jnp.nan, largest)


def larger(a: Float32[Array, "r 1"], b: Float32[Array, "r 1"]) -> Float32[Array, "r 1"]:
    """Elementwise max of what `peak` returned; a NaN in either stays."""
    larger = jnp.where(a > b, a, b)  # b where either is NaN
    return jnp.where(a == a, larger, a)


def row_scale(peak: Float32[Array, "r 1"], qmax: int) -> Float32[Array, "r 1"]:
    """`peak / qmax`, and 1 where that is 0 or denormal."""
    scale = peak * jnp.float32(1 / qmax)
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def inverse(x: Float32[Array, "r 1"], interpret: bool) -> Float32[Array, "r 1"]:
    """1 / x, correctly rounded."""
    if interpret:
        return 1 / x
    return _ptx("rcp.rn.f32 $0, $1;", "=f,f", x, jnp.float32)


def round_half_even(x: Float32[Array, "r c"], interpret: bool) -> Int32[Array, "r c"]:
    """To the nearest int32, ties to even, NaN to 0."""
    if interpret:
        return jnp.round(jnp.where(x == x, x, 0.0)).astype(jnp.int32)
    return _ptx("cvt.rni.s32.f32 $0, $1;", "=r,f", x, jnp.int32)


def _ptx(instruction, constraints, x, dtype):
    (y,) = pltriton.elementwise_inline_asm(
        instruction,
        args=[x],
        constraints=constraints,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, dtype)],
    )
    return y
