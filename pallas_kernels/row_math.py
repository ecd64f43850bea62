"""What the row-quantising kernel does to a block of a row, in a form that Triton takes.

Triton divides approximately (div.full.f32, up to 2 ulp), has no round, and adding 1.5 * 2^23 to
round would be fused with the product before it, which skips a rounding. One PTX instruction each
does what IEEE says; interpret mode, which knows no assembly, takes the same from jnp.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

from pallas_kernels.ptx import ptx

SIDE = 16  # of the matrices that the tensor cores take, and that a rotation is made of
GROUP = SIDE * SIDE  # values of a row that are rotated together, one block of 256 or four of 64


def gelu(x: Float32[Array, "l c"], interpret: bool) -> Float32[Array, "l c"]:
    """GELU in its tanh form, as `x * sigmoid(2u)`, u = sqrt(2 / pi) (x + 0.044715 x^3).

    1 + tanh(u) = 2 sigmoid(2u), without the cancellation that costs the left side all digits of a
    large negative x. ex2.approx and rcp.approx are good to 2^-22 and 1 ulp: the result is off by
    less than 3e-6 of itself for |x| < 6. tanh.approx would be off by 2^-11.
    """
    slope = 2 * np.sqrt(2 / np.pi) * np.log2(np.e)
    exponent = x * (np.float32(-slope) - np.float32(0.044715 * slope) * (x * x))
    if interpret:
        return x * (1 / (1 + jnp.exp2(exponent)))
    power = ptx("ex2.approx.ftz.f32 $0, $1;", "=f,f", exponent, dtype=jnp.float32)
    return x * ptx("rcp.approx.ftz.f32 $0, $1;", "=f,f", 1 + power, dtype=jnp.float32)


def rotate(x: Float32[Array, "1 c"], rotation: int) -> Float32[Array, "l 16"]:
    """`reference_rows.rotate` of a block of a multiple of 256 values, on tensor cores.

    Sylvester's matrix is a Kronecker product, H_B = H_(B/16) x H_16, so 256 values of a row, as a
    16 x 16 matrix X, become `L X H_16`, where L = blockdiag(H_(B/16), ...): two products of
    side 16, whatever B. A value takes part in 64 multiplications, not 2 B, and the matrices take
    two registers, where H_B would be read by every program.

    The entries are +-1, exact in bfloat16. The values go into each product as two bfloat16 parts,
    which leave out 2^-16 of a value, and are summed in float32. As the parts that are left out are
    rotated like the rest, |error| <= 2^-15 sqrt(B) max|row|; 4e-6 of the largest is usual.

    Returns:
        The rotated values in another order, that of `L X H_16` transposed: `unfold` restores it.
        A maximum or a sum need not wait for that.
    """
    lines = _split_dot(x.reshape(-1, SIDE), _hadamard_blocks(SIDE))
    lines = _split_dot(_transposed(lines), _hadamard_blocks(rotation // SIDE))  # L is symmetric
    return lines * jnp.float32(rotation**-0.5)


def unfold(lines: Shaped[Array, "l 16"]) -> Shaped[Array, "1 c"]:
    """What `rotate` returned, or the codes of it, as a block of the row again."""
    return _transposed(lines).reshape(1, -1)


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


def size_bits(x: Float32[Array, "l c"]) -> Int32[Array, "l c"]:
    """The bits of |x|. As integers they have the order of the sizes, and NaN is the largest.

    No float maximum is trusted to keep a NaN, and one instruction less than asking for it.
    """
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def over_row(reduce: Callable, x: Shaped[Array, "l c"]) -> Shaped[Array, "1 1"]:
    """The sum or the maximum of a block."""
    return reduce(reduce(x, axis=1, keepdims=True), axis=0, keepdims=True)


def scale_of(peak: Int32[Array, "1 1"], qmax: int) -> Float32[Array, "1 1"]:
    """`peak / qmax` of the bits of a row's largest size, and 1 where that is 0 or denormal."""
    scale = jax.lax.bitcast_convert_type(peak, jnp.float32) * jnp.float32(1 / qmax)
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def inverse(x: Float32[Array, "1 1"], interpret: bool) -> Float32[Array, "1 1"]:
    """1 / x, correctly rounded."""
    if interpret:
        return 1 / x
    return ptx("rcp.rn.f32 $0, $1;", "=f,f", x, dtype=jnp.float32)


def round_half_even(x: Float32[Array, "l c"], interpret: bool) -> Int32[Array, "l c"]:
    """To the nearest int32, ties to even, NaN to 0."""
    if interpret:
        return jnp.round(jnp.where(x == x, x, 0.0)).astype(jnp.int32)
    return ptx("cvt.rni.s32.f32 $0, $1;", "=r,f", x, dtype=jnp.int32)
