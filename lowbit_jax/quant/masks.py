"""Channel balancing: masks that move the difficulty of quantising between activations and weights.

A mask m multiplies the channels of an activation and divides the rows of the kernel it meets,
`(x * m) @ (kernel / m[:, None])`, which is the same product. SmoothQuant (Xiao et al. 2023, eq. 4)
writes it by its inverse s = 1 / m:

    s = absmax(x)^alpha / absmax(kernel rows)^(1 - alpha)

**alpha is SmoothQuant's everywhere here**: 1 makes all channels of the activation equally large, 0
all rows of the kernel. ViDiT-Q v1 has the same alpha; v2 writes
m = absmax(kernel)^a / absmax(x)^(1 - a), so that its a is 1 - alpha: see `alpha_of_viditq`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

SMALLEST, LARGEST = 2.0**-118, 2.0**118  # magnitudes below count as zero, above as the largest


def alpha_of_viditq(a: float) -> float:
    """SmoothQuant's alpha of ViDiT-Q v2's: its 0.99 is 0.01.

    Raises:
        ValueError: not in [0, 1].
    """
    return 1.0 - checked_alpha(a)


def channel_mask(
    absmax: Float[Array | np.ndarray, "k"],
    weights: Float[Array | np.ndarray, "k"],
    alpha: float | Float32[Array, ""],
) -> Float32[Array, "k"]:
    """SmoothQuant's mask, m = absmax(kernel)^(1 - alpha) / absmax(x)^alpha.

    A channel that was always zero, or whose weights all are (below 2^-118), gets 1: it balances
    nothing, and its formula has no value. (The published codes take a floor of 1e-5 in v1, and
    infinity in v2.) Pure: works under `jit`; NaN or a kernel that holds one gets 1.

    Args:
        absmax: of each channel of the activation, such as `over_runs` of its statistics.
        weights: the largest magnitude of each row of the kernel it meets.
        alpha: in [0, 1], see above.

    Raises:
        ValueError: sizes that differ; alpha out of range, where it is a number.
    """
    if isinstance(alpha, int | float):
        alpha = checked_alpha(alpha)
    most, rows = jnp.asarray(absmax, jnp.float32), jnp.asarray(weights, jnp.float32)
    if most.ndim != 1 or most.shape != rows.shape:
        raise ValueError(f"absmax has shape {most.shape}, the weights' {rows.shape}: both are (k,)")
    used = (most >= SMALLEST) & (rows >= SMALLEST)
    most, rows = (jnp.clip(values, SMALLEST, LARGEST) for values in (most, rows))
    return jnp.where(used, rows ** (1 - alpha) / most**alpha, 1.0)


def range_masks(
    absmax: Float[Array | np.ndarray, "r k"],
    weights: Float[Array | np.ndarray, "k"],
    alphas: Sequence[float],
) -> Float32[Array, "r k"]:
    """ViDiT-Q v1's timestep-aware masks: one `channel_mask`, with an alpha, for each range.

    v1 takes a moving average of the absmax over its calibration batches, `over_halves` the largest.

    Args:
        absmax: of each channel in each timestep range, such as `over_halves` of statistics.
        weights: see `channel_mask`.
        alphas: one for each range.

    Raises:
        ValueError: another number of alphas than ranges; see `channel_mask`.
    """
    if len(alphas) != len(absmax):
        raise ValueError(f"{len(alphas)} alphas for {len(absmax)} timestep ranges")
    pairs = zip(absmax, alphas, strict=True)
    return jnp.stack([channel_mask(most, weights, alpha) for most, alpha in pairs])


def over_halves(absmax: Float[Array | np.ndarray, "h r k"]) -> Float[Array | np.ndarray, "r k"]:
    """The largest of both halves of guidance, range by range."""
    return absmax.max(axis=0)


def over_runs(absmax: Float[Array | np.ndarray, "h r k"]) -> Float[Array | np.ndarray, "k"]:
    """The largest of all halves and ranges: ViDiT-Q v2's, one mask for all timesteps."""
    return absmax.max(axis=(0, 1))


def checked_alpha(alpha: float) -> float:
    """A number in [0, 1].

    Raises:
        ValueError: it is none.
    """
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}, it lies in 0 to 1")
    return float(alpha)
