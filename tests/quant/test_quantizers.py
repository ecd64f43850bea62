"""Weight quantisers against float64 NumPy oracles that treat one segment at a time."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit_jax.quant import quantizers

TERNARY = ("absmean", "twn", "least_squares", "least_squares_fast", "least_squares_fixed_point")
INTEGER = ("absmax", "minmax", "mse")
GRANULARITIES = [{}, {"per_tensor": True}, {"group": 4}, {"group": 5}, {"group": 1}, {"group": 99}]
# Eighths are exact in float32 and bfloat16, make many ties, and no two sums of them are close.
EIGHTHS = st.integers(-40, 40).map(lambda i: i / 8)
MATRICES = hnp.arrays(np.float32, (3, 11), elements=EIGHTHS)


@functools.cache
def jitted(name):
    function = getattr(quantizers, name)
    names = [arg for arg in inspect.signature(function).parameters if arg != "w"]
    return jax.jit(function, static_argnames=names)


def quantize(name, w, **options):
    codes, scale, zero = jitted(name)(jnp.asarray(w), **options)
    assert codes.dtype == jnp.int8 and codes.shape == w.shape and scale.dtype == jnp.float32
    assert zero is None or (zero.dtype == jnp.int8 and zero.shape == scale.shape)
    return np.asarray(codes), np.asarray(scale), None if zero is None else np.asarray(zero)


def segments(w, group=None, per_tensor=False, **_):
    """[(index into the (n, g) scales, flat positions in w)] of every segment."""
    n, k = w.shape
    flat = np.arange(n * k).reshape(n, k)
    if per_tensor:
        return [((0, 0), flat.ravel())]
    size = group or k
    return [
        ((row, part), flat[row, start : start + size])
        for row in range(n)
        for part, start in enumerate(range(0, k, size))
    ]


def rebuild(codes, scale, zero=None, **options):
    out = np.empty(codes.size)
    for at, where in segments(codes, **options):
        offset = 0 if zero is None else int(zero[at])
        out[where] = float(scale[at]) * (codes.ravel()[where].astype(np.float64) - offset)
    return out.reshape(codes.shape)


def squared_errors(w, codes, scale, zero=None, **options):
    """Squared error of every segment, float64."""
    rest = (np.asarray(w, np.float64) - rebuild(codes, scale, zero, **options)).ravel()
    return np.array([np.sum(rest[where] ** 2) for _, where in segments(codes, **options)])


def best_ternary_error(x):
    """min over scale and codes of ||x - scale * codes||**2: for a support, the mean is best."""
    mags = np.sort(np.abs(np.asarray(x, np.float64)))[::-1]
    return np.sum(mags**2) - np.max(np.cumsum(mags) ** 2 / np.arange(1, mags.size + 1))


def brute_force_error(x):
    """The same over all 2**s supports, sorted or not."""
    mags = np.abs(np.asarray(x, np.float64))
    errors = [np.sum(mags**2)]
    for support in itertools.product([False, True], repeat=mags.size):
        if any(support):
            chosen = mags[list(support)]
            errors.append(np.sum(mags**2) - chosen.sum() ** 2 / chosen.size)
    return min(errors)


def random_matrix(kind="gauss", shape=(7, 33), seed=0):
    rng = np.random.default_rng(seed)
    draw = {
        "gauss": rng.standard_normal,
        "laplace": lambda size: rng.laplace(size=size),
        "t5": lambda size: rng.standard_t(5, size),
        "t2": lambda size: rng.standard_t(2, size),
        "cauchy": rng.standard_cauchy,
    }[kind]
    return draw(size=shape).astype(np.float32)


# Integers


@pytest.mark.parametrize("options", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_absmax_matches_the_oracle(bits, options):
    w, bound = random_matrix(), 2 ** (bits - 1) - 1
    codes, scale, zero = quantize("absmax", w, bits=bits, **options)
    assert zero is None
    for at, where in segments(w, **options):
        x = w.ravel()[where].astype(np.float64)
        assert scale[at] == pytest.approx(np.abs(x).max() / bound, rel=1e-6)
        got = codes.ravel()[where]
        assert np.abs(got).max() == bound  # the largest magnitude takes the last code
        np.testing.assert_array_less(np.abs(got - x / scale[at]), 0.5 + 1e-4)


@pytest.mark.parametrize("options", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 2.0, -50.0])
def test_minmax_matches_the_oracle(bits, options, shift):
    w = random_matrix() + np.float32(shift)
    codes, scale, zero = quantize("minmax", w, bits=bits, **options)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for at, where in segments(w, **options):
        x = w.ravel()[where].astype(np.float64)
        bottom, top = min(x.min(), 0), max(x.max(), 0)
        assert scale[at] == pytest.approx((top - bottom) / (2**bits - 1), rel=1e-6)
        assert abs(zero[at] - (low - bottom / scale[at])) < 0.5 + 1e-4
        assert low <= zero[at] <= high
        wanted = np.clip(x / scale[at] + zero[at], low, high)
        np.testing.assert_array_less(np.abs(codes.ravel()[where] - wanted), 0.5 + 1e-4)


def test_ties_round_to_even():
    w = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    codes, scale, _ = quantize("absmax", w)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    w = np.array([[-128, 127, 0.5, 1.5, -0.5, -1.5, 0]], np.float32)
    codes, scale, zero = quantize("minmax", w)
    assert (scale.tolist(), zero.tolist()) == ([[1.0]], [[0]])
    assert codes.tolist() == [[-128, 127, 0, 2, 0, -2, 0]]
    # absmean: mean 1, and |w| / mean = 1/2 rounds to 0, as does not 1/2 and a bit
    w = np.array([[0.5, 0.625, -0.5, 2.375]], np.float32)
    assert quantize("absmean", w)[0].tolist() == [[0, 1, 0, 1]]


@settings(max_examples=25)
@given(w=MATRICES, bits=st.sampled_from([2, 4, 8]))
def test_minmax_represents_zero_and_stays_in_range(w, bits):
    codes, scale, zero = quantize("minmax", w, bits=bits)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)
    np.testing.assert_array_equal(rebuild(codes, scale, zero)[w == 0], 0)
    steps = np.abs(rebuild(codes, scale, zero) - w) / scale
    assert steps.max() <= 1 + 1e-4  # half a step of rounding, half of the zero point's rounding


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t2"])
@pytest.mark.parametrize("options", [{}, {"per_tensor": True}, {"group": 20}])
@pytest.mark.parametrize(("symmetric", "name"), [(True, "absmax"), (False, "minmax")])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_never_worse_than_the_full_range(kind, options, symmetric, name, bits):
    w = random_matrix(kind, (5, 64))
    got = quantize("mse", w, bits=bits, symmetric=symmetric, **options)
    full = quantize(name, w, bits=bits, **options)
    better, worse = squared_errors(w, *got, **options), squared_errors(w, *full, **options)
    assert np.all(better <= worse * (1 + 1e-5))  # float32 sums choose between near equals
    assert better.sum() < worse.sum()


@settings(max_examples=25)
@given(w=MATRICES, bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans())
def test_mse_on_coarse_numbers(w, bits, symmetric):
    got = squared_errors(w, *quantize("mse", w, bits=bits, symmetric=symmetric))
    full = squared_errors(w, *quantize("absmax" if symmetric else "minmax", w, bits=bits))
    # an exact fit leaves rounding only: 2**-24 of max|w| per weight
    assert np.all(got <= full * (1 + 1e-5) + w.size * (5 * 2.0**-22) ** 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_scale_is_least_squares_for_its_codes(symmetric):
    w = random_matrix("laplace", (6, 100)).astype(np.float64)
    codes, scale, zero = quantize("mse", w.astype(np.float32), bits=4, symmetric=symmetric)
    q = codes - (0.0 if zero is None else zero.astype(np.float64))
    np.testing.assert_allclose(scale[:, 0], (w * q).sum(1) / (q * q).sum(1), rtol=1e-5)


def test_mse_finds_the_clipped_scale():
    """Against a dense float64 search: within 1 % of the best error at 4 bits."""
    w = random_matrix("gauss", (4, 512))
    got = squared_errors(w, *quantize("mse", w, bits=4))
    for row, error in zip(w.astype(np.float64), got, strict=True):
        scales = np.linspace(0.05, 1, 2000)[:, None] * np.abs(row).max() / 7
        q = np.clip(np.round(row / scales), -7, 7)
        assert error <= 1.01 * np.min(np.sum((row - scales * q) ** 2, axis=1))


# Ternary


@pytest.mark.parametrize("options", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gauss", "laplace", "cauchy"])
def test_absmean_and_twn_match_the_oracle(kind, options):
    w = random_matrix(kind)
    plain, refit = (quantize("absmean", w, refit=r, **options) for r in (False, True))
    thresholded = quantize("twn", w, **options)
    np.testing.assert_array_equal(plain[0], refit[0])
    for at, where in segments(w, **options):
        x = w.ravel()[where].astype(np.float64)
        mean = np.abs(x).mean()
        kept = np.clip(np.round(x / mean), -1, 1)
        np.testing.assert_array_equal(plain[0].ravel()[where], kept)
        assert plain[1][at] == pytest.approx(mean, rel=1e-6)
        assert refit[1][at] == pytest.approx(np.sum(x * kept) / np.sum(kept**2), rel=1e-6)
        kept = np.abs(x) > 0.7 * mean
        np.testing.assert_array_equal(thresholded[0].ravel()[where], np.sign(x) * kept)
        assert thresholded[1][at] == pytest.approx(np.abs(x)[kept].mean(), rel=1e-6)


@settings(max_examples=60)
@given(w=hnp.arrays(np.float32, (2, 7), elements=EIGHTHS))
def test_least_squares_is_optimal_over_all_supports(w):
    got = squared_errors(w, *quantize("least_squares", w))
    wanted = [brute_force_error(row) for row in w]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose([best_ternary_error(r) for r in w], wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gauss", "laplace", "t2", "cauchy"])
@pytest.mark.parametrize("name", ["least_squares", "least_squares_fast"])
def test_least_squares_is_optimal_in_every_segment(name, kind, options):
    w = random_matrix(kind)
    got = squared_errors(w, *quantize(name, w, **options), **options)
    wanted = [best_ternary_error(w.ravel()[where]) for _, where in segments(w, **options)]
    # the scale is rounded to float32: 1e-12 of the power where a segment is fitted exactly
    power = np.array([np.sum(w.ravel()[where] ** 2.0) for _, where in segments(w, **options)])
    np.testing.assert_array_less(got, np.array(wanted) * (1 + 1e-5) + 1e-12 * power)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t5", "t2", "cauchy"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 3e-6), (jnp.float32, 1e-4)])
@pytest.mark.parametrize("options", [{}, {"per_tensor": True}])
def test_histogram_is_optimal(kind, dtype, tolerance, options):
    """bfloat16: exact up to float32 sums; float32: supports that split a bin are only neared."""
    w = jnp.asarray(random_matrix(kind, (20, 3072)), dtype)
    exact = np.asarray(w.astype(jnp.float32))
    got = squared_errors(exact, *quantize("least_squares_fast", w, **options), **options)
    wanted = [best_ternary_error(exact.ravel()[where]) for _, where in segments(exact, **options)]
    np.testing.assert_array_less(got, np.array(wanted) * (1 + tolerance))


@pytest.mark.parametrize("outlier", [3.0, 60.0, 1e3, 1e6, 1e12])
def test_histogram_spans_any_range(outlier):
    """A few weights far above the rest, up to taking all the power: still the best support."""
    w = random_matrix("gauss", (8, 2000))
    w[:, :5] *= outlier
    w[0, 5:] = 0
    got = squared_errors(w, *quantize("least_squares_fast", w))
    power = np.sum(w.astype(np.float64) ** 2, axis=1)
    wanted = np.array([best_ternary_error(row) for row in w])
    np.testing.assert_array_less(got, wanted * (1 + 1e-5) + 1e-12 * power)


def test_histogram_of_equal_weights():
    w = np.full((2, 5000), -0.3, np.float32)
    codes, scale, _ = quantize("least_squares_fast", w)
    assert np.all(codes == -1)
    np.testing.assert_allclose(scale, 0.3, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t5"])
def test_fixed_point_nears_the_optimum_of_smooth_weights(kind):
    w = random_matrix(kind, (64, 3072))
    wanted = np.array([best_ternary_error(row) for row in w])
    errors = [
        squared_errors(w, *quantize("least_squares_fixed_point", w, iterations=i))
        for i in (0, 1, 2, 5, 10, 20)
    ]
    for before, after in itertools.pairwise(errors):
        assert np.all(after <= before * (1 + 1e-6))
    assert np.all(errors[-1] <= wanted * (1 + 1e-3))


def test_fixed_point_can_miss_where_the_others_do_not():
    """Keeping all of it is a fixed point; so is the outlier alone, and that is far better."""
    w = np.concatenate([[60.0], np.linspace(0.9, 1.1, 1400)])[None].astype(np.float32)
    wanted = best_ternary_error(w[0])
    assert squared_errors(w, *quantize("least_squares_fixed_point", w))[0] > 2 * wanted
    for name in ("least_squares", "least_squares_fast"):
        assert squared_errors(w, *quantize(name, w))[0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("absmean", {}, {"gauss": 5.79, "laplace": 4.05, "t5": 4.40}),
        ("absmean", {"refit": True}, {"gauss": 6.72, "laplace": 4.98}),
        ("twn", {}, {"gauss": 7.17, "laplace": 5.49}),
        ("least_squares", {}, {"gauss": 7.21, "laplace": 5.79, "t5": 5.64}),
        ("least_squares_fast", {}, {"gauss": 7.21, "laplace": 5.79, "t5": 5.64}),
        ("least_squares", {"group": 128}, {"gauss": 7.27}),
        ("least_squares", {"group": 64}, {"gauss": 7.35}),
    ],
)
def test_signal_to_noise_ratios(name, options, wanted):
    """dB of weight power over error power, per row unless a group is given."""
    for kind, decibels in wanted.items():
        w = random_matrix(kind, (384, 3072), seed=1)
        noise = squared_errors(w, *quantize(name, w, **options), **options).sum()
        assert 10 * np.log10(np.sum(w.astype(np.float64) ** 2) / noise) == pytest.approx(
            decibels, abs=0.15
        )


def test_zeros_of_the_optimum():
    w = random_matrix("gauss", (64, 3072))
    assert np.mean(quantize("least_squares", w)[0] == 0) == pytest.approx(0.46, abs=0.01)


# Every quantiser


@pytest.mark.parametrize("options", [{}, {"group": 4}])
@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_zero_segments_rebuild_exactly(name, options):
    w = random_matrix(shape=(3, 8))
    w[1] = 0
    w[2] = 1e-40  # a denormal, which XLA may flush
    codes, scale, zero = quantize(name, w, **options)
    assert np.all(codes[1:] == 0) and np.all(scale[1:] == 1)
    assert zero is None or np.all(zero[1:] == 0)
    assert np.all(np.isfinite(scale)) and np.any(codes[0])
    assert np.all(rebuild(*quantize(name, np.zeros((2, 3), np.float32))) == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"group": 4}, {"per_tensor": True}])
@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_bad_numbers_show_in_the_scale(name, options, bad):
    w = random_matrix(shape=(3, 8))
    w[1, 2] = bad
    _, scale, _ = quantize(name, w, **options)
    hurt = np.zeros(scale.shape, bool)
    hurt[min(1, len(hurt) - 1), 0] = True
    np.testing.assert_array_equal(~np.isfinite(scale), hurt)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("k", [2048, 3072])
@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_bad_numbers_show_in_long_rows(name, k, bad):
    """XLA's CPU maximum drops NaN from about 2048 entries on (jax 0.10), so that is no check."""
    w = random_matrix(shape=(3, k))
    w[1, 7] = bad
    assert np.isfinite(quantize(name, w)[1]).ravel().tolist() == [True, False, True]
    assert not np.isfinite(quantize(name, w, per_tensor=True)[1]).any()


@pytest.mark.parametrize("exponent", [-110, -60, 0, 60, 120])
@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_powers_of_two_change_nothing_but_the_scale(name, exponent):
    w = random_matrix(shape=(4, 40))
    w = np.where(np.abs(w) < 0.01, 0, w)  # so that none becomes denormal
    codes, scale, zero = quantize(name, w)
    scaled = quantize(name, np.ldexp(w, exponent))
    np.testing.assert_array_equal(scaled[0], codes)
    np.testing.assert_array_equal(scaled[1], np.ldexp(scale, exponent))
    assert zero is None or np.array_equal(scaled[2], zero)


@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_the_largest_floats(name):
    w = np.full((2, 5), np.finfo(np.float32).max, np.float32)
    w[:, 1::2] *= -1
    codes, scale, zero = quantize(name, w)
    assert np.all(np.isfinite(scale))
    np.testing.assert_allclose(rebuild(codes, scale, zero), w, rtol=1e-2)


@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_one_element_rows_are_exact(name):
    w = np.array([[-3.0], [0.0], [1e-20]], np.float32)
    np.testing.assert_allclose(rebuild(*quantize(name, w)), w, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_narrow_floats_are_computed_in_float32(name, dtype):
    w = jnp.asarray(random_matrix(), dtype)
    for a, b in zip(quantize(name, w), quantize(name, w.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", INTEGER + TERNARY)
def test_groups_equal_matrices_of_their_own(name):
    """The tail group's padding has no influence: the same codes as if it stood alone."""
    w = random_matrix("laplace", (4, 22)) + np.float32(0.5)
    codes, scale, zero = quantize(name, w, group=8)
    assert scale.shape == (4, 3)
    for part, start in enumerate((0, 8, 16)):
        alone = quantize(name, w[:, start : start + 8])
        np.testing.assert_array_equal(codes[:, start : start + 8], alone[0])
        np.testing.assert_allclose(scale[:, [part]], alone[1], rtol=1e-6)
        assert zero is None or np.array_equal(zero[:, [part]], alone[2])


@pytest.mark.parametrize("name", INTEGER + TERNARY)
@pytest.mark.parametrize("shape", [(3, 20), (3, 1500)])
def test_transformations_agree(name, shape):
    w = jnp.asarray(random_matrix(shape=(2, *shape)))
    function = getattr(quantizers, name)
    stacked = jax.jit(jax.vmap(function))(w)
    for leaf, whole in zip(
        jax.tree.leaves(jitted(name)(w[1])), jax.tree.leaves(stacked), strict=True
    ):
        np.testing.assert_allclose(leaf, whole[1], rtol=1e-6)
    planned = jax.eval_shape(function, w[0])
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(planned)] == [
        (x.shape[1:], x.dtype) for x in jax.tree.leaves(stacked)
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantizers.absmax(jnp.ones((2, 3)), 9), r"\[2, 8\], got 9"),
        (lambda: quantizers.minmax(jnp.ones((2, 3)), 1), r"\[2, 8\], got 1"),
        (lambda: quantizers.mse(jnp.ones((2, 3)), steps=0), "at least 1, got 0"),
        (lambda: quantizers.absmax(jnp.ones(3)), r"\(n, k\) matrix, got float32\[3\]"),
        (lambda: quantizers.twn(jnp.ones((2, 3), jnp.int8)), r"floating.*got int8\[2, 3\]"),
        (lambda: quantizers.twn(jnp.ones((2, 0))), r"matrix.*got float32\[2, 0\]"),
        (lambda: quantizers.absmean(jnp.ones((2, 3)), group=0), "at least 1.*got 0"),
        (lambda: quantizers.absmean(jnp.ones((2, 3)), group=2, per_tensor=True), "got 2"),
    ],
)
def test_errors_carry_both_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
