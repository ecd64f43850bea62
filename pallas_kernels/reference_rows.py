"""Plain-jnp form of the row-quantising ops: what the kernel must equal, and the backend without it.

Each quantises rows (tokens) to integers, one scale per row: of an array as it is, after AdaLN, or
after GELU. A channel mask and a block-diagonal Hadamard rotation may come in between.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels.rows import QuantizedRows

ROTATIONS = (64, 128, 256)
"""Block sizes of the rotation."""


def quantize_rows(
    x: Float[Array, "... k"],
    bits: int = 8,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
) -> QuantizedRows:
    """Symmetric dynamic quantisation of `rotate(x * mask)`, one scale per row (per token).

    `scale = max|x| / qmax`, `codes = round_half_even(x / scale)`, qmax = 2^(bits-1) - 1 (127 for 8
    bits, the convention of ViDiT-Q and torch). Both divisions are products with a reciprocal, and
    spelled so: XLA makes them of a division by a broadcast anyway, and a kernel must round alike.
    An all-zero row has scale 1 and zero codes. A row with NaN or inf has a non-finite scale, so its
    products are non-finite too: never silently 0.

    Args:
        x: floating [..., k].
        bits: 2 to 8.
        mask: float32[k], multiplies the channels: a balance, the signs of a randomised Hadamard.
        rotation: 64, 128 or 256, the block size of `rotate`; None: no rotation.

    Raises:
        ValueError: see `check_rows`.
    """
    check_rows(x, bits, mask, rotation)
    return _quantized(x.astype(jnp.float32), bits, mask, rotation)


def modulate_quantize_rows(
    x: Float[Array, "b t k"],
    shift: Float[Array, "b k"],
    scale: Float[Array, "b k"],
    bits: int = 8,
    *,
    eps: float = 1e-6,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
) -> QuantizedRows:
    """`quantize_rows((1 + scale) * layer_norm(x) + shift)`: AdaLN, in float32 up to the codes.

    LayerNorm has no affine parameters. The unfused form rounds its result, the product and the sum
    to the dtype of x; this op does not, so in bfloat16 it is the more exact of the two. A row whose
    variance overflows float32 has a non-finite scale.

    Args:
        x: floating [b, t, k].
        shift: floating [b, k], of every token of an image.
        scale: likewise.
        bits: 2 to 8.
        eps: added to the variance.
        mask: float32[k], after AdaLN; see `quantize_rows`.
        rotation: after the mask; see `quantize_rows`.

    Raises:
        ValueError: see `check_modulate` and `check_rows`.
    """
    check_modulate(x, shift, scale)
    check_rows(x, bits, mask, rotation)
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    inverse = jnp.where(variance < jnp.inf, jax.lax.rsqrt(variance + eps), jnp.nan)
    factor = 1 + scale.astype(jnp.float32)[:, None]
    y = centred * inverse * factor + shift.astype(jnp.float32)[:, None]
    return _quantized(y, bits, mask, rotation)


def gelu_quantize_rows(
    x: Float[Array, "... k"],
    bits: int = 8,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
) -> QuantizedRows:
    """`quantize_rows(gelu(x))`, GELU in its tanh form, in float32 up to the codes.

    Arguments and errors are those of `quantize_rows`.
    """
    check_rows(x, bits, mask, rotation)
    y = jax.nn.gelu(x.astype(jnp.float32), approximate=True)
    return _quantized(y, bits, mask, rotation)


def quantize_split_rows(
    x: Float[Array, "... k/d"],
    bits: int,
    axis_name: str,
    mask: Float32[Array, "k/d"] | None = None,
    rotation: int | None = None,
) -> QuantizedRows:
    """A device's share of `quantize_rows` of rows that are split over the devices of a mesh axis.

    The scale is that of the whole row, so the codes are those one device would find; the sums are
    those of the share. For a program in `jax.shard_map`.

    Args:
        x: the share.
        bits: 2 to 8.
        axis_name: the mesh axis.
        mask: this share's channels of it; see `quantize_rows`.
        rotation: its blocks must lie within shares; see `quantize_rows`.

    Raises:
        ValueError: see `check_rows`.
    """
    check_rows(x, bits, mask, rotation)
    prepared = _prepared(x.astype(jnp.float32), mask, rotation)
    # a maximum over devices may drop NaN as one over channels does: it goes as infinity
    peak = _peaks(prepared)
    peak = jax.lax.pmax(jnp.where(jnp.isnan(peak), jnp.inf, peak), axis_name)
    return _codes(prepared, peak, bits)


def rotate(x: Float32[Array, "... k"], rotation: int) -> Float32[Array, "... k"]:
    """`x @ blockdiag(H, H, ...) / sqrt(rotation)`: orthogonal and its own inverse.

    As a float32 product at the highest precision, on every platform: this is what others are held
    to, and it costs less than a hundredth of the matrix product that it prepares.
    """
    blocks = x.reshape(*x.shape[:-1], -1, rotation)
    rotated = jnp.dot(blocks, hadamard(rotation), precision=jax.lax.Precision.HIGHEST)
    return (rotated * jnp.float32(rotation**-0.5)).reshape(x.shape)


def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix, float32[size, size] of +-1; size is a power of two.

    Entry (i, j) is -1 to the number of ones that i and j share in binary.
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def check_rows(x, bits: int, mask, rotation: int | None) -> None:
    """Checks what all row-quantising ops share.

    Raises:
        ValueError: x is no floating array of rows; bits outside 2..8; mask is not float32[k];
            rotation is not one of `ROTATIONS`, or k is no multiple of it.
    """
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a floating array of rows, got {x.dtype} of shape {x.shape}")
    k = x.shape[-1]
    if not 2 <= bits <= 8:
        raise ValueError(f"activation bits {bits} outside 2..8")
    if mask is not None and (mask.dtype != jnp.float32 or mask.shape != (k,)):
        raise ValueError(f"mask must be float32 of shape ({k},), got {mask.dtype}{mask.shape}")
    if rotation is None:
        return
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation must be None or one of {ROTATIONS}, got {rotation}")
    if k % rotation:
        raise ValueError(f"rotation {rotation} does not divide k = {k}; choose another, or None")


def check_modulate(x, shift, scale) -> None:
    """Checks the operands of AdaLN.

    Raises:
        ValueError: x is not 3-D; shift or scale is not floating [b, k].
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (b, t, k), got {x.shape}")
    b, _, k = x.shape
    for name, array in (("shift", shift), ("scale", scale)):
        if array.shape != (b, k) or not jnp.issubdtype(array.dtype, jnp.floating):
            found = f"{array.dtype}{array.shape}"
            raise ValueError(f"{name} must be floating of shape ({b}, {k}), got {found}")


def _quantized(x32, bits, mask, rotation) -> QuantizedRows:
    x32 = _prepared(x32, mask, rotation)
    return _codes(x32, _peaks(x32), bits)


def _prepared(x32, mask, rotation):
    if mask is not None:
        x32 = x32 * mask
    return x32 if rotation is None else rotate(x32, rotation)


def _peaks(x32):
    peak = jnp.max(jnp.abs(x32), axis=-1, keepdims=True)
    # XLA:CPU's max drops NaN on rows of 2048 and more
    return jnp.where(jnp.isnan(x32).any(axis=-1, keepdims=True), jnp.nan, peak)


def _codes(x32, peak, bits) -> QuantizedRows:
    qmax = 2 ** (bits - 1) - 1
    scale = peak * jnp.float32(1 / qmax)
    # zeros, and what is as good as zero: a denormal scale, which hardware may flush, has no inverse
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    codes = jnp.clip(jnp.round(x32 * (1 / scale)), -qmax, qmax).astype(jnp.int8)
    return QuantizedRows(codes, scale, jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32))
