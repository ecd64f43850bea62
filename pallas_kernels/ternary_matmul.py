"""int8 activations x packed ternary weights, unpacked in registers, as a Pallas-Triton kernel.

It has run in interpret mode and has been lowered for CUDA; it has never run on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int8, UInt8

from pallas_kernels import packing, tiles
from pallas_kernels.tiles import Tile

STEP_BYTES = 32  # packing's block: byte r holds k = r, r + 32, r + 64, r + 96
# Static figures of the compiled code, never a timing. On the A100 128 x 256 with a 32-byte step is
# bound by the tensor pipe and takes 221 registers a thread without a spill. Its wide n lets the
# compiler unpack four bytes at once; 128 x 128 falls to byte code, at a sixth of the bound.
LARGE = Tile(m=128, n=256, k=packing.BLOCK, num_warps=8, num_stages=3)
# Unpacking takes longer than multiplying 64 rows: 416 integer instructions to 64 products a step.
# 128 channels for 4 warps cost a warp what 256 cost 8, and give twice the blocks.
MEDIUM = Tile(m=64, n=128, k=packing.BLOCK, num_warps=4, num_stages=3)
# 16 rows are the least that the matrix instruction takes. Bound by unpacking as well, so
# not yet the kernel that one row deserves, which should be bound by reading the weights.
SMALL = Tile(m=16, n=64, k=packing.BLOCK, num_warps=4, num_stages=4)


def choose_tile(m: int) -> Tile:
    """The tile for m rows."""
    if m <= 16:
        return SMALL
    return MEDIUM if m <= 64 else LARGE


@functools.partial(jax.jit, static_argnames=("out_dtype", "tile", "interpret"))
def ternary_matmul(
    x: Int8[Array, "m k"],
    w: UInt8[Array, "n p"],
    x_scale: Float32[Array, "m 1"],
    w_scale: Float32[Array, "n"],
    bias: Float[Array, "n"] | None = None,
    *,
    out_dtype=jnp.float32,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`(x @ (codes(w) - 1).T) * x_scale * w_scale + bias`, summed in int32, scaled in float32.

    A stored code is value + 1. The 1 is taken off once per row, by the sum of its codes, and not
    once per weight: x . (c - 1) = x . c - sum(x).

    Args:
        x: int8[m, k] codes of the activations; any m, k.
        w: uint8[n, p], `packing.pack(value + 1, bits=2)` of n rows: p = packed_size(k, 2).
        x_scale: float32[m, 1], one per row.
        w_scale: float32[n], one per output channel.
        bias: floating [n], added in float32.
        out_dtype: float32 or bfloat16.
        tile: None: by m. Its k must be 128, one block of the packing.
        interpret: run the kernel's body as plain JAX, on any platform.

    Raises:
        ValueError: a wrong dtype, shape or tile, with what was expected and what was found.
        NotImplementedError: an operand is empty.
    """
    check_ternary_matmul(x, w, x_scale, w_scale, bias, out_dtype)
    tiles.refuse_empty(x, w)
    (m, k), (n, p) = x.shape, w.shape
    tile = tile or choose_tile(m)
    if tile.k != packing.BLOCK:
        raise ValueError(f"tile.k must be {packing.BLOCK}, got {tile.k}")
    row_sums = jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32)
    operands = [x, w, row_sums, x_scale, w_scale[None, :]]
    if bias is not None:
        operands.append(bias.astype(jnp.float32)[None, :])
    return pl.pallas_call(
        functools.partial(_kernel, m=m, n=n, k=k, tile=tile),
        # m runs fastest: neighbouring programs share a block of weights
        grid=(pl.cdiv(m, tile.m), pl.cdiv(n, tile.n)),
        in_specs=[
            tiles.covered((m, k), (tile.m, tile.k)),
            tiles.covered((n, p), (tile.n, STEP_BYTES)),
            *[tiles.covered((m, 1), (tile.m, 1))] * 2,
            *[tiles.covered((1, n), (1, tile.n))] * (len(operands) - 4),
        ],
        out_specs=tiles.covered((m, n), (tile.m, tile.n)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        compiler_params=tile.compiler_params(),
        interpret=interpret,
        name="ternary_matmul",
    )(*operands)


def check_ternary_matmul(x, w, x_scale, w_scale, bias, out_dtype) -> None:
    """Checks the operands of `ternary_matmul`.

    Raises:
        ValueError: a wrong dtype or shape, with what was expected and what was found.
    """
    tiles.check("w", w, (None, None), jnp.uint8)
    tiles.check_scaled_matmul(x, w.shape[0], x_scale, w_scale, bias, out_dtype)
    k, size = x.shape[1], packing.packed_size(x.shape[1], 2)
    if w.shape[1] != size:
        raise ValueError(f"{k} ternary codes take {size} bytes, w has {w.shape[1]}")


def _kernel(x_ref, w_ref, sums_ref, x_scale_ref, w_scale_ref, *rest, m, n, k, tile):
    bias_ref, out_ref = rest if len(rest) == 2 else (None, *rest)
    p = w_ref.shape[1]  # whole blocks, by the packing
    row, col = pl.program_id(0) * tile.m, pl.program_id(1) * tile.n

    def step(i, total):
        w = tiles.load(w_ref, (n, p), col, i * STEP_BYTES, (tile.n, STEP_BYTES))
        for run in range(4):  # one product of 32 codes per 2-bit plane: nothing is interleaved
            # behind the last k the bytes hold padding, and x is masked to 0
            start = i * tile.k + run * STEP_BYTES
            x = tiles.load(x_ref, (m, k), row, start, (tile.m, STEP_BYTES))
            plane = ((w >> (2 * run)) & 3).astype(jnp.int8)
            contract = (((1,), (1,)), ((), ()))
            total += jax.lax.dot_general(x, plane, contract, preferred_element_type=jnp.int32)
        return total

    start = jnp.zeros((tile.m, tile.n), jnp.int32)
    total = jax.lax.fori_loop(0, p // STEP_BYTES, step, start)
    total -= tiles.load(sums_ref, (m, 1), row, 0, (tile.m, 1))
    tiles.store_scaled(total, (m, n), row, col, x_scale_ref, w_scale_ref, bias_ref, out_ref)
