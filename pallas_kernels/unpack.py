"""Stored codes to tensor-core operands, four codes of a packed operand at a time.

Left to itself the compiler unpacks bytes one by one at most tile shapes (six times the integer
instructions, measured in machine code), so a 32-bit register of four packed bytes is shifted and
masked as a whole, in a line or two of PTX. Interpret mode, which knows no assembly, takes the same
from jnp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.formats import FORMATS
from pallas_kernels.ptx import ptx

RUN = {"int6": 32, "int4": 64, "ternary": 32}
"""Contiguous k in one plane of a packed block of 128 (`packing`); nothing is interleaved."""

Read = Callable[[int, int], jax.Array]
"""read(first byte, bytes): part of one block of the packed weights, uint8[bn, bytes]."""


def base(format: str, integer: bool) -> int:
    """What a code is too large by as `planes` gives it, a zero point apart.

    Stored codes are unsigned. For bfloat16 a code c of b bits becomes the number 2^b + c: its bits
    are placed in the mantissa of 2^b, with no conversion.
    """
    spec = FORMATS[format]
    return spec.offset + (0 if integer or not spec.offset else 2**spec.bits)


def planes(format: str, read: Read, integer: bool, interpret: bool) -> Iterator[jax.Array]:
    """The runs of a block of 128 codes in the order of k, int8 or bfloat16[bn, RUN[format]]."""
    bits = FORMATS[format].bits
    if format == "int6":
        low, high = (read(0, 32), read(32, 32)), read(64, 32)
        for plane in range(4):
            args = low[plane % 2], high
            yield _place(
                args, ((4 * (plane // 2), 15, 0), (2 * plane, 3, 4)), 6, integer, interpret
            )
        return
    packed = read(0, 128 * bits // 8)
    for plane in range(8 // bits):
        yield _place((packed,), ((bits * plane, 2**bits - 1, 0),), bits, integer, interpret)


def _place(args, fields, bits: int, integer: bool, interpret: bool) -> jax.Array:
    """Fields of packed bytes put together to codes, as int8 or as the bfloat16 2^bits + code.

    Args:
        args: packed uint8[bn, run], one per field.
        fields: (lowest bit in the byte, mask, lowest bit in the code).
        bits: of a code.
    """
    one = 0x3F80 + (bits << 7)  # the bfloat16 2^bits; its last mantissa bit counts 2^(bits - 7)
    if interpret:
        code = jnp.zeros(args[0].shape, jnp.uint8)
        for packed, (at, mask, to) in zip(args, fields, strict=True):
            code |= ((packed >> at) & mask) << to
        if integer:
            return code.astype(jnp.int8)
        pattern = (code.astype(jnp.uint16) << (7 - bits)) | jnp.uint16(one)
        return jax.lax.bitcast_convert_type(pattern, jnp.bfloat16)
    outputs = 1 if integer else 2
    lines = []
    for index, (at, mask, to) in enumerate(fields):
        source = f"${outputs + index}"
        lines.append(f"shr.b32 t, {source}, {at};" if at else f"mov.b32 t, {source};")
        lines.append(f"and.b32 t, t, {mask * 0x01010101};")
        if to:
            lines.append(f"shl.b32 t, t, {to};")
        lines.append("or.b32 c, c, t;" if index else "mov.b32 c, t;")
    if integer:
        lines.append("mov.b32 $0, c;")
    else:
        for output, select in enumerate(("0x4140", "0x4342")):  # two bytes to two halves of a word
            lines.append(f"prmt.b32 t, c, 0, {select};")
            lines.append(f"shl.b32 t, t, {7 - bits};")
            lines.append(f"or.b32 ${output}, t, {one * 0x00010001};")
    return ptx(
        "{ .reg .b32 c, t; " + " ".join(lines) + " }",
        ",".join(["=r"] * outputs + ["r"] * len(args)),
        *args,
        dtype=jnp.int8 if integer else jnp.bfloat16,
        pack=4,
    )
