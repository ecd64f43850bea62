"""The oracle's own proof: NumPy in float64, exact integers, and what must not be hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference

QUANTIZE = jax.jit(reference.quantize_rows, static_argnums=1)
TINY = np.finfo(np.float32).tiny


def oracle(x, bits):
    """Codes and scale of each row; every product and inverse in float64, rounded once."""
    qmax = 2 ** (bits - 1) - 1
    f32 = lambda value: np.asarray(value, np.float64).astype(np.float32).astype(float)  # noqa: E731
    peak = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    scale = f32(peak * f32(1 / qmax))
    scale[peak == 0] = 1
    codes = np.clip(np.rint(f32(x * f32(1 / scale))), -qmax, qmax)
    np.testing.assert_allclose(codes, x / np.where(peak == 0, 1, peak / qmax), atol=0.5 + 2e-5)
    return codes.astype(np.int8), scale.astype(np.float32)


@pytest.mark.parametrize("quantize", (reference.quantize_rows, QUANTIZE), ids=("eager", "jit"))
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_equal_the_oracle(bits, quantize):
    """Integers and scales equal: rows of sizes from 1e-30 to 1e30, and one that is zero."""
    x = np.random.default_rng(bits).standard_normal((3, 20, 65), np.float32)
    x *= np.logspace(-30, 30, 20, dtype=np.float32)[:, None]
    x[1, 7] = 0
    codes, scale = quantize(x, bits)
    expected_codes, expected_scale = oracle(x, bits)
    assert (codes.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (3, 20, 1))
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)
    qmax = 2 ** (bits - 1) - 1
    peaks = np.abs(np.asarray(codes, np.int32)).max(axis=-1)
    np.testing.assert_array_equal(peaks, qmax * x.any(axis=-1))  # full range, both ends symmetric


@settings(max_examples=50)
@given(
    row=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=6, max_size=6
    ),
    bits=st.integers(2, 8),
)
def test_any_row_is_met_to_half_a_step(row, bits):
    x = np.array([row], np.float32)
    codes, scale = (np.asarray(part, np.float64) for part in QUANTIZE(x, bits))
    # half a step, the roundings of scale and ratio, and what underflows (see the next test)
    bound = (0.5 + 2.0 ** (bits - 24)) * scale if np.abs(x).max() > 127 * TINY else 127 * TINY
    assert (np.abs(codes * scale - x) <= bound).all()


def test_ties_go_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -127]], np.float32)
    for factor in (1, 2.0**-20, 2.0**40):  # scale is a power of two: every ratio exact
        codes, scale = QUANTIZE(x * np.float32(factor), 8)
        assert scale.tolist() == [[factor]]
        assert codes.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, -127]]


def test_zero_rows_have_scale_one():
    codes, scale = QUANTIZE(np.array([[0.0, -0.0], [0.0, 1.0]], np.float32), 8)
    assert codes.tolist() == [[0, 0], [0, 127]]
    np.testing.assert_array_equal(scale, np.array([[1], [1 / 127]], np.float32))


@pytest.mark.parametrize("bits", (2, 8))
def test_denormal_rows_stay_finite_and_tiny(bits):
    """Whether or not the machine flushes denormals, such a row is off by less than 127 of them."""
    peaks = [1e-45, 1e-42, TINY / 2, TINY, 3 * TINY, 100 * TINY, 126 * TINY]
    x = np.array([[p, -p / 3, 0] for p in peaks], np.float32)
    codes, scale = (np.asarray(part, np.float64) for part in QUANTIZE(x, bits))
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert (np.abs(codes * scale - x) <= 127 * TINY).all()


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("width", (8, 3072))  # XLA:CPU's max drops NaN on rows of 2048 and more
def test_bad_numbers_spoil_their_row_and_no_other(bad, width):
    """The scale is non-finite, so 0 * scale is NaN: no product of that row can look sane."""
    x = np.random.default_rng(0).standard_normal((3, width), np.float32)
    clean_codes, clean_scale = QUANTIZE(x, 8)
    x[1, 3] = bad
    codes, scale = QUANTIZE(x, 8)
    assert np.isfinite(scale[:, 0]).tolist() == [True, False, True]
    assert not np.isfinite(jnp.asarray(codes[1], jnp.float32) * scale[1]).any()
    np.testing.assert_array_equal(codes[::2], clean_codes[::2])
    np.testing.assert_array_equal(scale[::2], clean_scale[::2])


@pytest.mark.parametrize("bits", (1, 9, 0, -8))
def test_bits_out_of_range_raise(bits):
    with pytest.raises(ValueError, match=f"activation bits {bits} outside 2..8"):
        reference.quantize_rows(np.ones((1, 2), np.float32), bits)


def test_bfloat16_rows_are_quantised_in_float32():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 33)), jnp.bfloat16)
    codes, scale = QUANTIZE(x, 8)
    expected_codes, expected_scale = oracle(np.asarray(x, np.float32), 8)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)


def integers(*shape, low=-128, high=127, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape, np.int8, endpoint=True)


def exact(x, w):
    return x.astype(np.int64) @ w.astype(np.int64).T


@pytest.mark.parametrize(
    "matmul", (reference.matmul_int32, reference.matmul_bf16, reference.matmul_codes)
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 7, 300), (5, 3, 129), (16, 32, 1000)])
def test_integer_products_are_exact(matmul, m, n, k):
    """1000 * 128 * 128 < 2^24: every partial sum is exact in float32, in any order."""
    x, w = integers(m, k, low=-127), integers(n, k, seed=1)
    w[0], x[0] = -128, 127  # the largest sum there is
    out = jax.jit(matmul)(x, w)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out, np.int64), exact(x, w))


def test_int32_products_stay_exact_above_2_to_24():
    """Sums of 2^26 that float32 can hold only because they are multiples of 8."""
    x, w = np.full((1, 4096), 127, np.int8), np.full((1, 4096), 127, np.int8)
    w[0, 0], x[0, 0] = 1, 121  # an odd number of units on the way
    total = int(exact(x, w)[0, 0])
    assert total > 2**24
    out = reference.matmul_int32(x, w)
    assert float(out[0, 0]) == float(np.float32(total))
    wide = float(reference.matmul_bf16(x, w)[0, 0])
    assert abs(wide - total) <= 4096 * 2.0**-24 * total  # rounded, but to float32's precision


@pytest.mark.parametrize(("k", "group"), [(256, 64), (300, 128), (7, 3), (5, 8)])
def test_grouped_products_apply_each_scale_to_its_own_inputs(k, group):
    """Scales are powers of two: equality, whatever the order of the groups. Tails included."""
    groups = -(-k // group)
    x, w = integers(4, k, low=-127), integers(6, k, seed=1)
    scale = 2.0 ** np.random.default_rng(2).integers(-3, 4, (6, groups)).astype(np.float32)
    expected = np.zeros((4, 6))
    for i in range(k):
        expected += np.outer(x[:, i].astype(float), w[:, i] * scale[:, i // group])
    out = jax.jit(reference.grouped_matmul_codes, static_argnums=3)(x, w, scale, group)
    np.testing.assert_array_equal(out, expected)
