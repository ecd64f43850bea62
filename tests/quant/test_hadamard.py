"""Hadamard rotations against dense matrices in float64, for every width the networks have."""

import hashlib

import jax
import numpy as np
import pytest

from lowbit_jax.quant import hadamard
from pallas_kernels import reference_rows

# DiT, PixArt, STDiT; FLUX; Wan; HunyuanDiT, SD3.5; our small models
WIDTHS = (1152, 4608, 3072, 12288, 15360, 1536, 8960, 5120, 13824, 1408, 2432, 192, 256, 384, 24)
ROTATE = jax.jit(hadamard.rotate, static_argnames=("size", "inverse"))


def dense(size):
    """The matrix as a Kronecker product, float64."""
    matrix = np.ones((1, 1))
    for part in hadamard.factors(size):
        matrix = np.kron(matrix, hadamard.hadamard(part).astype(float))
    return matrix / size**0.5


def rows(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


PALEY = [
    size for size in range(4, hadamard.LARGEST_PALEY + 1, 4) if hadamard._paley(size) is not None
]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, *PALEY])
def test_factors_are_hadamard_matrices(size):
    """Entries +-1 and H H^T = n I, in integers."""
    matrix = hadamard.hadamard(size).astype(int)
    assert (np.abs(matrix) == 1).all()
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size, dtype=int))


def test_the_paley_sizes_that_are_needed_are_there():
    assert {12, 20, 24, 28, 36, 44, 60, 76, 84, 108, 140} <= set(PALEY)
    with pytest.raises(ValueError, match="no Hadamard matrix of size 92"):
        hadamard.hadamard(92)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_factor(width):
    parts = hadamard.factors(width)
    assert np.prod(parts) == width
    assert sum(parts) <= 100
    assert set(parts) <= {2, 4, 8, 16, *PALEY}


@pytest.mark.parametrize("size", [2, 12, 24, 64, 128, 256, 192, 240, 1152])
@pytest.mark.parametrize("blocks", [1, 3])
def test_rotate_equals_the_dense_product(size, blocks):
    """float32 products of as many terms as a factor has: 1e-6 of the row's length."""
    x = rows(2, 3, blocks * size)
    matrix = np.kron(np.eye(blocks), dense(size))
    for inverse in (False, True):
        expected = x.astype(float) @ (matrix.T if inverse else matrix)
        np.testing.assert_allclose(ROTATE(x, size=size, inverse=inverse), expected, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_inner_products_do_not_change(width):
    """What makes it exact: x R (w R)^T = x w^T, and R undone is the identity; float64 sums."""
    x, w = rows(3, width), rows(4, width, seed=1)
    turned = [np.asarray(ROTATE(a, size=width), float) for a in (x, w)]
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    assert (np.abs(turned[0] @ turned[1].T - x.astype(float) @ w.T) <= 1e-6 * size).all()
    np.testing.assert_allclose(
        ROTATE(ROTATE(x, size=width), size=width, inverse=True), x, atol=1e-5
    )


@pytest.mark.parametrize("size", reference_rows.ROTATIONS)
def test_it_is_the_rotation_of_the_kernels(size):
    x = rows(5, 768)
    np.testing.assert_allclose(ROTATE(x, size=size), reference_rows.rotate(x, size), atol=1e-5)


@pytest.mark.parametrize("width", [1152, 15360])
def test_an_outlier_is_spread_over_the_whole_row(width):
    x = np.zeros((1, width), np.float32)
    x[0, 7] = 1
    np.testing.assert_allclose(np.abs(ROTATE(x, size=width)), width**-0.5, rtol=1e-5)


def test_block_sizes():
    size = hadamard.rotation_size
    assert [size(k, "auto", "a") for k in (1152, 3072, 320, 192, 384, 96, 24)] == [
        128, 256, 64, 64, 128, 96, 24,
    ]  # fmt: skip
    assert size(1152, "full", "a") == 1152
    assert size(1152, 384, "a") == 384
    with pytest.raises(
        ValueError, match="blocks/0/qkv: rotation 'full' of 1000 .* 40, 20, 8, 4, 2"
    ):
        size(1000, "full", "blocks/0/qkv")
    with pytest.raises(
        ValueError, match="rotation 256 of 1152 channels: block sizes .* are 1152, "
    ):
        size(1152, 256, "a")
    with pytest.raises(
        ValueError, match="rotation 'auto' of 15 channels: no block size divides it"
    ):
        size(15, "auto", "a")
    with pytest.raises(ValueError, match="no rotation of size 5 for rows of 10"):
        hadamard.rotate(rows(1, 10), 5)


def test_signs_are_bits_of_shake_256():
    """Of seed and path and of nothing else: fixed for ever, as checkpoints name the seed only."""
    found = hadamard.signs(3, "blocks/0/attn/qkv", 19)
    number = int.from_bytes(hashlib.shake_256(b"3:blocks/0/attn/qkv").digest(3), "big")
    expected = [1 - 2 * (number >> (23 - i) & 1) for i in range(19)]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    many = hadamard.signs(0, "a", 4096)
    assert abs(many.mean()) < 0.1
    assert (many != hadamard.signs(1, "a", 4096)).any()
    assert (many != hadamard.signs(0, "b", 4096)).any()
