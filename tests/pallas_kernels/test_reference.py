"""The integer products' own proof: exact against NumPy's int64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, reference
from pallas_kernels.rows import QuantizedRows


def integers(*shape, low=-128, high=127, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape, np.int8, endpoint=True)


def exact(x, w):
    return x.astype(np.int64) @ w.astype(np.int64).T


@pytest.mark.parametrize(
    "matmul", (reference.matmul_int32, reference.matmul_bf16, reference.matmul_codes)
)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 7, 300), (5, 3, 129), (reference.FEW_ROWS, 4, 9), (260, 5, 1000)],
)
def test_integer_products_are_exact(matmul, m, n, k):
    """1000 * 128 * 128 < 2^24: every partial sum is exact in float32, in any order."""
    x, w = integers(m, k, low=-127), integers(n, k, seed=1)
    w[0], x[0] = -128, 127  # the largest sum there is
    out = jax.jit(matmul)(x, w)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out, np.int64), exact(x, w))


def test_int32_products_stay_exact_above_2_to_24():
    """Sums of 2^26 that float32 can hold only because they are multiples of 8."""
    x, w = np.full((1, 4096), 127, np.int8), np.full((1, 4096), 127, np.int8)
    w[0, 0], x[0, 0] = 1, 121  # an odd number of units on the way
    total = int(exact(x, w)[0, 0])
    assert total > 2**24
    out = reference.matmul_int32(x, w)
    assert float(out[0, 0]) == float(np.float32(total))
    wide = float(reference.matmul_bf16(x, w)[0, 0])
    assert abs(wide - total) <= 4096 * 2.0**-24 * total  # rounded, but to float32's precision


@pytest.mark.parametrize(("k", "group"), [(256, 64), (300, 128), (7, 3), (5, 8)])
def test_grouped_products_apply_each_scale_to_its_own_inputs(k, group):
    """Scales are powers of two: equality, whatever the order of the groups. Tails included."""
    groups = -(-k // group)
    x, w = integers(4, k, low=-127), integers(6, k, seed=1)
    scale = 2.0 ** np.random.default_rng(2).integers(-3, 4, (6, groups)).astype(np.float32)
    expected = np.zeros((4, 6))
    for i in range(k):
        expected += np.outer(x[:, i].astype(float), w[:, i] * scale[:, i // group])
    ones, sums = jnp.ones((4, 1), jnp.float32), jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32)
    rows = QuantizedRows(jnp.asarray(x), ones, sums)
    out = api.matmul(rows, w, scale, format="int8", group=group, implementation="xla")
    np.testing.assert_array_equal(out, expected)
