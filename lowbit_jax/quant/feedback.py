"""GPTQ: rounding column by column, each one making up for the errors of those before it.

For inputs with second moments H = E[x^T x] the error of a product is tr(E H E^T), E = W' - W. With
H = (I + U) D (I + U)^T, U strictly upper triangular and D diagonal, that is the sum over columns j
of D_j times the square of E_j + sum_{i < j} E_i U_ij, so column j is best rounded from

    w_j - sum_{i < j} (w'_i - w_i) U_ij.

That is LDLQ (Chee et al. 2023, QuIP, eq. 3), which their theorem 6 shows to be GPTQ (Frantar et al.
2022) without the inverse of H. Rows do not meet, so a matrix may be rounded some rows at a time.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from lowbit_jax.quant.qtensor import spread, transform_rows

BLOCK = 128  # columns whose errors reach the later ones in one product
DAMPING = 0.01  # of the mean of the diagonal, added to it: GPTQ's


def factor(
    gram: Float[Array, "k k"], mask: Float32[Array, "k"] | None, rotation: int | None
) -> Float32[Array, "k k"]:
    """U of the second moments of masked and rotated inputs.

    Args:
        gram: X^T X of the inputs as they are, by any factor.
        mask: of the inputs, see `QTensor`.
        rotation: likewise.
    """
    moments = transform_rows(jnp.asarray(gram, jnp.float32), mask, rotation)
    moments = transform_rows(moments.T, mask, rotation)
    diagonal = jnp.diagonal(moments)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1.0)  # no input at all: nothing to make up for
    moments = (moments + moments.T) / (2 * mean) + DAMPING * jnp.eye(len(moments))
    # of the matrix with rows and columns reversed: the factor must be upper triangular
    upper = jnp.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    return jnp.triu(upper / jnp.diagonal(upper), 1)


def round_with_feedback(
    weight: Float[Array, "n k"],
    upper: Float32[Array, "k k"],
    scale: Float32[Array, "r g"],
    zero: Int8[Array, "r g"] | None,
    *,
    group: int,
    low: int,
    high: int,
) -> Int8[Array, "n k"]:
    """Codes on a grid that is given, `w ~ scale * (codes - zero)`.

    Args:
        weight: masked and rotated as its inputs are.
        upper: see `factor`.
        scale: of each group, or one of each row, or one in all.
        zero: zero points, likewise; None for 0.
        group: inputs that share a scale.
        low: smallest code.
        high: largest.
    """
    n, k = weight.shape
    blocks = -(-k // BLOCK)
    more = blocks * BLOCK - k
    full = lambda part: jnp.broadcast_to(spread(part, group, k).astype(jnp.float32), (n, k))  # noqa: E731
    wide = lambda part, value=0.0: jnp.pad(part, ((0, 0), (0, more)), constant_values=value)  # noqa: E731
    weight, scales = wide(weight.astype(jnp.float32)), wide(full(scale), 1.0)
    zeros = jnp.zeros_like(weight) if zero is None else wide(full(zero))
    upper = jnp.pad(upper, ((0, more), (0, more)))

    def do_block(b, state):
        codes, errors = state
        columns = lambda part: lax.dynamic_slice_in_dim(part, b * BLOCK, BLOCK, 1)  # noqa: E731
        beyond = columns(upper)
        inside = lax.dynamic_slice_in_dim(beyond, b * BLOCK, BLOCK, 0)
        before = jnp.dot(errors, beyond, precision=lax.Precision.HIGHEST)
        here = columns(weight), columns(scales), columns(zeros)

        def do_column(j, made):
            codes, errors = made
            column = lambda part: lax.dynamic_index_in_dim(part, j, 1, keepdims=False)  # noqa: E731
            w, s, z = (column(part) for part in here)
            aim = w - column(before) - jnp.sum(errors * column(inside), axis=1)
            code = jnp.clip(jnp.round(aim / s) + z, low, high)
            return codes.at[:, j].set(code), errors.at[:, j].set(s * (code - z) - w)

        empty = jnp.zeros((n, BLOCK))
        made = lax.fori_loop(0, BLOCK, do_column, (empty, empty))
        put = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, b * BLOCK, 1)  # noqa: E731
        return put(codes, made[0]), put(errors, made[1])

    empty = jnp.zeros_like(weight)
    codes, _ = lax.fori_loop(0, blocks, do_block, (empty, empty))
    return codes[:, :k].astype(jnp.int8)
