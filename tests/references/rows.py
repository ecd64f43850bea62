"""The row-quantising ops in NumPy's float64, from their formulas; codes are held to them."""

import numpy as np
from scipy import linalg


def rotate(x, rotation):
    """x @ blockdiag(H)/sqrt(B), H by SciPy."""
    if rotation is None:
        return x
    h = linalg.hadamard(rotation) / np.sqrt(rotation)
    return (x.reshape(-1, rotation) @ h).reshape(x.shape)


def modulate(x, shift, scale, eps=1e-6):
    """AdaLN: (1 + scale) * LayerNorm(x) + shift, no affine parameters."""
    normalised = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return (1 + scale[:, None]) * normalised + shift[:, None]


def gelu(x):
    """The tanh form."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def assert_quantised(found, exact, bits, error):
    """Codes, scales and sums stand for `exact` (float64[..., k]), known to `error` times its peak.

    A code may differ from the exact quotient's nearest integer only where that lies within
    `qmax * error` of a tie (twice: value and scale). Returns the share of codes that do.
    """
    codes, scale, sums = map(np.asarray, found)
    assert (codes.dtype, scale.dtype, sums.dtype) == (np.int8, np.float32, np.int32)
    assert scale.shape == sums.shape == (*exact.shape[:-1], 1) and codes.shape == exact.shape
    np.testing.assert_array_equal(sums, codes.sum(-1, keepdims=True, dtype=np.int64))
    qmax = 2 ** (bits - 1) - 1
    exact_scale = np.abs(exact).max(-1, keepdims=True) / qmax
    error = error + 2.0**-22  # and float32's roundings of scale, inverse and quotient
    np.testing.assert_allclose(scale, exact_scale, rtol=error)
    quotient = exact / exact_scale
    assert np.abs(codes).max() <= qmax
    assert np.abs(codes - quotient).max() <= 0.5 + 2 * qmax * error
    return np.mean(codes != np.rint(quotient))
