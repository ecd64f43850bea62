"""Error feedback (GPTQ, LDLQ): what rounding one input's weights loses, the later inputs make up.

With H = X^T X of a linear's inputs, the codes shall make the error of the product small,

    (w - q) H (w - q)^T,    q = scale * (codes - zero),

and not that of the weights. H = (I + F) D (I + F)^T, F strictly upper triangular, D diagonal, turns
it into a sum over inputs of D_j * ((w - q)_j + sum_{i < j} (w - q)_i F_ij)^2: rounding input after
input, each to the grid's point nearest to w_j + sum_{i < j} (w - q)_i F_ij, is greedy in it.

This is GPTQ (Frantar et al. 2022, algorithm 1) in the form of LDLQ (Chee et al. 2023, QuIP,
theorem 6, which proves them equal): codes are the same, but one Cholesky factor replaces GPTQ's
inverse and its factor, so that float32 loses fewer digits. Of H only its directions matter, not
whether rows are summed or averaged.

Matrices are (n, k) outside, as in `quant.quantizers`; inside (k, n), so that an input is a row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from lowbit_jax.quant.quantizers import Codes


class Grid(NamedTuple):
    """Points a weight can be rounded to: scale * (code - zero), low <= code <= high.

    Attributes:
        scale: as a quantiser gives it; (1, 1) for one in all.
        zero: integer zero points shaped like it; None for 0.
        group: inputs that share a scale, k for per-channel and per-tensor ones. Static.
        low: smallest code. Static.
        high: largest code. Static.
    """

    scale: Float[Array, "n g"]
    zero: Int8[Array, "n g"] | None
    group: int
    low: int
    high: int


class Factor(NamedTuple):
    """What is used of a Hessian: the same for every linear that sees the same input.

    Attributes:
        order: the inputs in the order they are rounded in.
        feedback: F of the damped H in that order.
        gram: the damped H in that order.
    """

    order: Int[Array, "k"]
    feedback: Float[Array, "k k"]
    gram: Float[Array, "k k"]


def factorize(
    gram: Float[Array, "k k"], *, damping: float = 0.01, act_order: bool = False
) -> Factor:
    """Prepare H = X^T X, once for all linears that see X.

    `damping` times the mean of the diagonal is added to it; to an H of zeros, 1. An input that was
    always zero has no other input's error to make up, and leaves none: it is rounded to nearest.
    `act_order` rounds inputs with a large diagonal first, while the most inputs are left to make
    up for them.

    Three k x k matrices are alive at the peak, of float32 unless `gram` is wider: 2.83 GB for
    k = 15360, FLUX.1-dev's largest. What is not positive definite gives NaN.
    """
    gram = gram.astype(jnp.promote_types(gram.dtype, jnp.float32))
    diagonal = jnp.diagonal(gram)
    mean = jnp.mean(diagonal)
    diagonal = diagonal + jnp.where(mean == 0, 1, damping * mean)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(len(diagonal))
    gram = jnp.fill_diagonal(gram, diagonal, inplace=False)[order][:, order]
    # of the matrix turned by 180 degrees, whose lower factor is an upper one of this
    upper = lax.linalg.cholesky(gram[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return Factor(order, jnp.triu(upper / jnp.diagonal(upper), 1), gram)


def round_to(
    w: Float[Array, "n k"], factor: Factor, grid: Grid, *, block: int = 128
) -> tuple[Int8[Array, "n k"], Float[Array, "n"]]:
    """Codes of w on a given grid, with error feedback, and the error (w - q) H (w - q)^T of rows.

    What a block of inputs loses goes to later blocks in one product; within it, input by input.
    Beside w, three matrices of its size are alive. NaN in `factor` shows in the errors.
    """
    dtype = factor.gram.dtype
    k, n = w.shape[::-1]
    block = min(block, k)
    columns = _Columns.of(grid, factor.order, dtype)
    weights = w.T.astype(dtype)[factor.order]
    short = -k % block
    padded = jnp.pad(weights, ((0, short), (0, 0)))
    feedback = jnp.pad(factor.feedback, ((0, short), (0, short)))

    def round_block(b, state):
        codes, errors = state
        start = b * block
        rows = lax.dynamic_slice_in_dim(feedback, start, block, 1)
        target = lax.dynamic_slice_in_dim(padded, start, block) + _dot(rows.T, errors)
        inner = lax.dynamic_slice_in_dim(rows, start, block)

        def round_input(j, state):
            found, lost = state
            wanted = target[j] + _dot(inner[:, j], lost)
            code, value = columns.nearest(jnp.minimum(start + j, k - 1), wanted)
            original = lax.dynamic_index_in_dim(padded, start + j, keepdims=False)
            return found.at[j].set(code), lost.at[j].set(original - value)

        empty = jnp.zeros((block, n), jnp.int8), jnp.zeros((block, n), dtype)
        found, lost = lax.fori_loop(0, block, round_input, empty)
        return (
            lax.dynamic_update_slice_in_dim(codes, found, start, 0),
            lax.dynamic_update_slice_in_dim(errors, lost, start, 0),
        )

    state = jnp.zeros(padded.shape, jnp.int8), jnp.zeros(padded.shape, dtype)
    codes, errors = lax.fori_loop(0, (k + short) // block, round_block, state)
    return _restore(codes[:k], factor.order).T, _energy(errors[:k], factor.gram)


def refit_scale(
    w: Float[Array, "n k"],
    codes: Int8[Array, "n k"],
    factor: Factor,
    norm: Literal["gram", "plain"] = "gram",
) -> Float[Array, "n 1"]:
    """The least-squares scale of each row for given symmetric codes, in the norm of H or plain.

    <codes, w> / <codes, codes>, with <a, b> = a H b^T or a b^T. A row of zeros gets 1.
    """
    dtype = factor.gram.dtype
    q, wide = (x.T.astype(dtype)[factor.order] for x in (codes, w))
    weighted = _dot(factor.gram, q) if norm == "gram" else q
    over = jnp.sum(weighted * q, axis=0)
    scale = jnp.sum(weighted * wide, axis=0) / jnp.where(over == 0, 1, over)
    return jnp.where(over == 0, 1, scale)[:, None]


def fit(
    w: Float[Array, "n k"],
    factor: Factor,
    start: Codes,
    *,
    refits: int = 3,
    norm: Literal["gram", "plain"] = "gram",
    levels: tuple[int, int] = (-1, 1),
    block: int = 128,
) -> Codes:
    """Codes with error feedback on a grid with a scale per row, and the exact scale for them.

    Rounds on the grid of `start`, refits the scale to the codes found, rounds on that grid, and so
    on; of every pair of codes and re-fitted scale, each row keeps the best in the norm of H. So the
    result is never worse there than `start`'s own codes would be with their best scale.

    Args:
        w: weights.
        factor: of its inputs.
        start: what a quantiser gives for w on that grid, one scale per row.
        refits: rounds, at least 1.
        norm: of the re-fit.
        levels: the smallest and the largest code; ternary ones by default.
        block: see `round_to`.
    """
    if start[1].shape != (len(w), 1):
        raise ValueError(f"one scale per row is needed, {len(w)} in all, got {start[1].shape}")
    if refits < 1:
        raise ValueError(f"refits must be at least 1, got {refits}")
    grid = Grid(start[1].astype(factor.gram.dtype), None, w.shape[1], *levels)
    codes = start[0]
    scale = refit_scale(w, codes, factor, norm)
    best = codes, scale, _error(w, codes, scale, factor)

    def once(_, state):
        scale, best = state
        codes, _ = round_to(w, factor, grid._replace(scale=scale), block=block)
        fitted = refit_scale(w, codes, factor, norm)
        error = _error(w, codes, fitted, factor)
        better = ~(error >= best[2])  # NaN too: damage shall show
        kept = (
            jnp.where(better[:, None], codes, best[0]),
            jnp.where(better[:, None], fitted, best[1]),
            jnp.where(better, error, best[2]),
        )
        return fitted, kept

    _, (codes, scale, error) = lax.fori_loop(0, refits, once, (grid.scale, best))
    scale = jnp.where(jnp.isfinite(error)[:, None], scale, jnp.nan)
    return codes, scale.astype(jnp.float32), None


class _Columns(NamedTuple):
    """A grid by input, in the order of rounding."""

    scale: Array
    zero: Array
    group_of: Array
    low: int
    high: int

    @staticmethod
    def of(grid: Grid, order: Array, dtype) -> _Columns:
        scale = grid.scale.T.astype(dtype)
        zero = jnp.zeros_like(scale) if grid.zero is None else grid.zero.T.astype(dtype)
        group_of = order // grid.group if len(scale) > 1 else jnp.zeros_like(order)
        return _Columns(scale, zero, group_of, grid.low, grid.high)

    def nearest(self, j, wanted: Array) -> tuple[Array, Array]:
        scale, zero = self.scale[self.group_of[j]], self.zero[self.group_of[j]]
        code = jnp.clip(jnp.round(wanted / scale) + zero, self.low, self.high)
        return code.astype(jnp.int8), scale * (code - zero)


def _error(w: Array, codes: Array, scale: Array, factor: Factor) -> Array:
    lost = w.astype(scale.dtype) - scale * codes.astype(scale.dtype)
    return _energy(lost.T[factor.order], factor.gram)


def _energy(lost: Array, gram: Array) -> Array:
    return jnp.sum(lost * _dot(gram, lost), axis=0)


def _restore(rows: Array, order: Array) -> Array:
    return jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
