"""Channel balancing: masks that move the difficulty of quantising between activations and weights.

A mask m multiplies the channels of an activation and divides the rows of the kernel it meets,
`(x * m) @ (kernel / m[:, None])`, which is the same product. SmoothQuant (Xiao et al. 2023, eq. 4)
writes it by its inverse s = 1 / m:

    s = absmax(x)^alpha / absmax(kernel rows)^(1 - alpha)

**alpha is SmoothQuant's everywhere here**: 1 makes all channels of the activation equally large, 0
all rows of the kernel. ViDiT-Q v1 has the same alpha; v2 writes
m = absmax(kernel)^a / absmax(x)^(1 - a), so that its a is 1 - alpha: see `alpha_of_viditq`.

NumPy in float64, masks in float32: k numbers per layer, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32


def alpha_of_viditq(a: float) -> float:
    """SmoothQuant's alpha of ViDiT-Q v2's: its 0.99 is 0.01.

    Raises:
        ValueError: not in [0, 1].
    """
    return 1.0 - _checked_alpha(a)


def channel_mask(
    absmax: Float[np.ndarray, "k"], kernel: Float[np.ndarray, "k n"], alpha: float
) -> Float32[np.ndarray, "k"]:
    """SmoothQuant's mask, m = absmax(kernel)^(1 - alpha) / absmax(x)^alpha.

    A channel that was always zero, or whose weights all are, gets 1: it balances nothing, and its
    formula has no value. (The published codes take a floor of 1e-5 in v1, and infinity in v2.)

    Args:
        absmax: of each channel of the activation, such as `over_runs` of its statistics.
        kernel: the weights it meets.
        alpha: in [0, 1], see above.

    Raises:
        ValueError: sizes that differ; NaN, infinity or a negative absmax; alpha out of range; a
            mask that float32 cannot hold.
    """
    alpha = _checked_alpha(alpha)
    most, rows = np.asarray(absmax, np.float64), np.abs(np.asarray(kernel, np.float64))
    if most.ndim != 1 or rows.ndim != 2 or len(most) != len(rows):
        raise ValueError(
            f"absmax has shape {most.shape}, the kernel {rows.shape}: (k,) and (k, n) are needed"
        )
    if not (np.isfinite(most).all() and np.isfinite(rows).all() and (most >= 0).all()):
        raise ValueError("absmax or the kernel holds NaN or infinity, or absmax is negative")
    weights = rows.max(axis=1, initial=0.0)
    used = (most > 0) & (weights > 0)
    mask = np.ones(len(most), np.float32)
    with np.errstate(over="ignore", under="ignore"):  # looked for below
        mask[used] = weights[used] ** (1 - alpha) / most[used] ** alpha
    tiny, huge = np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max
    wrong = np.flatnonzero(~((mask >= tiny) & (mask <= huge)))
    if wrong.size:
        c = int(wrong[0])
        raise ValueError(
            f"channel {c}: absmax {most[c]:g} and weights of {weights[c]:g} at alpha {alpha:g} "
            "make a mask beyond float32"
        )
    return mask


def range_masks(
    absmax: Float[np.ndarray, "r k"], kernel: Float[np.ndarray, "k n"], alphas: Sequence[float]
) -> Float32[np.ndarray, "r k"]:
    """ViDiT-Q v1's timestep-aware masks: one `channel_mask`, with an alpha, for each range.

    v1 takes a moving average of the absmax over its calibration batches, `over_halves` the largest.

    Args:
        absmax: of each channel in each timestep range, such as `over_halves` of statistics.
        kernel: the weights.
        alphas: one for each range.

    Raises:
        ValueError: another number of alphas than ranges; see `channel_mask`.
    """
    if len(alphas) != len(absmax):
        raise ValueError(f"{len(alphas)} alphas for {len(absmax)} timestep ranges")
    pairs = zip(absmax, alphas, strict=True)
    return np.stack([channel_mask(most, kernel, alpha) for most, alpha in pairs])


def over_halves(absmax: Float[np.ndarray, "h r k"]) -> Float[np.ndarray, "r k"]:
    """The largest of both halves of guidance, range by range."""
    return np.asarray(absmax).max(axis=0)


def over_runs(absmax: Float[np.ndarray, "h r k"]) -> Float[np.ndarray, "k"]:
    """The largest of all halves and ranges: ViDiT-Q v2's, one mask for all timesteps."""
    return np.asarray(absmax).max(axis=(0, 1))


def _checked_alpha(alpha: float) -> float:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, it lies in 0 to 1")
    return float(alpha)
