"""int8 x int8 -> int32 matrix product with scales in the epilogue, as a Pallas-Triton kernel.

It has run in interpret mode and has been lowered for CUDA; it has never run on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels import tiles
from pallas_kernels.tiles import Tile

# Static figures of the compiled code, never a timing. On the A100 128 x 128 x 64 is bound by the
# tensor pipe and takes 126 registers a thread without a spill: two blocks of 8 warps an SM.
LARGE = Tile(m=128, n=128, k=64, num_warps=8, num_stages=4)
# fewer rows: the weights are read once anyway, and rows of padding would be multiplied for nothing
MEDIUM = Tile(m=64, n=128, k=64, num_warps=4, num_stages=4)
# 16 rows are the least that the matrix instruction takes; a narrow n gives more blocks to fill
# the SMs with, a long k more bytes in flight: this shape is bound by memory
SMALL = Tile(m=16, n=64, k=128, num_warps=4, num_stages=4)


def choose_tile(m: int) -> Tile:
    """The tile for m rows."""
    if m <= 16:
        return SMALL
    return MEDIUM if m <= 64 else LARGE


@functools.partial(jax.jit, static_argnames=("out_dtype", "tile", "interpret"))
def int8_matmul(
    x: Int8[Array, "m k"],
    w: Int8[Array, "n k"],
    x_scale: Float32[Array, "m 1"],
    w_scale: Float32[Array, "n"],
    bias: Float[Array, "n"] | None = None,
    *,
    out_dtype=jnp.float32,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`(x @ w.T) * x_scale * w_scale + bias`, summed in int32, scaled in float32.

    Args:
        x: int8[m, k] codes of the activations; any m, k. int32 holds any sum up to k = 131071;
            beyond, the tensor cores would saturate where XLA wraps.
        w: int8[n, k] codes of the weights; any n.
        x_scale: float32[m, 1], one per row.
        w_scale: float32[n], one per output channel.
        bias: floating [n], added in float32.
        out_dtype: float32 or bfloat16.
        tile: None: by m.
        interpret: run the kernel's body as plain JAX, on any platform.

    Raises:
        ValueError: a wrong dtype or shape, with what was expected and what was found.
        NotImplementedError: an operand is empty.
    """
    check_int8_matmul(x, w, x_scale, w_scale, bias, out_dtype)
    tiles.refuse_empty(x, w)
    (m, k), n = x.shape, w.shape[0]
    tile = tile or choose_tile(m)
    operands = [x, w, x_scale, w_scale[None, :]]
    if bias is not None:
        operands.append(bias.astype(jnp.float32)[None, :])
    return pl.pallas_call(
        functools.partial(_kernel, m=m, n=n, k=k, tile=tile),
        # m runs fastest: neighbouring programs share a block of weights
        grid=(pl.cdiv(m, tile.m), pl.cdiv(n, tile.n)),
        in_specs=[
            tiles.covered((m, k), (tile.m, tile.k)),
            tiles.covered((n, k), (tile.n, tile.k)),
            tiles.covered((m, 1), (tile.m, 1)),
            *[tiles.covered((1, n), (1, tile.n))] * (len(operands) - 3),
        ],
        out_specs=tiles.covered((m, n), (tile.m, tile.n)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        compiler_params=tile.compiler_params(),
        interpret=interpret,
        name="int8_matmul",
    )(*operands)


def check_int8_matmul(x, w, x_scale, w_scale, bias, out_dtype) -> None:
    """Checks the operands of `int8_matmul`.

    Raises:
        ValueError: a wrong dtype or shape, with what was expected and what was found.
    """
    tiles.check("w", w, (None, None), jnp.int8)
    tiles.check_scaled_matmul(x, w.shape[0], x_scale, w_scale, bias, out_dtype)
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x has k = {x.shape[1]}, w has k = {w.shape[1]}")


def _kernel(x_ref, w_ref, x_scale_ref, w_scale_ref, *rest, m, n, k, tile):
    bias_ref, out_ref = rest if len(rest) == 2 else (None, *rest)
    row, col = pl.program_id(0) * tile.m, pl.program_id(1) * tile.n

    def step(i, total):
        x = tiles.load(x_ref, (m, k), row, i * tile.k, (tile.m, tile.k))
        w = tiles.load(w_ref, (n, k), col, i * tile.k, (tile.n, tile.k))
        contract = (((1,), (1,)), ((), ()))
        return total + jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.int32)

    start = jnp.zeros((tile.m, tile.n), jnp.int32)
    total = jax.lax.fori_loop(0, pl.cdiv(k, tile.k), step, start)
    tiles.store_scaled(total, (m, n), row, col, x_scale_ref, w_scale_ref, bias_ref, out_ref)
