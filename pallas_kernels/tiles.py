"""What the kernels share: tile sizes, masked loads and stores, the scaling epilogue, checks.

Triton computes on arrays whose sizes are powers of two only, so every kernel covers its arrays with
power-of-two tiles and masks what hangs over the edge. A mask along an axis that the tiles fill is
left out when the kernel is traced: aligned shapes pay nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows, output channels and contraction step of one program, and how it is compiled.

    `k` counts codes; a packed operand reads the bytes that hold them. All three are powers of two.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def compiler_params(self) -> pltriton.CompilerParams:
        """Chooses Triton: without explicit parameters Pallas takes Mosaic GPU."""
        return pltriton.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def covered(shape: tuple[int, int], step: tuple[int, int]) -> pl.BlockSpec:
    """The whole of a 2-D array as one block, made up to whole steps along both axes.

    Kernels walk it themselves. What lies behind the edges is never read nor written: `load` and
    `store` mask every axis on which the block is larger than the array.
    """
    block = tuple(-(-size // by) * by for size, by in zip(shape, step, strict=True))
    return pl.BlockSpec(block, lambda *_: (0, 0))


def load(ref, size: tuple[int, int], row, col, shape: tuple[int, int]):
    """The `shape` tile at (row, col) of a covered array of this size; 0 behind its edges."""
    mask = _mask(ref, size, row, col, shape)
    tile = ref.at[pl.ds(row, shape[0]), pl.ds(col, shape[1])]
    return pltriton.load(tile, mask=mask, other=None if mask is None else 0)


def load_column(ref, size: tuple[int, int], row, col, rows: int):
    """`rows` entries, from (row, col) downwards, of a covered array of this size; 0 behind."""
    mask = None
    if ref.shape[0] != size[0]:
        mask = row + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < size[0]
    col = np.int32(col) if isinstance(col, int) else col  # interpret mode asks for its shape
    column = ref.at[pl.ds(row, rows), col]
    return pltriton.load(column, mask=mask, other=None if mask is None else 0)


def store(ref, size: tuple[int, int], row, col, value) -> None:
    """Writes a tile at (row, col) of a covered array of this size, but not behind its edges."""
    tile = ref.at[pl.ds(row, value.shape[0]), pl.ds(col, value.shape[1])]
    pltriton.store(tile, value, mask=_mask(ref, size, row, col, value.shape))


def store_epilogue(total, size: tuple[int, int], row, col, refs, rows_per_gate, out_ref) -> None:
    """Writes `residual + gate * (total * x_scale + bias)`, computed in float32, then cast.

    Args:
        total: float32[bm, bn], the tile at (row, col), weight scales in it.
        size: (m, n) of the whole product; the refs are covered arrays.
        row: first row of the tile.
        col: first column of the tile.
        refs: has x_scale [m, 1], bias [1, n], gate [b, n], residual [m, n]; any may be None.
        rows_per_gate: rows of x that one row of the gate serves; whole tiles, or all rows.
        out_ref: float32 or bfloat16[m, n].
    """
    (m, n), (bm, bn) = size, total.shape
    y = total
    if refs.x_scale is not None:
        y = y * load(refs.x_scale, (m, 1), row, 0, (bm, 1))
    if refs.bias is not None:
        y = y + load(refs.bias, (1, n), 0, col, (1, bn))
    if refs.gate is not None:
        gate = load(refs.gate, (m // rows_per_gate, n), row // rows_per_gate, col, (1, bn))
        y = y * gate.astype(jnp.float32)
    if refs.residual is not None:
        y = y + load(refs.residual, size, row, col, (bm, bn)).astype(jnp.float32)
    store(out_ref, size, row, col, y.astype(out_ref.dtype))


def check(name: str, array: jax.Array, shape: tuple[int | None, ...], dtype=None) -> None:
    """Checks the dtype and the shape of an argument; None stands for any size.

    Raises:
        ValueError: with the argument's name, what was expected and what was found.
    """
    if dtype is not None and array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} must be {np.dtype(dtype)}, got {array.dtype}")
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
        raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")


def refuse_empty(*arrays: jax.Array) -> None:
    """A grid of no programs is not worth a kernel.

    Raises:
        NotImplementedError: an array has no elements.
    """
    for array in arrays:
        if array.size == 0:
            raise NotImplementedError(f"the kernels take no empty array, got shape {array.shape}")


def _mask(ref, size, row, col, shape):
    """bool[shape], or None where the array fills its block on both axes."""
    masks = [
        start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size[axis]
        for axis, start in enumerate((row, col))
        if ref.shape[axis] != size[axis]
    ]
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]
