"""Masks against the published formulas written out channel by channel, and what has no value."""

import numpy as np
import pytest

from lowbit_jax.quant.masks import (
    alpha_of_viditq,
    channel_mask,
    over_halves,
    over_runs,
    range_masks,
)

RNG = np.random.default_rng(0)
ABSMAX = np.exp(RNG.normal(0, 2, (2, 3, 7))).astype(np.float32)
KERNEL = RNG.normal(0, 0.1, (7, 5)).astype(np.float32)
ROWS = np.abs(KERNEL).max(1)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.11, 0.5, 0.625, 1.0])
def test_smoothquant_equation_4(alpha):
    """Their s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); x is divided by it."""
    absmax = ABSMAX[0, 0]
    mask = channel_mask(absmax, ROWS, alpha)
    assert mask.dtype == np.float32
    for j in range(7):
        s = float(absmax[j]) ** alpha / float(max(abs(KERNEL[j]))) ** (1 - alpha)
        assert mask[j] == pytest.approx(1 / s, rel=2e-6)


@pytest.mark.parametrize("a", [0.99, 0.5665, 0.75])
def test_viditq_v2_in_its_own_convention(a):
    """m[c] = max_o |W[o, c]|^a / A[c]^(1 - a), the largest over all halves, ranges and tokens."""
    mask = channel_mask(over_runs(ABSMAX), ROWS, alpha_of_viditq(a))
    for c in range(7):
        largest = max(float(value) for value in ABSMAX[:, :, c].ravel())
        m = max(abs(float(w)) for w in KERNEL[c]) ** a / largest ** (1 - a)
        assert mask[c] == pytest.approx(m, rel=1e-6)


def test_viditq_v1_has_a_mask_and_an_alpha_for_each_range():
    alphas = (0.075, 0.11, 0.15)
    masks = range_masks(over_halves(ABSMAX), ROWS, alphas)
    for r, alpha in enumerate(alphas):
        top = np.maximum(ABSMAX[0, r], ABSMAX[1, r]).astype(np.float64)
        s = top**alpha / np.abs(KERNEL).max(1).astype(np.float64) ** (1 - alpha)
        np.testing.assert_allclose(masks[r], 1 / s, rtol=1e-6)


def test_alpha_of_a_half_makes_both_sides_equal():
    """The property SmoothQuant names: equal ranges; and the product does not change."""
    absmax = ABSMAX[1, 2]
    mask = np.asarray(channel_mask(absmax, ROWS, 0.5), float)
    np.testing.assert_allclose(absmax * mask, np.abs(KERNEL / mask[:, None]).max(1), rtol=1e-5)
    x = RNG.uniform(-1, 1, (11, 7)) * absmax
    balanced = (x * mask) @ (KERNEL / mask[:, None])
    np.testing.assert_allclose(balanced, x @ KERNEL, rtol=1e-12)


def test_alpha_of_one_flattens_activations_and_zero_the_weights():
    absmax = ABSMAX[0, 1]
    np.testing.assert_allclose(absmax * channel_mask(absmax, ROWS, 1.0), 1, rtol=1e-6)
    weights = KERNEL / channel_mask(absmax, ROWS, 0.0)[:, None]
    np.testing.assert_allclose(np.abs(weights).max(1), 1, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_channels_and_weights_of_zeros_stay_as_they_are(alpha):
    absmax, rows = ABSMAX[0, 0].copy(), ROWS.copy()
    absmax[1], rows[4], absmax[6] = 0, 0, 1e-40
    mask = channel_mask(absmax, rows, alpha)
    assert mask[1] == mask[4] == mask[6] == 1
    others = np.array([0, 2, 3, 5])
    np.testing.assert_array_equal(mask[others], channel_mask(ABSMAX[0, 0], ROWS, alpha)[others])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_every_mask_is_a_normal_number_of_float32(alpha):
    sizes = np.array([2.0**-118, 1e-30, 1.0, 1e30, 3e38], np.float32)
    masks = np.asarray([channel_mask(sizes, np.roll(sizes, shift), alpha) for shift in range(5)])
    assert (np.abs(np.log2(masks)) <= 118 + 1e-3).all()


@pytest.mark.parametrize(
    ("absmax", "rows", "alpha", "message"),
    [
        (np.ones(7), ROWS, 1.5, "alpha is 1.5"),
        (np.ones(7), ROWS, np.nan, "alpha is nan"),
        (np.ones(5), ROWS, 0.5, r"\(5,\), the weights' \(7,\)"),
        (np.ones((1, 7)), ROWS, 0.5, r"\(1, 7\)"),
    ],
)
def test_what_is_refused(absmax, rows, alpha, message):
    with pytest.raises(ValueError, match=message):
        channel_mask(absmax, rows, alpha)


def test_as_many_alphas_as_ranges():
    with pytest.raises(ValueError, match="2 alphas for 3 timestep ranges"):
        range_masks(over_halves(ABSMAX), ROWS, (0.1, 0.2))
    with pytest.raises(ValueError, match="alpha is 1.01"):
        alpha_of_viditq(1.01)
