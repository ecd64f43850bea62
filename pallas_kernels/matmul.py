"""Activations x packed weight codes, unpacked in registers, as one Pallas-Triton kernel.

    y = residual + gate * (x_scale * sum_g scale_g * (x_g . (stored_g - offset - zero_g)) + bias)

Integer activations are summed in int32 on the integer tensor cores, bfloat16 ones in float32. What
is taken off a stored code (the format's offset and the zero point) is never taken off per weight,
but once per row and group: x . (c - z) = x . c - z sum(x).

It has run in interpret mode and its machine code has been audited; it has never run on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import reference, tiles, unpack
from pallas_kernels.formats import FORMATS
from pallas_kernels.matmul_plan import Spec, choose_tile, gate_fits
from pallas_kernels.operands import Operands
from pallas_kernels.tiles import Tile

# An int32 sum of a part that starts from the bits of the float 1.5 * 2^23 is, bit for bit, that
# float plus the sum, as long as it stays below 2^22: a subtraction replaces a conversion, which
# would take a slot of the integer pipe. Parts of at most 128 inputs do: 128 * 128 * 255 < 2^22.
MAGIC = 1.5 * 2**23
MAGIC_BITS = 0x4B400000
_ROW_BY_ROW = (((1,), (1,)), ((), ()))  # contract k, the last axis of both


class _Refs(NamedTuple):
    """The operands of a program; None where the product has no such operand."""

    x: Array
    w: Array
    scale: Array  # float32[n, g]
    sums: Array | None = None  # [m, p], int32 or float32: of x over every part, see `Spec`
    zero: Array | None = None  # int8[n, g]
    x_scale: Array | None = None  # float32[m, 1]
    bias: Array | None = None  # float32[1, n]
    gate: Array | None = None  # [b, n]
    residual: Array | None = None  # [m, n]


@functools.partial(jax.jit, static_argnames=("out_dtype", "tile", "interpret"))
def matmul(
    operands: Operands, *, out_dtype=jnp.float32, tile: Tile | None = None, interpret: bool = False
) -> Float[Array, "m n"]:
    """The scaled product of `operands`, in `out_dtype`.

    Args:
        operands: checked and brought into order, see `operands.prepare`.
        out_dtype: float32 or bfloat16.
        tile: None: from `tile_table`. Its k is 128, one block of the packing, for packed weights.
        interpret: run the kernel's body as plain JAX, on any platform.

    Raises:
        NotImplementedError: an operand is empty, float32 activations, groups that cut a run of the
            packing.
    """
    x, w = operands.x, operands.w
    tiles.refuse_empty(x, w)
    if x.dtype not in (jnp.int8, jnp.bfloat16):
        raise NotImplementedError(f"the kernel takes int8 codes and bfloat16, not {x.dtype}")
    tile = tile or choose_tile(operands)
    if not gate_fits(operands, tile):
        bare = dataclasses.replace(operands, gate=None, residual=None)
        y = matmul(bare, tile=tile, interpret=interpret)
        return reference.epilogue(y, None, operands.gate, operands.residual, out_dtype)
    spec = Spec.of(operands, tile, interpret)
    m, n = spec.m, spec.n
    refs = _Refs(
        x=x,
        w=w,
        scale=_for_rows(operands.scale, n),
        sums=_sums(operands, spec),
        zero=None if operands.zero is None else _for_rows(operands.zero, n),
        x_scale=operands.x_scale,
        bias=None if operands.bias is None else operands.bias.astype(jnp.float32)[None],
        gate=operands.gate,
        residual=operands.residual,
    )
    step = {"x": (tile.m, tile.k), "w": (tile.n, spec.step_bytes), "residual": (tile.m, tile.n)}
    step |= dict.fromkeys(("x_scale", "sums"), (tile.m, 1))
    step |= dict.fromkeys(("scale", "zero"), (tile.n, 1))
    step |= dict.fromkeys(("bias", "gate"), (1, tile.n))
    present = {name: ref for name, ref in refs._asdict().items() if ref is not None}
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, names=tuple(present)),
        # m runs fastest: neighbouring programs share a block of weights
        grid=(pl.cdiv(m, tile.m), pl.cdiv(n, tile.n)),
        in_specs=[tiles.covered(ref.shape, step[name]) for name, ref in present.items()],
        out_specs=tiles.covered((m, n), (tile.m, tile.n)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        compiler_params=tile.compiler_params(),
        interpret=interpret,
        name=f"{operands.format}_matmul",
    )(*present.values())


def _for_rows(values: Array, n: int) -> Array:
    """Scales or zero points as stored, [n, g]; one for all rows is written out."""
    return jnp.broadcast_to(values, (n, values.shape[1]))


def _sums(operands: Operands, spec: Spec) -> Array | None:
    """Sums of x over every part, 0 for parts behind k; None where nothing is taken off a code."""
    if not spec.base and operands.zero is None:
        return None
    sums = operands.sums_of(spec.part or spec.k)
    if spec.part is None:
        return sums
    parts = pl.cdiv(spec.k, spec.tile.k) * (spec.tile.k // spec.part)
    return jnp.pad(sums, ((0, 0), (0, parts - sums.shape[1])))


def _kernel(*args, spec: Spec, names: tuple[str, ...]):
    out_ref = args[-1]
    refs = _Refs(**dict(zip(names, args[:-1], strict=True)))
    tile = spec.tile
    row, col = pl.program_id(0) * tile.m, pl.program_id(1) * tile.n
    integer = refs.x.dtype == jnp.int8
    start = functools.partial(_start, refs, spec, row, col, integer)

    def step(i, total):
        """One block of k: `total` is the running sum, of scaled parts where there are parts."""
        part = total if spec.part is None else None
        for first, stop, codes in _runs(refs.w, spec, col, i, integer):
            at = i * tile.k + first
            if part is None:
                part = start(at // spec.part)
            x = tiles.load(refs.x, (spec.m, spec.k), row, at, (tile.m, stop - first))
            part += jax.lax.dot_general(x, codes, _ROW_BY_ROW, preferred_element_type=part.dtype)
            if spec.part is not None and stop % spec.part == 0:
                total += _scaled(part, refs, spec, col, at // spec.part)
                part = None
        return part if spec.part is None else total

    total = jnp.zeros((tile.m, tile.n), jnp.float32) if spec.part else start(0)
    total = jax.lax.fori_loop(0, pl.cdiv(spec.k, tile.k), step, total)
    if spec.part is None:
        total = _scaled(total, refs, spec, col, 0)
    tiles.store_epilogue(total, (spec.m, spec.n), row, col, refs, spec.rows_per_gate, out_ref)


def _start(refs: _Refs, spec: Spec, row, col, integer: bool, index):
    """What the sum of a part starts from: minus what its codes are too large by, times sum(x)."""
    bm, bn = spec.tile.m, spec.tile.n
    magic = MAGIC_BITS if integer and spec.part is not None else 0
    if refs.sums is None:
        return jnp.full((bm, bn), magic, jnp.int32 if integer else jnp.float32)
    sums = tiles.load(refs.sums, (spec.m, refs.sums.shape[1]), row, index, (bm, 1))
    shift = spec.base
    if refs.zero is not None:
        shift += _column(refs.zero, spec, col, index).astype(sums.dtype)
    return jnp.broadcast_to(magic - sums * shift, (bm, bn))


def _scaled(part, refs: _Refs, spec: Spec, col, index):
    """The sum of a part times its scale, float32[bm, bn]."""
    if part.dtype == jnp.int32 and spec.part is not None:
        part = jax.lax.bitcast_convert_type(part, jnp.float32) - MAGIC
    return part.astype(jnp.float32) * _column(refs.scale, spec, col, index)


def _column(ref, spec: Spec, col, index):
    """[1, bn]: the entries of [n, g] for the group that part `index` lies in."""
    groups = ref.shape[1]
    if spec.part is not None:  # a part behind k has no group; its sums are 0
        index = jnp.minimum(index * spec.part // spec.group, groups - 1)
    return tiles.load_column(ref, (spec.n, groups), col, index, spec.tile.n)[None]


def _runs(w_ref, spec: Spec, col, i, integer: bool) -> Iterator[tuple[int, int, Array]]:
    """(first, last + 1, codes[bn, run]) of the contiguous runs of k in step i of the weights."""
    first, stored = i * spec.step_bytes, (spec.n, FORMATS[spec.format].stored_size(spec.k))

    def read(start, width):
        return tiles.load(w_ref, stored, col, first + start, (spec.tile.n, width))

    if spec.format == "int8":
        codes = read(0, spec.tile.k)
        yield 0, spec.tile.k, codes if integer else codes.astype(jnp.bfloat16)
        return
    run = unpack.RUN[spec.format]
    for index, codes in enumerate(unpack.planes(spec.format, read, integer, spec.interpret)):
        yield index * run, (index + 1) * run, codes
