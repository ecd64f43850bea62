"""GPTQ as published (Frantar et al. 2022, algorithm 1 with blocks of one column), in NumPy float64.

With the inverse Hessian's Cholesky factor, as there, and not in the library's form.
"""

from __future__ import annotations

import numpy as np


def damped(gram, damping):
    """The Hessian with `damping` of the mean diagonal added to the diagonal."""
    return gram + damping * np.diag(gram).mean() * np.eye(len(gram))


def gptq(w, gram, scale, zero, low, high, *, damping=0.01, act_order=False):
    """Codes (n, k) of w on the grid scale * (code - zero); scale and zero are (n, k)."""
    hessian = damped(gram, damping)
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
    w, scale, zero = (np.array(x, np.float64)[:, order] for x in (w, scale, zero))
    factor = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    codes = np.zeros(w.shape)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / scale[:, j]) + zero[:, j], low, high)
        rest = (w[:, j] - scale[:, j] * (codes[:, j] - zero[:, j])) / factor[j, j]
        w[:, j:] -= np.outer(rest, factor[j, j:])
    restored = np.zeros_like(codes)
    restored[:, order] = codes
    return restored


def error(w, approximation, gram):
    """Squared error of the product, by row: (w - a) H (w - a)^T."""
    lost = np.asarray(w, np.float64) - np.asarray(approximation, np.float64)
    return np.einsum("ni,ij,nj->n", lost, gram, lost)


def best_scale(w, codes, gram):
    """argmin_a (w - a codes) H (w - a codes)^T of each row; 1 for a row of zeros."""
    codes = np.asarray(codes, np.float64)
    over = np.einsum("ni,ij,nj->n", codes, gram, codes)
    with np.errstate(invalid="ignore"):
        scale = np.einsum("ni,ij,nj->n", codes, gram, np.asarray(w, np.float64)) / over
    return np.where(over == 0, 1.0, scale)
