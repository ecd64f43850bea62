"""The row ops' own proof: NumPy in float64, SciPy's Hadamard, and what must not be hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from lowbit_jax.models import layers
from pallas_kernels import reference_rows
from tests.references import rows as exactly

QUANTIZE = jax.jit(reference_rows.quantize_rows, static_argnums=(1, 3))
GELU = jax.jit(reference_rows.gelu_quantize_rows, static_argnums=(1, 3))
MODULATE = jax.jit(
    reference_rows.modulate_quantize_rows, static_argnames=("bits", "eps", "rotation")
)
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


@pytest.mark.parametrize("quantize", (reference_rows.quantize_rows, QUANTIZE), ids=("eager", "jit"))
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_equal_the_oracle(bits, quantize):
    """Integers and scales equal: rows of sizes from 1e-30 to 1e30, and one that is zero."""
    x = np.random.default_rng(bits).standard_normal((3, 20, 65), np.float32)
    x *= np.logspace(-30, 30, 20, dtype=np.float32)[:, None]
    x[1, 7] = 0
    codes, scale, sums = quantize(x, bits)
    expected_codes, expected_scale = oracle(x, bits)
    assert (codes.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (3, 20, 1))
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(sums, expected_codes.sum(-1, keepdims=True, dtype=np.int32))
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
    codes, scale, _ = (np.asarray(part, np.float64) for part in QUANTIZE(x, bits))
    # half a step, the roundings of scale and ratio, and what underflows (see the next test)
    bound = (0.5 + 2.0 ** (bits - 24)) * scale if np.abs(x).max() > 127 * TINY else 127 * TINY
    assert (np.abs(codes * scale - x) <= bound).all()


def test_ties_go_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -127]], np.float32)
    for factor in (1, 2.0**-20, 2.0**40):  # scale is a power of two: every ratio exact
        codes, scale, _ = QUANTIZE(x * np.float32(factor), 8)
        assert scale.tolist() == [[factor]]
        assert codes.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, -127]]


def test_zero_rows_have_scale_one():
    codes, scale, _ = QUANTIZE(np.array([[0.0, -0.0], [0.0, 1.0]], np.float32), 8)
    assert codes.tolist() == [[0, 0], [0, 127]]
    np.testing.assert_array_equal(scale, np.array([[1], [1 / 127]], np.float32))


@pytest.mark.parametrize("bits", (2, 8))
def test_denormal_rows_stay_finite_and_tiny(bits):
    """Whether or not the machine flushes denormals, such a row is off by less than 127 of them."""
    peaks = [1e-45, 1e-42, TINY / 2, TINY, 3 * TINY, 100 * TINY, 126 * TINY]
    x = np.array([[p, -p / 3, 0] for p in peaks], np.float32)
    codes, scale, _ = (np.asarray(part, np.float64) for part in QUANTIZE(x, bits))
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert (np.abs(codes * scale - x) <= 127 * TINY).all()


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("width", (8, 3072))  # XLA:CPU's max drops NaN on rows of 2048 and more
def test_bad_numbers_spoil_their_row_and_no_other(bad, width):
    """The scale is non-finite, so 0 * scale is NaN: no product of that row can look sane."""
    x = np.random.default_rng(0).standard_normal((3, width), np.float32)
    clean_codes, clean_scale, _ = QUANTIZE(x, 8)
    x[1, 3] = bad
    codes, scale, _ = QUANTIZE(x, 8)
    assert np.isfinite(scale[:, 0]).tolist() == [True, False, True]
    assert not np.isfinite(jnp.asarray(codes[1], jnp.float32) * scale[1]).any()
    np.testing.assert_array_equal(codes[::2], clean_codes[::2])
    np.testing.assert_array_equal(scale[::2], clean_scale[::2])


@pytest.mark.parametrize("bits", (1, 9, 0, -8))
def test_bits_out_of_range_raise(bits):
    with pytest.raises(ValueError, match=f"activation bits {bits} outside 2..8"):
        reference_rows.quantize_rows(np.ones((1, 2), np.float32), bits)


def test_bfloat16_rows_are_quantised_in_float32():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 33)), jnp.bfloat16)
    codes, scale, _ = QUANTIZE(x, 8)
    expected_codes, expected_scale = oracle(np.asarray(x, np.float32), 8)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("size", reference_rows.ROTATIONS)
def test_hadamard_equals_scipy(size):
    np.testing.assert_array_equal(reference_rows.hadamard(size), linalg.hadamard(size))


@pytest.mark.parametrize(("k", "rotation"), [(64, 64), (1152, 128), (1152, 64), (3072, 256)])
def test_a_rotation_is_orthogonal_and_its_own_inverse(k, rotation):
    x = np.random.default_rng(k).standard_normal((3, k), np.float32)
    rotated = reference_rows.rotate(x, rotation)
    np.testing.assert_allclose(rotated, exactly.rotate(x.astype(float), rotation), atol=4e-6)
    np.testing.assert_allclose(reference_rows.rotate(rotated, rotation), x, atol=8e-6)
    sizes = (np.linalg.norm(a, axis=1) for a in (rotated, x))
    np.testing.assert_allclose(*sizes, rtol=1e-6)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize(
    ("k", "rotation"), [(65, None), (1152, 64), (1152, 128), (768, 256), (15360, 128)]
)
def test_mask_and_rotation_equal_float64(k, rotation, bits):
    """float32 sums of up to 256 terms are off by less than 1e-6 of the largest."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((2, 3, k), np.float32) * np.logspace(-9, 9, 3, dtype="f")[:, None]
    mask = rng.choice([-1, 1], k) * rng.uniform(0.1, 2, k)
    mask = mask.astype(np.float32)
    exact = exactly.rotate(x.astype(float) * mask, rotation)
    strays = exactly.assert_quantised(QUANTIZE(x, bits, mask, rotation), exact, bits, 1e-6)
    assert strays < 2e-4


def test_the_mask_comes_before_the_rotation():
    """Signs inside the rotation make it another one; behind it they would only flip codes."""
    x = np.zeros((1, 64), np.float32)
    x[0, :2] = 1
    plain, signed = (
        np.asarray(QUANTIZE(x, 8, mask, 64).codes)
        for mask in (None, np.r_[1, -np.ones(63)].astype(np.float32))
    )
    assert (plain[0, :4] == [127, 0, 127, 0]).all()
    assert (signed[0, :4] == [0, 127, 0, 127]).all()


def adaln(b, t, k, seed=0, dtype=np.float32):
    """x[b, t, k], shift and scale [b, k]: different for each image."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((b, t, k)) * rng.lognormal(0, 2, (b, t, 1)) + rng.normal(
        0, 1, (b, t, 1)
    )
    shift, scale = rng.standard_normal((2, b, k))
    return tuple(jnp.asarray(a, dtype) for a in (x, shift, scale))


def in_float64(*arrays):
    return [np.asarray(a).astype(float) for a in arrays]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize(("k", "rotation"), [(130, None), (1152, None), (1152, 128)])
def test_modulate_equals_float64(k, rotation, dtype):
    """In float32 to the end, whatever the dtype of x: 4e-6 of the peak for statistics and sums."""
    args = adaln(2, 5, k, dtype=dtype)
    mask = np.linspace(0.5, 2, k, dtype=np.float32)
    exact = exactly.rotate(exactly.modulate(*in_float64(*args)) * mask, rotation)
    found = MODULATE(*args, mask=mask, rotation=rotation)
    assert exactly.assert_quantised(found, exact, 8, 4e-6) < 1e-3


def test_modulate_equals_the_layers_in_float32():
    """Same formula, same dtype: the same codes but next to ties."""
    args = adaln(2, 5, 1152)
    fused, plain = MODULATE(*args), QUANTIZE(layers.modulate(*args), 8)
    np.testing.assert_allclose(fused.scale, plain.scale, rtol=2e-6)
    difference = np.abs(np.asarray(fused.codes, int) - np.asarray(plain.codes, int))
    assert difference.max() <= 1 and difference.mean() < 1e-3


def test_modulate_is_nearer_the_truth_than_the_layers_in_bfloat16():
    """The layers round LayerNorm, 1 + scale, product and sum to 8 bits each: up to two codes."""
    args = adaln(2, 5, 1152, dtype=jnp.bfloat16)
    exact = exactly.modulate(*in_float64(*args))
    fused, plain = MODULATE(*args), QUANTIZE(layers.modulate(*args), 8)
    errors = [np.abs(np.asarray(q.codes, float) * q.scale - exact).mean() for q in (fused, plain)]
    assert errors[0] < errors[1]
    difference = np.abs(np.asarray(fused.codes, int) - np.asarray(plain.codes, int))
    assert difference.max() <= 2


def test_eps_counts():
    x, shift, scale = adaln(1, 3, 64)
    x = x * 1e-3  # a variance of 1e-6
    exact = exactly.modulate(*in_float64(x, shift, scale), eps=1e-5)
    exactly.assert_quantised(MODULATE(x, shift, scale, eps=1e-5), exact, 8, 4e-6)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize(("k", "rotation"), [(130, None), (4608, 128)])
def test_gelu_equals_float64(k, rotation, dtype):
    x = jnp.asarray(3 * np.random.default_rng(k).standard_normal((2, 5, k)), dtype)
    mask = np.linspace(0.5, 2, k, dtype=np.float32)
    exact = exactly.rotate(exactly.gelu(*in_float64(x)) * mask, rotation)
    found = GELU(x, 8, mask, rotation)
    assert exactly.assert_quantised(found, exact, 8, 1e-6) < 1e-3


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_bad_numbers_spoil_their_row_under_every_op(bad):
    x, shift, scale = adaln(1, 3, 256)
    x = x.at[0, 1, 77].set(bad)
    mask = np.ones(256, np.float32)
    for rotation in (None, 128):
        for found in (
            QUANTIZE(x, 8, mask, rotation),
            GELU(x, 8, mask, rotation),
            MODULATE(x, shift, scale, mask=mask, rotation=rotation),
        ):
            # gelu(-inf) is 0, of which the tanh form makes NaN
            assert np.isfinite(found.scale[0, :, 0]).tolist() == [True, False, True]


def test_a_variance_that_overflows_is_seen():
    x, shift, scale = adaln(1, 2, 64)
    found = MODULATE(x.at[0, 1].mul(1e25), shift, scale)
    assert np.isfinite(found.scale[0, :, 0]).tolist() == [True, False]


X, MASK = np.ones((2, 192), np.float32), np.ones(192, np.float32)


@pytest.mark.parametrize("op", ("quantize_rows", "gelu_quantize_rows", "modulate_quantize_rows"))
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": X.astype(np.int32)}, "x must be a floating array of rows, got int32"),
        ({"bits": 9}, "activation bits 9 outside 2..8"),
        ({"mask": MASK[:191]}, r"mask must be float32 of shape \(192,\), got float32\(191,\)"),
        ({"mask": MASK.astype(np.float16)}, "mask must be float32 .* got float16"),
        ({"rotation": 32}, r"rotation must be None or one of \(64, 128, 256\), got 32"),
        ({"rotation": 128}, "rotation 128 does not divide k = 192"),
    ],
)
def test_wrong_arguments(op, wrong, message):
    args = {"x": X, "bits": 8, "mask": MASK, "rotation": 64} | wrong
    if op == "modulate_quantize_rows":
        args |= {"x": args["x"][None], "shift": MASK[None], "scale": MASK[None]}
    with pytest.raises(ValueError, match=message):
        getattr(reference_rows, op)(**args)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": X}, r"x must have shape \(b, t, k\), got \(2, 192\)"),
        ({"shift": MASK}, r"shift must be floating of shape \(1, 192\), got float32\(192,\)"),
        ({"scale": MASK[None, :64]}, r"scale must be .* \(1, 192\), got float32\(1, 64\)"),
        ({"scale": MASK[None].astype(int)}, "scale must be floating"),
    ],
)
def test_wrong_arguments_of_modulate(wrong, message):
    args = {"x": X[None], "shift": MASK[None], "scale": MASK[None]} | wrong
    with pytest.raises(ValueError, match=message):
        reference_rows.modulate_quantize_rows(**args)
