"""The formats of weight codes: how many bits a code takes and what number it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int8

from pallas_kernels import packing


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one code is stored.

    Attributes:
        bits: bits a code takes in memory (int6 takes 6, not 8; a tail block of k is padded to 128).
        offset: a stored (unsigned) code is the signed code plus this; 0 means stored signed.
        low: smallest signed code.
        high: largest signed code.
    """

    bits: int
    offset: int
    low: int
    high: int

    @property
    def dtype(self):
        """Of the stored array: int8 where codes are stored signed, packed uint8 elsewhere."""
        return jnp.uint8 if self.offset else jnp.int8

    def stored_size(self, k: int) -> int:
        """Bytes of one row of k codes."""
        return packing.packed_size(k, self.bits)


FORMATS = {
    "int8": Format(bits=8, offset=0, low=-128, high=127),
    "int6": Format(bits=6, offset=32, low=-32, high=31),
    "int4": Format(bits=4, offset=8, low=-8, high=7),
    "ternary": Format(bits=2, offset=1, low=-1, high=1),
}


def pack_codes(codes: Int8[Array, "... n k"], format: str) -> Array:
    """Signed codes to the storage of `format`; the padding of a tail block stands for zero."""
    spec = FORMATS[format]
    if not spec.offset:
        return codes
    return packing.pack((codes + spec.offset).astype(jnp.uint8), spec.bits, pad=spec.offset)


def unpack_codes(stored: Array, format: str, k: int) -> Int8[Array, "... n k"]:
    """Inverse of `pack_codes`."""
    spec = FORMATS[format]
    if not spec.offset:
        return stored
    return packing.unpack(stored, spec.bits, k).astype(jnp.int8) - jnp.int8(spec.offset)
