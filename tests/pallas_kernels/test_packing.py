"""Packing: round trips and byte layouts against a slow oracle that spells them out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import packing

PACK = jax.jit(packing.pack, static_argnames=("bits", "pad"))
UNPACK = jax.jit(packing.unpack, static_argnames=("bits", "k"))
PACK_TRITS = jax.jit(packing.pack_trits, static_argnames="pad")
UNPACK_TRITS = jax.jit(packing.unpack_trits, static_argnames="k")

WIDTHS = st.sampled_from(packing.BITS)
LEADS = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,)])


def random_codes(shape, levels, seed=0):
    return np.random.default_rng(seed).integers(0, levels, shape, dtype=np.uint8)


def oracle_pack(row, bits, pad=0):
    """One row of codes to bytes, written from the layout's description, code by code."""
    if bits == 8:
        return list(row)
    out = []
    for start in range(0, len(row), 128):
        block = [int(c) for c in row[start : start + 128]]
        block += [pad] * (128 - len(block))
        if bits in (4, 6):
            out += [(block[r] % 16) + 16 * (block[r + 64] % 16) for r in range(64)]
        if bits in (2, 6):
            part = [c // 16 for c in block] if bits == 6 else block
            out += [sum(part[r + 32 * i] * 4**i for i in range(4)) for r in range(32)]
    return out


def oracle_pack_trits(row, pad=0):
    out = []
    for start in range(0, len(row), 5):
        digits = [int(c) for c in row[start : start + 5]]
        digits += [pad] * (5 - len(digits))
        q = int("".join(map(str, digits)), 3)
        out.append(-(-q * 256 // 243))
    return out


@pytest.mark.parametrize("bits", packing.BITS)
def test_every_residue_of_k_matches_the_oracle(bits):
    lengths = [*range(1, 130), 255, 256, 300, 384, 1152]
    rows = [random_codes((k,), 2**bits, seed=k) for k in lengths]

    @jax.jit  # all lengths in one program: one compilation, not hundreds
    def there_and_back(rows):
        packed = [packing.pack(row, bits) for row in rows]
        return packed, [packing.unpack(p, bits, k) for p, k in zip(packed, lengths, strict=True)]

    for row, packed, back in zip(rows, *there_and_back(rows), strict=True):
        assert packed.shape == (packing.packed_size(len(row), bits),)
        assert packed.tolist() == oracle_pack(row, bits)
        np.testing.assert_array_equal(back, row)


@settings(max_examples=25)
@given(bits=WIDTHS, lead=LEADS, k=st.integers(1, 400), seed=st.integers(0, 2**32), data=st.data())
def test_leading_axes_and_padding_match_the_oracle(bits, lead, k, seed, data):
    pad = data.draw(st.integers(0, 2**bits - 1))
    codes = random_codes((*lead, k), 2**bits, seed)
    packed = np.asarray(PACK(codes, bits, pad=pad))
    rows = [oracle_pack(row, bits, pad) for row in codes.reshape(-1, k)]
    expected = np.array(rows, np.uint8).reshape(*lead, packing.packed_size(k, bits))
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(UNPACK(packed, bits, k), codes)


@settings(max_examples=25)
@given(bits=st.sampled_from((2, 4, 6)), size=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_bytes_unpack_and_pack_back(bits, size, seed):
    """The layout is a bijection on whole blocks: no byte pattern is unreachable or ambiguous."""
    packed = random_codes((2, packing.packed_size(128 * size, bits)), 256, seed)
    codes = UNPACK(packed, bits, 128 * size)
    np.testing.assert_array_equal(PACK(codes, bits), packed)


@settings(max_examples=25)
@given(lead=LEADS, k=st.integers(0, 60), pad=st.integers(0, 2), seed=st.integers(0, 2**32))
def test_trits_match_the_oracle(lead, k, pad, seed):
    codes = random_codes((*lead, k), 3, seed)
    packed = np.asarray(PACK_TRITS(codes, pad=pad))
    size = packing.packed_trits_size(k)
    rows = [oracle_pack_trits(row, pad) for row in codes.reshape(-1, k)] if k else []
    np.testing.assert_array_equal(packed, np.array(rows, np.uint8).reshape(*lead, size))
    np.testing.assert_array_equal(UNPACK_TRITS(packed, k), codes)


def test_every_byte_of_trits_reads_back():
    codes = np.stack(np.unravel_index(np.arange(243), (3,) * 5), axis=-1).astype(np.uint8)
    packed = packing.pack_trits(codes)
    assert len(set(np.asarray(packed).ravel().tolist())) == 243
    np.testing.assert_array_equal(packing.unpack_trits(packed, 5), codes)


@pytest.mark.parametrize(
    ("k", "bits", "size"),
    [(0, 2, 0), (1, 2, 32), (128, 2, 32), (129, 2, 64), (3072, 2, 768), (1152, 2, 288),
     (1, 4, 64), (3072, 4, 1536), (1, 6, 96), (3072, 6, 2304), (5, 8, 5), (3072, 8, 3072)],
)  # fmt: skip
def test_sizes(k, bits, size):
    assert packing.packed_size(k, bits) == size


@pytest.mark.parametrize(("k", "size"), [(0, 0), (1, 1), (5, 1), (6, 2), (3072, 615)])
def test_trit_sizes(k, size):
    assert packing.packed_trits_size(k) == size


def test_known_vectors():
    """Bytes written down by hand: a change of layout must fail here."""
    one_each = np.zeros(128, np.uint8)
    one_each[[0, 32, 64, 96]] = [1, 2, 3, 1]
    two = packing.pack(one_each, 2).tolist()
    assert two == [0b01_11_10_01] + [0] * 31
    nibbles = np.zeros(128, np.uint8)
    nibbles[[0, 64, 127]] = [0x5, 0xA, 0xC]
    assert packing.pack(nibbles, 4).tolist() == [0xA5] + [0] * 62 + [0xC0]
    six = np.zeros(128, np.uint8)
    six[[1, 33, 65, 97]] = [0b11_0001, 0b10_0010, 0b01_0011, 0b00_0100]
    expected = [0] * 96
    expected[1], expected[33], expected[64 + 1] = 0x31, 0x42, 0b00_01_10_11
    assert packing.pack(six, 6).tolist() == expected
    assert packing.pack(np.array([7, 255], np.uint8), 8).tolist() == [7, 255]
    assert packing.pack(np.array([2], np.uint8), 2, pad=1).tolist() == [0b01010110] + [85] * 31
    trits = np.array([2, 2, 2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], np.uint8)
    assert packing.pack_trits(trits).tolist() == [255, 86, 2, 0]  # ceil(242, 81, 1 * 256 / 243)


@pytest.mark.parametrize("bits", packing.BITS)
def test_transformations_agree(bits):
    codes = jnp.asarray(random_codes((2, 3, 200), 2**bits))
    pack = functools.partial(packing.pack, bits=bits)
    unpack = functools.partial(packing.unpack, bits=bits, k=200)
    packed = pack(codes)
    np.testing.assert_array_equal(jax.jit(pack)(codes), packed)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(pack))(codes), packed)
    np.testing.assert_array_equal(jax.jit(jax.vmap(unpack))(packed), codes)
    shape = jax.eval_shape(pack, codes)
    assert (shape.shape, shape.dtype) == ((2, 3, packing.packed_size(200, bits)), jnp.uint8)
    assert jax.eval_shape(unpack, shape).shape == codes.shape


def test_trit_transformations_agree():
    codes = jnp.asarray(random_codes((2, 3, 17), 3))
    unpack = functools.partial(packing.unpack_trits, k=17)
    packed = packing.pack_trits(codes)
    np.testing.assert_array_equal(jax.jit(packing.pack_trits)(codes), packed)
    np.testing.assert_array_equal(jax.vmap(packing.pack_trits)(codes), packed)
    np.testing.assert_array_equal(jax.jit(jax.vmap(unpack))(packed), codes)
    assert jax.eval_shape(unpack, jax.eval_shape(packing.pack_trits, codes)).shape == codes.shape


@pytest.mark.parametrize("bits", (2, 4, 6))
def test_unpack_lowers_without_gathers(bits):
    packed = jnp.zeros((2, packing.packed_size(300, bits)), jnp.uint8)
    text = jax.jit(lambda p: packing.unpack(p, bits, 300)).lower(packed).as_text()
    assert "gather" not in text
    assert "transpose" not in text


def test_a_code_too_large_stays_in_its_own_bits():
    codes = np.zeros(128, np.uint8)
    codes[0] = 0xFF
    for bits in (2, 4, 6):
        expected = np.zeros(128, np.uint8)
        expected[0] = 2**bits - 1
        back = packing.unpack(packing.pack(codes, bits), bits, 128)
        np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.packed_size(3, 5), "2, 4, 6, 8.*got 5"),
        (lambda: packing.packed_size(-1, 2), "at least 0, got -1"),
        (lambda: packing.packed_trits_size(-1), "at least 0, got -1"),
        (lambda: packing.pack(np.zeros(3, np.int8), 2), "uint8, got int8"),
        (lambda: packing.pack(np.zeros(3, np.uint8), 2, pad=4), r"\[0, 3\] at 2 bits, got 4"),
        (lambda: packing.unpack(np.zeros(3, np.uint8), 2, 7), "7 codes of 2 bits take 32.*got 3"),
        (lambda: packing.pack_trits(np.zeros(3, np.int32)), "uint8, got int32"),
        (lambda: packing.pack_trits(np.zeros(3, np.uint8), pad=3), r"\[0, 2\], got 3"),
        (lambda: packing.unpack_trits(np.zeros(3, np.uint8), 7), "7 trits take 2 bytes, got 3"),
    ],
)
def test_errors_carry_both_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
