"""Inputs of a layer drawn from its statistics, for whoever measures errors of its output."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

if TYPE_CHECKING:  # calibration knows quantised trees
    from lowbit_jax.calibration.statistics import LayerStatistics

ROWS = 128


def typical_rows(
    layer: LayerStatistics, path: str, count: int = ROWS
) -> Float32[np.ndarray, "t k"]:
    """Inputs of a layer, drawn from its statistics; the same ones for the same path.

    Rows take the halves and timestep ranges in turn, and are normal with the mean and the second
    moment of each channel there (all second moments, where the layer has X^T X). Nothing is larger
    than its absmax, and every channel has its absmax once.
    """
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    halves, ranges, k = layer.absmax.shape
    cells = np.arange(count) % (halves * ranges)
    flat = lambda values: values.reshape(-1, k)[cells].astype(np.float64)  # noqa: E731
    mean, squares, absmax = flat(layer.mean), flat(layer.second_moment), flat(layer.absmax)
    normal = rng.standard_normal((count, k))
    if layer.gram is None:
        x = mean + np.sqrt(np.maximum(squares - mean**2, 0)) * normal
    else:
        values, vectors = np.linalg.eigh(layer.gram / layer.count.sum())
        x = (normal * np.sqrt(np.maximum(values, 0))) @ vectors.T
    x = np.clip(x, -absmax, absmax)
    largest = np.argmax(layer.absmax.reshape(-1, k), axis=0)  # the cell of each channel's absmax
    repeats = np.maximum((count - largest + halves * ranges - 1) // (halves * ranges), 1)
    at = np.minimum(largest + halves * ranges * rng.integers(0, repeats), count - 1)
    sign = np.where(mean[at, np.arange(k)] < 0, -1, 1)
    x[at, np.arange(k)] = sign * layer.absmax.max(axis=(0, 1))
    return x.astype(np.float32)
