"""Byte layouts of narrow codes: pack and unpack along the last axis (the contraction axis k).

All codes here are unsigned; what offset turns them into signed numbers is a matter of the format
that stores them. Two families:

* ``pack``/``unpack``: the layout the kernels read. Codes are strided inside blocks of 128 along
  k, so unpacking is a few shifts and one concatenation of contiguous runs, never an interleave.
  2 bits: byte r of a 32-byte block holds k = r, r + 32, r + 64, r + 96 in bits 0, 2, 4, 6 (the
  arrangement of bitnet.cpp's I2_S, but from the low end). 4 bits: byte r of a 64-byte block holds
  k = r (low nibble) and r + 64 (high nibble). 6 bits: a 96-byte block is the 64-byte 4-bit plane
  of the low nibbles, then the 32-byte 2-bit plane of the high two bits. 8 bits: the codes.
* ``pack_trits``/``unpack_trits``: five base-3 digits per byte, consecutive in k, for archives.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

BLOCK = 128
"""Codes along k that are packed together; a shorter tail is padded to a whole block."""

BITS = (2, 4, 6, 8)
"""Widths that ``pack`` knows."""

TRITS_PER_BYTE = 5  # 3**5 = 243 <= 256


def packed_size(k: int, bits: int) -> int:
    """Bytes that ``pack`` writes for one row of k codes: whole blocks, except at 8 bits.

    Raises:
        ValueError: bits is not 2, 4, 6 or 8, or k is negative.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    return k if bits == 8 else -(-k // BLOCK) * BLOCK * bits // 8


def pack(codes: UInt8[Array, "*lead k"], bits: int, *, pad: int = 0) -> UInt8[Array, "*lead p"]:
    """Packs codes into p = packed_size(k, bits) bytes per row.

    Args:
        codes: uint8[..., k], each below 2**bits. Higher bits of a code are dropped, so that a bad
            code cannot spill into its neighbours.
        bits: 2, 4, 6 or 8.
        pad: the code written behind the last one, up to a whole block.

    Returns:
        uint8[..., p], laid out as the module's docstring says.

    Raises:
        ValueError: codes is not uint8, bits is unknown, or pad does not fit in bits.
    """
    _check_uint8("codes", codes)
    k = codes.shape[-1]
    packed_size(k, bits)
    if not 0 <= pad < 2**bits:
        raise ValueError(f"pad must be in [0, {2**bits - 1}] at {bits} bits, got {pad}")
    if bits == 8:
        return jnp.asarray(codes)
    blocks = _split_blocks(_pad_tail(codes, -k % BLOCK, pad), BLOCK)
    if bits == 6:
        planes = [_pack_plane(blocks & 15, 4), _pack_plane(blocks >> 4, 2)]
        return _merge_blocks(jnp.concatenate(planes, axis=-1))
    return _merge_blocks(_pack_plane(blocks, bits))


def unpack(packed: UInt8[Array, "*lead p"], bits: int, k: int) -> UInt8[Array, "*lead k"]:
    """The k codes per row that ``pack`` was given: shifts, masks and one concatenation.

    Args:
        packed: uint8[..., p] with p = packed_size(k, bits).
        bits: 2, 4, 6 or 8.
        k: codes per row; the padding behind them is cut off.

    Raises:
        ValueError: packed is not uint8, or its last axis is not packed_size(k, bits).
    """
    _check_uint8("packed", packed)
    size = packed_size(k, bits)
    if packed.shape[-1] != size:
        raise ValueError(f"{k} codes of {bits} bits take {size} bytes, got {packed.shape[-1]}")
    if bits == 8:
        return jnp.asarray(packed)
    blocks = _split_blocks(packed, BLOCK * bits // 8)
    if bits == 6:
        low, high = blocks[..., : BLOCK // 2], blocks[..., BLOCK // 2 :]
        codes = _unpack_plane(low, 4) | (_unpack_plane(high, 2) << 4)
    else:
        codes = _unpack_plane(blocks, bits)
    return _merge_blocks(codes)[..., :k]


def packed_trits_size(k: int) -> int:
    """Bytes that ``pack_trits`` writes for one row of k trits: ceil(k / 5).

    Raises:
        ValueError: k is negative.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    return -(-k // TRITS_PER_BYTE)


def pack_trits(codes: UInt8[Array, "*lead k"], *, pad: int = 0) -> UInt8[Array, "*lead p"]:
    """Packs codes 0, 1, 2 five to a byte (1.6 bits each), p = ceil(k / 5), for archives.

    Byte j holds k = 5j .. 5j + 4, the first as the most significant base-3 digit of q in
    [0, 242]. It stores the fixed-point fraction ceil(q * 256 / 243), not q itself: reading a
    digit then takes one multiplication by a constant and a shift, where plain base 3 needs a
    division. Same bytes as one run of five in ggml's TQ1_0, though TQ1_0 strides its digits.

    Args:
        codes: uint8[..., k], each 0, 1 or 2. Other values give bytes that do not read back.
        pad: the code written behind the last one, up to a whole byte.

    Raises:
        ValueError: codes is not uint8, or pad is not 0, 1 or 2.
    """
    _check_uint8("codes", codes)
    if not 0 <= pad <= 2:
        raise ValueError(f"pad must be in [0, 2], got {pad}")
    fives = _split_blocks(_pad_tail(codes, -codes.shape[-1] % TRITS_PER_BYTE, pad), TRITS_PER_BYTE)
    powers = np.array([81, 27, 9, 3, 1], np.uint16)
    q = (fives.astype(jnp.uint16) * powers).sum(axis=-1, dtype=jnp.uint16)
    return ((q * 256 + 242) // 243).astype(jnp.uint8)  # at most 242 * 256 + 242 < 2**16


def unpack_trits(packed: UInt8[Array, "*lead p"], k: int) -> UInt8[Array, "*lead k"]:
    """The k codes per row that ``pack_trits`` was given.

    Args:
        packed: uint8[..., p] with p = ceil(k / 5).
        k: codes per row; the padding behind them is cut off.

    Raises:
        ValueError: packed is not uint8, or its last axis is not ceil(k / 5).
    """
    _check_uint8("packed", packed)
    size = packed_trits_size(k)
    if packed.shape[-1] != size:
        raise ValueError(f"{k} trits take {size} bytes, got {packed.shape[-1]}")
    powers = np.array([1, 3, 9, 27, 81], np.uint16)
    # byte / 256 is a fraction in base 3: times 3**i, less its whole part, it starts with digit i
    fraction = (jnp.asarray(packed)[..., None].astype(jnp.uint16) * powers) & 255
    return _merge_blocks(((fraction * 3) >> 8).astype(jnp.uint8))[..., :k]


def _check_uint8(name: str, array: Array) -> None:
    if array.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, got {array.dtype}")


def _pad_tail(codes: Array, length: int, pad: int) -> Array:
    widths = [(0, 0)] * (codes.ndim - 1) + [(0, length)]
    return jnp.pad(codes, widths, constant_values=pad)


def _split_blocks(array: Array, size: int) -> Array:
    return array.reshape(*array.shape[:-1], array.shape[-1] // size, size)


def _merge_blocks(blocks: Array) -> Array:
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def _pack_plane(blocks: Array, bits: int) -> Array:
    """[..., 128] codes to [..., 16 * bits] bytes: the i-th run of codes goes to bits i * bits."""
    runs = jnp.split(blocks & (2**bits - 1), 8 // bits, axis=-1)
    out = runs[0]
    for i, run in enumerate(runs[1:], start=1):
        out = out | (run << (i * bits))
    return out


def _unpack_plane(plane: Array, bits: int) -> Array:
    """[..., 16 * bits] bytes to [..., 128] codes; the inverse of _pack_plane."""
    runs = [(plane >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return jnp.concatenate(runs, axis=-1)
