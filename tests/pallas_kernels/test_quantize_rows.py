"""The kernel in interpret mode: equal to NumPy and to the reference, code for code, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.quantize_rows import quantize_rows

TINY = np.finfo(np.float32).tiny
REFERENCE = jax.jit(reference.quantize_rows, static_argnums=1)


def kernel(x, bits=8, **options):
    return quantize_rows(jnp.asarray(x), bits, interpret=True, **options)


def oracle(x, bits=8):
    """Codes and scale of each row, by NumPy's IEEE float32."""
    qmax = 2 ** (bits - 1) - 1
    x = np.asarray(x).astype(np.float32)
    scale = np.abs(x).max(axis=1, keepdims=True) * np.float32(1 / qmax)
    scale[scale < TINY] = 1
    codes = np.clip(np.rint(x * (np.float32(1) / scale)), -qmax, qmax)
    return codes.astype(np.int8), scale


def rows(m, k, seed=0):
    """Normal rows of sizes from 1e-20 to 1e20."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k), np.float32)
    return x * np.float32(10) ** rng.integers(-20, 21, (m, 1)).astype(np.float32)


def assert_equal(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("k", (64, 129, 1152))
@pytest.mark.parametrize("m", (1, 3, 130))
def test_equals_numpy_and_reference(m, k):
    x = rows(m, k, seed=m + k)
    found = kernel(x)
    assert_equal(found, oracle(x))
    assert_equal(found, REFERENCE(x, 8))


@pytest.mark.parametrize(("m", "k", "block_k"), [(3, 129, 64), (130, 1152, 256), (2, 20001, None)])
def test_two_passes_over_a_row_that_does_not_fit(m, k, block_k):
    x = rows(m, k)
    assert_equal(kernel(x, block_k=block_k), oracle(x))


@pytest.mark.parametrize("bits", (2, 4, 6))
def test_fewer_bits(bits):
    x = rows(5, 100)
    assert_equal(kernel(x, bits), oracle(x, bits))


def test_bfloat16():
    x = jnp.asarray(rows(5, 300), jnp.bfloat16)
    found = kernel(x)
    assert_equal(found, oracle(x))
    assert_equal(found, REFERENCE(x, 8))


def test_ties_go_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], np.float32)
    codes, scale = kernel(x)
    assert scale == 1
    np.testing.assert_array_equal(codes, [[127, 0, 2, 2, 0, -2, -126]])


def test_zero_and_denormal_rows_have_scale_one():
    x = rows(4, 70)
    x[1], x[3] = 0, TINY * 100  # max|x| / 127 is denormal
    codes, scale = kernel(x)
    assert_equal((codes, scale), oracle(x))
    assert scale[1] == scale[3] == 1 and not codes[1].any() and not codes[3].any()


@pytest.mark.parametrize("block_k", (None, 64), ids=("one pass", "two passes"))
@pytest.mark.parametrize("column", (0, 149))
def test_nan_and_inf_make_the_scale_non_finite(column, block_k):
    x = rows(4, 150)
    x[0, column], x[1, column], x[2, column] = np.nan, np.inf, -np.inf
    found = kernel(x, block_k=block_k)
    assert_equal(found, REFERENCE(x, 8))
    assert np.isnan(found[1][0, 0]) and np.isinf(found[1][1:3]).all()
    assert_equal([part[3:] for part in found], oracle(x[3:]))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((2, 4), np.int32), {}, "bfloat16 or float32, got int32"),
        (np.zeros(4, np.float32), {}, r"shape \(any, any\), got \(4,\)"),
        (np.zeros((2, 4), np.float32), {"bits": 9}, "bits 9"),
        (np.zeros((2, 4), np.float32), {"block_k": 48}, "power of two, got 48"),
    ],
)
def test_wrong_arguments(x, options, message):
    with pytest.raises(ValueError, match=message):
        kernel(x, **options)


def test_an_empty_array_is_refused():
    with pytest.raises(NotImplementedError, match=r"\(0, 4\)"):
        kernel(np.zeros((0, 4), np.float32))


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("k", (1152, 3072, 12288, 15360, 40000))
def test_lowers_for_cuda(lower_for_cuda, k, dtype):
    for m in (1, 256, 4608):
        lower_for_cuda(quantize_rows, jax.ShapeDtypeStruct((m, k), dtype))
