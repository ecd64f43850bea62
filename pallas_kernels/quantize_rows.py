"""Per-token quantisation as one Pallas-Triton kernel: of rows, after AdaLN, or after GELU.

Equal to `reference_rows`. It has run in interpret mode and has been lowered for CUDA; it has never
run on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32

from pallas_kernels import row_math, row_walk, tiles
from pallas_kernels.reference_rows import check_modulate, check_rows
from pallas_kernels.row_walk import Walk
from pallas_kernels.rows import QuantizedRows

# 64 float32 values a thread at 8 warps, so that a row of 15360 (FLUX's widest) is read once
WIDEST_ROW = 16384
# a tile of narrow rows holds this many values: 32 a thread at 4 warps
TILE_VALUES = 4096
STATIC = ("bits", "rotation", "block_k", "interpret")


@functools.partial(jax.jit, static_argnames=STATIC)
def quantize_rows(
    x: Float[Array, "m k"],
    bits: int = 8,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
    *,
    block_k: int | None = None,
    interpret: bool = False,
) -> QuantizedRows:
    """Symmetric dynamic quantisation, one scale per row: `reference_rows.quantize_rows`.

    Without a rotation the two are equal bit for bit. With one, the kernel's float32 values are off
    by what `row_math.rotate` says.

    A row that fits in one block of `block_k` is read once and stays in registers; a longer one is
    read twice, for its largest value and for its codes.

    Args:
        x: bfloat16 or float32[m, k], any m and k.
        bits: 2 to 8; codes lie in [-qmax, qmax], qmax = 2^(bits-1) - 1.
        mask: float32[k], multiplies the channels.
        rotation: 64, 128 or 256, the block size of the Hadamard rotation after the mask.
        block_k: values of a row per step, a power of two; None: the row, up to 16384.
        interpret: run the kernel's body as plain JAX, on any platform.

    Raises:
        ValueError: x is not a bfloat16 or float32 matrix, block_k is no power of two (with a
            rotation: of at least 256), or see `reference_rows.check_rows`.
        NotImplementedError: x is empty, or has 2^31 values or more.
    """
    return _matrix(row_walk.identity, x, bits, mask, rotation, block_k, interpret)


@functools.partial(jax.jit, static_argnames=STATIC)
def gelu_quantize_rows(
    x: Float[Array, "m k"],
    bits: int = 8,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
    *,
    block_k: int | None = None,
    interpret: bool = False,
) -> QuantizedRows:
    """`quantize_rows(gelu(x))` in one pass: `reference_rows.gelu_quantize_rows`.

    Arguments and errors are those of `quantize_rows`; `row_math.gelu` says how exact it is.
    """
    return _matrix(row_walk.gelu, x, bits, mask, rotation, block_k, interpret)


@functools.partial(jax.jit, static_argnames=(*STATIC, "eps"))
def modulate_quantize_rows(
    x: Float[Array, "b t k"],
    shift: Float[Array, "b k"],
    scale: Float[Array, "b k"],
    bits: int = 8,
    *,
    eps: float = 1e-6,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
    block_k: int | None = None,
    interpret: bool = False,
) -> QuantizedRows:
    """AdaLN and quantisation in one pass: `reference_rows.modulate_quantize_rows`.

    A row that does not fit in one block is read four times: for mean, variance, peak and codes.

    Args:
        x: bfloat16 or float32[b, t, k].
        shift: bfloat16 or float32[b, k].
        scale: likewise.
        bits: see `quantize_rows`, as for all that follow.
        eps: added to the variance.
        mask: float32[k], after AdaLN.
        rotation: after the mask.
        block_k: values of a row per step.
        interpret: run the kernel's body as plain JAX.

    Raises:
        ValueError: see `quantize_rows` and `reference_rows.check_modulate`.
        NotImplementedError: see `quantize_rows`.
    """
    check_modulate(x, shift, scale)
    operands = {"x": x, "shift": shift[:, None], "scale": scale[:, None]}
    return _call(row_walk.modulate, operands, bits, mask, rotation, block_k, interpret, eps)


def _matrix(prologue, x, *args) -> QuantizedRows:
    """The kernel on x[m, k]."""
    tiles.check("x", x, (None, None))
    tiles.refuse_empty(x)
    codes, scale, sums = _call(prologue, {"x": x[None]}, *args)
    return QuantizedRows(codes[0], scale[0], sums[0])


def _call(prologue, operands, bits, mask, rotation, block_k, interpret, eps=0.0) -> QuantizedRows:
    """The kernel on x[b, t, k], and for AdaLN shift and scale[b, 1, k]."""
    _check(operands, bits, mask, rotation)
    b, t, k = operands["x"].shape
    block_k = _block_k(block_k, k, rotation)
    rows = max(1, min(TILE_VALUES // block_k, tiles.power_of_two(t)))
    if mask is not None:
        operands = operands | {"mask": mask[None, None]}
    steps = {name: (rows if name == "x" else 1, block_k) for name in operands}
    kernel = functools.partial(
        _kernel,
        prologue=prologue,
        size=(t, k),
        block=(rows, block_k),
        rotation=rotation,
        qmax=2 ** (bits - 1) - 1,
        eps=eps,
        interpret=interpret,
    )
    outputs = ((k, block_k, jnp.int8), (1, 1, jnp.float32), (1, 1, jnp.int32))
    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(t, rows), b),
        in_specs=[{name: _spec(operands[name].shape, step) for name, step in steps.items()}],
        out_specs=[_spec((b, t, n), (rows, step)) for n, step, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct((b, t, n), dtype) for n, _, dtype in outputs],
        compiler_params=pltriton.CompilerParams(
            num_warps=4 if rows * block_k <= TILE_VALUES else 8, num_stages=2
        ),
        interpret=interpret,
        name=f"{prologue.__name__}_quantize_rows",
    )(operands)
    return QuantizedRows(*found)


def _check(operands, bits, mask, rotation) -> None:
    x = operands["x"]
    for name, array in operands.items():
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"{name} must be bfloat16 or float32, got {array.dtype}")
    check_rows(x, bits, mask, rotation)
    tiles.refuse_empty(x)
    if x.size >= 2**31:
        raise NotImplementedError(f"the kernels index with 32 bits: {x.shape} is too large")


def _block_k(block_k: int | None, k: int, rotation: int | None) -> int:
    least = 1 if rotation is None else row_math.GROUP
    if block_k is None:
        return max(least, min(tiles.power_of_two(k), WIDEST_ROW))
    if block_k < least or block_k != tiles.power_of_two(block_k):
        raise ValueError(f"block_k must be a power of two from {least} on, got {block_k}")
    return block_k


def _spec(shape: tuple[int, int, int], step: tuple[int, int]) -> pl.BlockSpec:
    """Its image's matrix for each program, or the only one there is; see `tiles.covered`."""
    b, rows, columns = shape
    block = [-(-size // by) * by for size, by in ((rows, step[0]), (columns, step[1]))]
    return pl.BlockSpec((None, *block), lambda _, image: (image if b > 1 else 0, 0, 0))


def _kernel(
    refs, codes_ref, scale_ref, sums_ref, *, prologue, size, block, rotation, qmax, eps, interpret
):
    row = pl.program_id(0) * block[0]
    walk = Walk(size, block, row)
    rows = prologue(walk, refs, eps)

    def finished(i):
        x = rows(i)
        if "mask" in refs:
            x = x * walk.load_channels(refs["mask"], i)
        return x if rotation is None else row_math.rotate(x, rotation)

    read = walk.kept(finished)
    zeros = jnp.zeros((block[0], 1), jnp.float32)
    peak = walk.fold(lambda i, peak: row_math.larger(peak, row_math.peak(read(i))), zeros)
    scale = row_math.row_scale(peak, qmax)
    inverse = row_math.inverse(scale, interpret)

    def write(i, sums):
        codes = row_math.round_half_even(read(i) * inverse, interpret)
        codes = jnp.clip(codes, -qmax, qmax)
        walk.store(codes_ref, i, codes.astype(jnp.int8))
        return sums + jnp.sum(codes, axis=1, keepdims=True)

    sums = walk.fold(write, zeros.astype(jnp.int32))
    tiles.store(scale_ref, (size[0], 1), row, 0, scale)
    tiles.store(sums_ref, (size[0], 1), row, 0, sums)
