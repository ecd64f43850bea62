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

# A block is 8 values a thread, which in bfloat16 is one load of 16 bytes, and at most 8 warps.
# A row of up to 9 blocks (18432 values) stays in registers, 72 or fewer a thread.
WARP_VALUES, WIDEST_BLOCK = 256, 2048
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
    by what `row_math.rotate` says: of 10^4 8-bit codes of normal values about one, next to a tie,
    differs by 1.

    One program per row. A row of up to nine blocks, which by default is one of up to 18432 values,
    is read once and stays in registers; a longer one is read twice, for its largest value and for
    its codes.

    Args:
        x: bfloat16 or float32[m, k], any m and k.
        bits: 2 to 8; codes lie in [-qmax, qmax], qmax = 2^(bits-1) - 1.
        mask: float32[k], multiplies the channels.
        rotation: 64, 128 or 256, the block size of the Hadamard rotation after the mask.
        block_k: values of a block, a power of two up to 2048; None: by k.
        interpret: run the kernel's body as plain JAX, on any platform.

    Raises:
        ValueError: x is not a bfloat16 or float32 matrix, block_k is no power of two (with a
            rotation: of at least 256) or over 2048, or see `reference_rows.check_rows`.
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

    A row of more than nine blocks is read four times: for mean, variance, peak and codes.

    Args:
        x: bfloat16 or float32[b, t, k].
        shift: bfloat16 or float32[b, k].
        scale: likewise.
        bits: see `quantize_rows`, as for all that follow.
        eps: added to the variance.
        mask: float32[k], after AdaLN.
        rotation: after the mask.
        block_k: values of a block.
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
    width = _width(block_k, k, rotation)
    if mask is not None:
        operands = operands | {"mask": mask[None, None]}
    kernel = functools.partial(
        _kernel,
        walk=Walk(k, width),
        prologue=prologue,
        rotation=rotation,
        qmax=2 ** (bits - 1) - 1,
        eps=eps,
        interpret=interpret,
    )
    outputs = ((k, width, jnp.int8), (1, 1, jnp.float32), (1, 1, jnp.int32))
    found = pl.pallas_call(
        kernel,
        grid=(t, b),
        in_specs=[{name: _row(array.shape, width) for name, array in operands.items()}],
        out_specs=[_row((b, t, n), step) for n, step, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct((b, t, n), dtype) for n, _, dtype in outputs],
        compiler_params=pltriton.CompilerParams(
            num_warps=max(1, width // WARP_VALUES), num_stages=2
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


def _width(block_k: int | None, k: int, rotation: int | None) -> int:
    """Values of a block: the fewest that `Walk` keeps the whole row of, or block_k."""
    least = 1 if rotation is None else row_math.GROUP
    if block_k is None:
        fewest = tiles.power_of_two(pl.cdiv(k, row_walk.MAX_KEPT))
        width = min(max(fewest, WARP_VALUES), WIDEST_BLOCK)
        return max(least, min(width, tiles.power_of_two(k)))
    if not least <= block_k <= WIDEST_BLOCK or block_k != tiles.power_of_two(block_k):
        wanted = f"a power of two from {least} to {WIDEST_BLOCK}"
        raise ValueError(f"block_k must be {wanted}, got {block_k}")
    return block_k


def _row(shape: tuple[int, int, int], width: int) -> pl.BlockSpec:
    """The row of an array [b, t, k] that program (t, b) works on, made up to whole blocks.

    What lies behind its end is masked by `tiles`. An axis of size 1 is the same for all programs.
    """
    images, rows, k = shape
    index = lambda row, image: (image if images > 1 else 0, row if rows > 1 else 0, 0)  # noqa: E731
    return pl.BlockSpec((None, 1, pl.cdiv(k, width) * width), index)


def _kernel(
    refs, codes_ref, scale_ref, sums_ref, *, walk, prologue, rotation, qmax, eps, interpret
):
    prepared = prologue(walk, refs, eps=eps, interpret=interpret)

    def finished(i):
        x = prepared(i)
        if "mask" in refs:
            x = x * walk.load(refs["mask"], i)
        return x if rotation is None else row_math.rotate(x, rotation)

    read = walk.kept(finished)
    sizes = walk.total(jnp.maximum, lambda i: row_math.size_bits(read(i)))
    scale = row_math.scale_of(row_math.over_row(jnp.max, sizes), qmax)
    inverse = row_math.inverse(scale, interpret)

    def write(i):
        # |x| <= peak, so no quotient rounds to more than qmax: there is nothing to clip
        codes = row_math.round_half_even(read(i) * inverse, interpret)
        narrow = codes.astype(jnp.int8)
        walk.store(codes_ref, i, narrow if rotation is None else row_math.unfold(narrow))
        return codes

    sums_ref[...] = row_math.over_row(jnp.sum, walk.total(jnp.add, write))
    scale_ref[...] = scale
