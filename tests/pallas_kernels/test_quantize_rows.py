"""The kernel in interpret mode: plain rows equal NumPy and the reference bit for bit.

What goes through a float prologue or a rotation is held to NumPy's float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference_rows
from pallas_kernels.quantize_rows import (
    gelu_quantize_rows,
    modulate_quantize_rows,
    quantize_rows,
)
from tests.references import rows as exactly

TINY = np.finfo(np.float32).tiny
REFERENCE = jax.jit(reference_rows.quantize_rows, static_argnums=(1, 3))


def kernel(x, bits=8, mask=None, rotation=None, **options):
    return quantize_rows(jnp.asarray(x), bits, mask, rotation, interpret=True, **options)


def oracle(x, bits=8, mask=1):
    """Codes, scale and sum of each row, by NumPy's IEEE float32."""
    qmax = 2 ** (bits - 1) - 1
    x = np.asarray(x).astype(np.float32) * np.float32(mask)
    scale = np.abs(x).max(axis=1, keepdims=True) * np.float32(1 / qmax)
    scale[scale < TINY] = 1
    codes = np.clip(np.rint(x * (np.float32(1) / scale)), -qmax, qmax)
    return codes.astype(np.int8), scale, codes.sum(axis=1, keepdims=True).astype(np.int32)


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


@pytest.mark.parametrize(("m", "k", "block_k"), [(3, 129, 8), (20, 1152, 64), (2, 20001, None)])
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
    codes, scale, _ = kernel(x)
    assert scale == 1
    np.testing.assert_array_equal(codes, [[127, 0, 2, 2, 0, -2, -126]])


def test_zero_and_denormal_rows_have_scale_one():
    x = rows(4, 70)
    x[1], x[3] = 0, TINY * 100  # max|x| / 127 is denormal
    codes, scale, sums = kernel(x)
    assert_equal((codes, scale, sums), oracle(x))
    assert scale[1] == scale[3] == 1 and not codes[1].any() and not codes[3].any()


@pytest.mark.parametrize("block_k", (None, 16), ids=("one pass", "two passes"))
@pytest.mark.parametrize("column", (0, 149))
def test_nan_and_inf_make_the_scale_non_finite(column, block_k):
    x = rows(4, 150)
    x[0, column], x[1, column], x[2, column] = np.nan, np.inf, -np.inf
    found = kernel(x, block_k=block_k)
    assert_equal(found, REFERENCE(x, 8))
    assert np.isnan(found[1][0, 0]) and np.isinf(found[1][1:3]).all()
    assert_equal([part[3:] for part in found], oracle(x[3:]))


def random_mask(k, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], k) * rng.uniform(0.1, 2, k)).astype(np.float32)


@pytest.mark.parametrize(("m", "k", "block_k"), [(3, 129, None), (5, 300, 32)])
def test_a_mask_multiplies_the_channels(m, k, block_k):
    x, mask = rows(m, k), random_mask(k)
    found = kernel(x, mask=mask, block_k=block_k)
    assert_equal(found, oracle(x, mask=mask))
    assert_equal(found, REFERENCE(x, 8, mask))


@settings(max_examples=8)
@given(
    m=st.sampled_from((1, 2, 5, 33)),
    k=st.sampled_from((1, 2, 31, 64, 129, 300)),
    block_k=st.sampled_from((None, 32)),
    bits=st.integers(2, 8),
    dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
)
def test_rows_of_any_shape_equal_the_reference(m, k, block_k, bits, dtype):
    x, mask = jnp.asarray(rows(m, k, seed=m + k), dtype), random_mask(k)
    assert_equal(kernel(x, bits, mask, block_k=block_k), REFERENCE(x, bits, mask))


@settings(max_examples=50)
@given(
    dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
    block_k=st.sampled_from((None, 4)),
    fill=st.sampled_from((0.0, -0.0, 3.3e38, -1e-45, 2.0**-126, 127 * 2.0**-126)),
    bad=st.sampled_from((np.nan, np.inf, -np.inf)),
    place=st.tuples(st.integers(0, 1), st.integers(0, 68)),
    seed=st.integers(0, 2**32),
)
def test_rows_of_any_values_equal_the_reference(dtype, block_k, fill, bad, place, seed):
    """Bit for bit: zeros, the largest and the smallest numbers, NaN and inf in their row alone."""
    x, mask = rows(4, 69, seed), random_mask(69, seed)
    mask[np.abs(mask) > 1] = -1  # what float32 holds, it still holds
    x[place], x[2] = bad, fill
    x = jnp.asarray(x, dtype)
    found = kernel(x, 8, mask, block_k=block_k)
    assert_equal(found, REFERENCE(x, 8, mask))
    assert np.isfinite(found.scale[:, 0]).tolist() == [i != place[0] for i in range(4)]


# The proven bound on the error of a rotated value, relative to the largest of its row: two splits
# of 2^-16, and sqrt(B) from the norm of a block to its largest value. Random rows are met to 4e-6.
def rotation_bound(rotation):
    return 2.0**-15 * rotation**0.5


@pytest.mark.parametrize(
    ("m", "k", "rotation", "block_k", "bits"),
    [
        *((5, 192, 64, None, 8), (3, 1152, 128, None, 8), (5, 768, 256, None, 4)),
        *((1, 64, 64, None, 4), (2, 2560, 256, 256, 8)),  # one short row; read more than once
    ],
)
def test_rotated_rows_are_met_to_float64(m, k, rotation, block_k, bits):
    x, mask = rows(m, k, seed=k), random_mask(k)
    exact = exactly.rotate(x.astype(float) * mask, rotation)
    found = kernel(x, bits, mask, rotation, block_k=block_k)
    assert exactly.assert_quantised(found, exact, bits, 1e-5) < 2e-3


@settings(max_examples=25)
@given(
    rotation=st.sampled_from(reference_rows.ROTATIONS),
    row=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=12),
    start=st.integers(0, 500),
)
def test_any_rotated_row_keeps_the_proven_bound(rotation, row, start):
    """A few values of any sizes, anywhere among 512: the spikes that a rotation is there for."""
    x = np.zeros((2, 512), np.float32)
    x[0, start : start + len(row)] = row
    x[np.abs(x) < 2.0**-60] = 0  # far from where bfloat16's second part is denormal
    x[1] = x[0] * np.float32(2.0**-20)
    exact = exactly.rotate(x.astype(float), rotation)
    if x.any():
        found = kernel(x, 8, None, rotation)
        exactly.assert_quantised(found, exact, 8, rotation_bound(rotation))


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf, 3.4e38))
def test_bad_numbers_stay_visible_through_a_rotation(bad):
    x, mask = rows(3, 1152), np.ones(1152, np.float32)
    x[1, 1100] = bad  # 3.4e38 rounds to infinity in bfloat16
    found = kernel(x, 8, mask, 128)
    assert np.isfinite(found.scale[:, 0]).tolist() == [True, False, True]
    exact = exactly.rotate(x[::2].astype(float), 128)
    exactly.assert_quantised([part[::2] for part in found], exact, 8, 1e-5)


def test_a_rotated_row_of_zeros():
    x = np.zeros((2, 512), np.float32)
    x[1, 0] = 1
    codes, scale, sums = kernel(x, 8, None, 64)
    assert scale[0] == 1 and not codes[0].any() and sums[0] == 0
    assert codes[1].tolist() == [127] * 64 + [0] * 448 and sums[1] == 127 * 64


def adaln(b, t, k, dtype, seed=0):
    """x[b, t, k], shift and scale [b, k]: different for each image."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((b, t, k)) * rng.lognormal(0, 2, (b, t, 1)) + rng.normal(
        0, 1, (b, t, 1)
    )
    shift, scale = rng.standard_normal((2, b, k))
    return tuple(jnp.asarray(a, dtype) for a in (x, shift, scale))


def in_float64(*arrays):
    return [np.asarray(a).astype(float) for a in arrays]


@pytest.mark.parametrize(
    ("b", "t", "k", "rotation", "block_k", "dtype"),
    [
        *((1, 1, 64, None, None, jnp.float32), (2, 5, 130, None, None, jnp.bfloat16)),
        *((3, 2, 130, None, 8, jnp.float32), (2, 2, 2560, 128, 256, jnp.float32)),
        *((2, 5, 1152, 128, None, jnp.bfloat16), (2, 1, 192, 64, None, jnp.float32)),
    ],
)
def test_modulated_rows_are_met_to_float64(b, t, k, rotation, block_k, dtype):
    """The 1e-5 of the rotation, which is more than the statistics' error."""
    args, mask = adaln(b, t, k, dtype, seed=k), random_mask(k)
    exact = exactly.rotate(exactly.modulate(*in_float64(*args)) * mask, rotation)
    options = dict(mask=mask, rotation=rotation)
    found = modulate_quantize_rows(*args, **options, block_k=block_k, interpret=True)
    assert exactly.assert_quantised(found, exact, 8, 1e-5) < 2e-3


@pytest.mark.parametrize(
    ("m", "k", "rotation", "block_k", "dtype"),
    [
        *((1, 3, None, None, jnp.float32), (5, 130, None, None, jnp.bfloat16)),
        *((5, 130, None, 8, jnp.float32), (3, 1152, 128, None, jnp.bfloat16)),
    ],
)
def test_gelu_rows_are_met_to_float64(m, k, rotation, block_k, dtype):
    x, mask = 3 * np.random.default_rng(k).standard_normal((m, k)), random_mask(k)
    x = jnp.asarray(x, dtype)
    exact = exactly.rotate(exactly.gelu(*in_float64(x)) * mask, rotation)
    found = gelu_quantize_rows(x, 8, mask, rotation, block_k=block_k, interpret=True)
    assert exactly.assert_quantised(found, exact, 8, 1e-5) < 2e-3


def test_gelu_keeps_its_digits_far_from_zero():
    """Alone in a row, the scale is the value: 1e-6 of itself, also where 1 + tanh has cancelled."""
    near, far = np.linspace(-6, 6, 43), [1e13, -1e13, 1e30, -1e30, 0]
    x = np.array([*near, *far], np.float32)[:, None]
    found = gelu_quantize_rows(jnp.asarray(x), interpret=True)
    y = np.asarray(found.codes * found.scale)
    np.testing.assert_allclose(y[:43], exactly.gelu(x[:43].astype(np.longdouble)), rtol=3e-6)
    np.testing.assert_allclose(y[43:], np.maximum(x[43:], 0), rtol=1e-6)


@pytest.mark.parametrize("block_k", (None, 8), ids=("one pass", "more"))
def test_bad_numbers_stay_visible_through_the_prologues(block_k):
    x, shift, scale = adaln(1, 4, 150, jnp.float32)
    x = x.at[0, 0, 149].set(np.nan).at[0, 1, 3].set(-np.inf).at[0, 2].mul(1e25)
    options = dict(block_k=block_k, interpret=True)
    found = modulate_quantize_rows(x, shift, scale, **options)  # the third: the variance overflows
    assert np.isfinite(found.scale[0, :, 0]).tolist() == [False, False, False, True]
    found = gelu_quantize_rows(x[0], **options)
    assert np.isfinite(found.scale[:, 0]).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((2, 4), np.int32), {}, "x must be bfloat16 or float32, got int32"),
        (np.zeros(4, np.float32), {}, r"shape \(any, any\), got \(4,\)"),
        (np.zeros((2, 4), np.float32), {"bits": 9}, "bits 9"),
        (np.zeros((2, 4), np.float32), {"block_k": 48}, "power of two from 1 to 2048, got 48"),
        (
            np.zeros((2, 64), np.float32),
            {"rotation": 64, "block_k": 128},
            "from 256 to 2048, got 128",
        ),
        (np.zeros((2, 64), np.float32), {"rotation": 128}, "128 does not divide k = 64"),
        (np.zeros((2, 4), np.float32), {"mask": np.ones((1, 4), np.float32)}, r"mask .*\(1, 4\)"),
    ],
)
def test_wrong_arguments(x, options, message):
    with pytest.raises(ValueError, match=message):
        kernel(x, **options)


def test_wrong_arguments_of_modulate():
    x, shift, scale = adaln(2, 3, 64, jnp.float32)
    for wrong, message in (
        ((x[0], shift, scale), r"x must have shape \(b, t, k\)"),
        ((x, shift[:1], scale), r"shift must be floating of shape \(2, 64\), got float32\(1, 64\)"),
        ((x, shift, scale.astype(jnp.float16)), "scale must be bfloat16 or float32, got float16"),
    ):
        with pytest.raises(ValueError, match=message):
            modulate_quantize_rows(*wrong, interpret=True)


def test_too_many_values_are_refused():
    huge = jax.ShapeDtypeStruct((2**17, 2**14), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="32 bits"):
        jax.eval_shape(quantize_rows, huge)


def test_an_empty_array_is_refused():
    with pytest.raises(NotImplementedError, match=r"\(0, 4\)"):
        kernel(np.zeros((0, 4), np.float32))


def specs(k, dtype, m, masked=True):
    """(op, its operands) of each op."""
    spec = jax.ShapeDtypeStruct
    mask = {"mask": spec((k,), jnp.float32)} if masked else {}
    x, channels = {"x": spec((m, k), dtype)} | mask, spec((2, k), dtype)
    yield quantize_rows, x
    yield gelu_quantize_rows, x
    adaln = {"x": spec((2, m, k), dtype), "shift": channels, "scale": channels}
    yield modulate_quantize_rows, adaln | mask


@pytest.mark.parametrize("rotation", (None, *reference_rows.ROTATIONS))
@pytest.mark.parametrize("k", (1152, 3072, 4608, 12288, 15360, 40960))
def test_lowers_for_cuda(lower_for_cuda, k, rotation):
    if rotation is None or k % rotation == 0:
        for op, operands in specs(k, jnp.bfloat16, 4608):
            lower_for_cuda(lambda kw, op=op: op(**kw, rotation=rotation), operands)


@pytest.mark.parametrize("k", (1, 64, 129, 20001))
def test_odd_float32_rows_without_a_mask_lower_for_cuda(lower_for_cuda, k):
    for op, operands in specs(k, jnp.float32, 1, masked=False):
        lower_for_cuda(lambda kw, op=op: op(**kw), operands)
        if k % 64 == 0:
            lower_for_cuda(lambda kw, op=op: op(**kw, rotation=64), operands)
