"""The metrics against scipy, formulas spelled out, and cases whose answer is known."""

import numpy as np
import pytest
from scipy import linalg

from lowbit_jax.evaluation import metrics

RNG = np.random.default_rng(0)


def test_psnr_of_a_known_error_and_of_none():
    a = RNG.random((3, 8, 8, 3))
    b = a.copy()
    b[1] += 0.1
    found = metrics.psnr(a, b)
    assert np.isinf(found[[0, 2]]).all()
    np.testing.assert_allclose(found[1], 20.0)


def test_ssim_of_equal_and_of_unlike_pictures():
    a = RNG.random((2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(metrics.ssim(a, a), 1, atol=1e-5)
    assert (metrics.ssim(a, 1 - a) < 0.1).all()


def test_perceptual_distance_is_its_formula():
    """Summed place by place; a scaled feature has the same direction, an opposite one is at 4."""
    a = [RNG.standard_normal((2, 3, 4, 5)), RNG.standard_normal((2, 2, 2, 7))]
    b = [RNG.standard_normal(x.shape) for x in a]
    expected = np.zeros(2)
    for x, y in zip(a, b, strict=True):
        for i in np.ndindex(x.shape[:3]):
            u, v = x[i] / np.linalg.norm(x[i]), y[i] / np.linalg.norm(y[i])
            expected[i[0]] += np.sum((u - v) ** 2) / (x.shape[1] * x.shape[2])
    np.testing.assert_allclose(metrics.perceptual(a, b), expected, rtol=1e-8)
    np.testing.assert_allclose(metrics.perceptual(a, [3 * x for x in a]), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.perceptual(a, [-x for x in a]), 8, rtol=1e-6)
    zeros = [np.zeros_like(x) for x in a]
    assert np.isfinite(metrics.perceptual(zeros, zeros)).all()


def test_frechet_distance_equals_scipys_matrix_root():
    """On all axes, where the formula is the textbook's."""
    a, b = RNG.standard_normal((200, 6)) @ RNG.standard_normal((6, 6)), RNG.random((150, 6))
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(c1 @ c2).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)
    np.testing.assert_allclose(metrics.frechet(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.frechet(b, b), 0, atol=1e-9)


def test_frechet_distance_takes_the_references_main_axes():
    """A difference off the axes that the references vary in is not seen, along them it is."""
    b = np.concatenate([RNG.standard_normal((100, 2)), 1e-3 * RNG.standard_normal((100, 8))], 1)
    aside, along = b.copy(), b.copy()
    aside[:, 9] += 5
    along[:, 0] += 5
    assert metrics.frechet(aside, b, axes=2) < 1e-2
    np.testing.assert_allclose(metrics.frechet(along, b, axes=2), 25, rtol=1e-3)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    sets = [RNG.standard_normal((40, 5)) for _ in range(200)]
    same = [metrics.kernel_distance(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 10
    a, b = RNG.standard_normal((4, 3)), RNG.standard_normal((5, 3))
    k = lambda x, y: (np.dot(x, y) / 3 + 1) ** 3  # noqa: E731
    expected = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    expected += np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    expected -= 2 * np.mean([k(x, y) for x in a for y in b])
    np.testing.assert_allclose(metrics.kernel_distance(a, b), expected, rtol=1e-9)
    assert metrics.kernel_distance(sets[0] + 1, sets[1]) > max(same)


def test_intervals_cover_and_pairs_are_narrower():
    """Of 200 samples of a known mean about 95 % cover it (binomial, 4 deviations)."""
    draws = RNG.exponential(1.0, (200, 60))
    covered = sum(i.low <= 1 <= i.high for i in map(metrics.mean_interval, draws))
    assert 175 <= covered <= 200
    a = RNG.random(60)
    b = a + 0.01 + 0.001 * RNG.standard_normal(60)
    found = metrics.difference_interval(b, a)
    assert found.low > 0.009 and found.high < 0.011
    one = metrics.mean_interval(a)
    assert one.high - one.low > 20 * (found.high - found.low)


def test_what_cannot_be_measured_is_refused():
    a = RNG.random((10, 4))
    with pytest.raises(ValueError, match="features of 4 and of 3"):
        metrics.frechet(a, a[:, :3])
    with pytest.raises(ValueError, match="4 pictures for 4 axes"):
        metrics.frechet(a, a[:4])
    with pytest.raises(ValueError, match="two of each"):
        metrics.kernel_distance(a, a[:1])
    with pytest.raises(ValueError, match="not pairs"):
        metrics.difference_interval(a[:, 0], a[:3, 0])
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_interval(np.zeros(0))
