"""Per-token quantisation as a Pallas-Triton kernel; equal to `reference.quantize_rows`.

It has run in interpret mode and has been lowered for CUDA; it has never run on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels import tiles

# 64 float32 values a thread at 8 warps, so that a row of 15360 (FLUX's widest) is read once
WIDEST_ROW = 16384
# a tile of narrow rows holds this many values: 32 a thread at 4 warps
TILE_VALUES = 4096


@functools.partial(jax.jit, static_argnames=("bits", "block_k", "interpret"))
def quantize_rows(
    x: Float[Array, "m k"],
    bits: int = 8,
    *,
    block_k: int | None = None,
    interpret: bool = False,
) -> tuple[Int8[Array, "m k"], Float32[Array, "m 1"]]:
    """Symmetric dynamic quantisation, one scale per row: `reference.quantize_rows` as a kernel.

    A row that fits in one block of `block_k` is read once and stays in registers; a longer one is
    read twice, for its largest value and for its codes.

    Args:
        x: bfloat16 or float32[m, k], any m and k.
        bits: 2 to 8; codes lie in [-qmax, qmax], qmax = 2^(bits-1) - 1.
        block_k: values of a row per step, a power of two; None: the row, up to 16384.
        interpret: run the kernel's body as plain JAX, on any platform.

    Returns:
        int8 codes [m, k] and the float32 scale [m, 1]: 1 for a row of zeros, non-finite for a row
        with NaN or inf.

    Raises:
        ValueError: x is not a bfloat16 or float32 matrix, bits outside 2..8, block_k no power of 2.
        NotImplementedError: x is empty.
    """
    tiles.check("x", x, (None, None))
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}")
    if not 2 <= bits <= 8:
        raise ValueError(f"activation bits {bits} outside 2..8")
    tiles.refuse_empty(x)
    m, k = x.shape
    block_k = min(tiles.power_of_two(k), WIDEST_ROW) if block_k is None else block_k
    if block_k < 1 or block_k != tiles.power_of_two(block_k):
        raise ValueError(f"block_k must be a power of two, got {block_k}")
    rows = max(1, min(TILE_VALUES // block_k, tiles.power_of_two(m)))
    kernel = functools.partial(
        _kernel, m=m, k=k, rows=rows, block_k=block_k, qmax=2 ** (bits - 1) - 1, interpret=interpret
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, rows),),
        in_specs=[tiles.covered((m, k), (rows, block_k))],
        out_specs=(
            tiles.covered((m, k), (rows, block_k)),
            tiles.covered((m, 1), (rows, 1)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((m, k), jnp.int8),
            jax.ShapeDtypeStruct((m, 1), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=4 if rows * block_k <= TILE_VALUES else 8, num_stages=2
        ),
        interpret=interpret,
        name="quantize_rows",
    )(x)


def _kernel(x_ref, codes_ref, scale_ref, *, m, k, rows, block_k, qmax, interpret):
    row = pl.program_id(0) * rows
    steps = pl.cdiv(k, block_k)

    def read(i):
        return tiles.load(x_ref, (m, k), row, i * block_k, (rows, block_k)).astype(jnp.float32)

    def write(i, x, scale):
        inverse = _inverse(scale, interpret)
        codes = jnp.clip(_round_half_even(x * inverse, interpret), -qmax, qmax)
        tiles.store(codes_ref, (m, k), row, i * block_k, codes.astype(jnp.int8))

    if steps == 1:
        x = read(0)
        scale = _scale(_peak(x), qmax)
        write(0, x, scale)
    else:
        start = jnp.zeros((rows, 1), jnp.float32)
        peak = jax.lax.fori_loop(0, steps, lambda i, peak: _larger(peak, _peak(read(i))), start)
        scale = _scale(peak, qmax)
        jax.lax.fori_loop(0, steps, lambda i, _: write(i, read(i), scale), None)
    tiles.store(scale_ref, (m, 1), row, 0, scale)


def _peak(x):
    """Largest size in each row, NaN where the row has one: no max is trusted to keep it."""
    peak = jnp.max(jnp.where(x == x, jnp.abs(x), 0.0), axis=1, keepdims=True)
    nans = jnp.max(jnp.where(x == x, 0.0, 1.0), axis=1, keepdims=True)
    return jnp.where(nans > 0, jnp.nan, peak)


def _larger(a, b):
    """Elementwise max of what `_peak` returned; a NaN in either stays."""
    larger = jnp.where(a > b, a, b)  # b where either is NaN
    return jnp.where(a == a, larger, a)


def _scale(peak, qmax):
    scale = peak * jnp.float32(1 / qmax)
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


# Triton divides approximately (div.full.f32, up to 2 ulp), has no round, and adding 1.5 * 2^23 to
# round would be fused with the product before it, which skips a rounding. One PTX instruction each
# does what IEEE says; interpret mode, which knows no assembly, takes the same from jnp.
def _inverse(scale, interpret):
    if interpret:
        return 1 / scale
    return _ptx("rcp.rn.f32 $0, $1;", "=f,f", scale, jnp.float32)


def _round_half_even(x, interpret):
    """float32 to the nearest int32, ties to even, NaN to 0."""
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
