"""The kernel in interpret mode: its int32 sums equal NumPy's, its scaling IEEE's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.int8_matmul import choose_tile, int8_matmul
from pallas_kernels.tiles import Tile

# every pair of an m, an n and a k once, for the smallest and the largest tile
SHAPES = [
    *((1, 1, 64), (1, 5, 129), (1, 257, 1152)),
    *((3, 5, 64), (3, 257, 129), (3, 1, 1152)),
    *((130, 257, 64), (130, 1, 129), (130, 5, 1152)),
    (50, 70, 200),  # the tile in between
]


def operands(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    w = rng.integers(-128, 128, (n, k)).astype(np.int8)
    scales = rng.uniform(1e-3, 1, (m, 1)), rng.uniform(1e-3, 1, n)
    return x, w, *(scale.astype(np.float32) for scale in scales)


def sums(x, w):
    return x.astype(np.int64) @ w.astype(np.int64).T


def kernel(*args, **options):
    return int8_matmul(*map(jnp.asarray, args), interpret=True, **options)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_numpy_and_reference(m, n, k):
    x, w, x_scale, w_scale = operands(m, n, k, seed=m + n + k)
    y = kernel(x, w, x_scale, w_scale)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, sums(x, w).astype(np.float32) * x_scale * w_scale)
    ones = np.ones_like(x_scale), np.ones_like(w_scale)
    np.testing.assert_array_equal(kernel(x, w, *ones), reference.matmul_int32(x, w))


@pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, 127)])
def test_extreme_codes(a, b):
    m, n, k = 2, 3, 1152
    x, w = np.full((m, k), a, np.int8), np.full((n, k), b, np.int8)
    x[1] = 0
    y = kernel(x, w, np.ones((m, 1), np.float32), np.ones(n, np.float32))
    np.testing.assert_array_equal(y, [[a * b * k] * n, [0] * n])


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_bias_and_output_dtype(dtype):
    x, w, x_scale, w_scale = operands(3, 70, 96)
    bias = np.random.default_rng(1).standard_normal(70).astype(jnp.bfloat16)
    y = kernel(x, w, x_scale, w_scale, bias, out_dtype=dtype)
    assert y.dtype == dtype
    exact = sums(x, w) * x_scale.astype(float) * w_scale.astype(float) + bias.astype(float)
    # three roundings to float32 of values below 2^20, and one to the result's dtype
    np.testing.assert_allclose(y.astype(float), exact, rtol=jnp.finfo(dtype).eps, atol=0.25)


def test_a_non_finite_scale_is_not_hidden():
    x, w, x_scale, w_scale = operands(2, 3, 64)
    x_scale[0], x[0] = np.nan, 0
    y = kernel(x, w, x_scale, w_scale)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


@pytest.mark.parametrize("tile", [Tile(16, 32, 32, 4, 2), Tile(32, 16, 256, 4, 2)])
def test_any_tile(tile):
    x, w, x_scale, w_scale = operands(33, 40, 129)
    y = kernel(x, w, x_scale, w_scale, tile=tile)
    np.testing.assert_array_equal(y, sums(x, w).astype(np.float32) * x_scale * w_scale)


def test_few_rows_take_a_small_tile():
    tiles = [choose_tile(m) for m in (1, 16, 17, 64, 65, 4608)]
    assert [tile.m for tile in tiles] == [16, 16, 64, 64, 128, 128]


GOOD = dict(
    x=np.zeros((2, 64), np.int8),
    w=np.zeros((3, 64), np.int8),
    x_scale=np.ones((2, 1), np.float32),
    w_scale=np.ones(3, np.float32),
    bias=np.ones(3, np.float32),
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": np.zeros((2, 64), np.uint8)}, "x must be int8, got uint8"),
        ({"x": np.zeros((2, 1, 64), np.int8)}, r"x must have shape \(any, any\)"),
        ({"w": np.zeros((3, 64), np.int32)}, "w must be int8, got int32"),
        ({"w": np.zeros((3, 65), np.int8)}, "x has k = 64, w has k = 65"),
        ({"x_scale": np.ones(2, np.float32)}, r"x_scale must have shape \(2, 1\), got \(2,\)"),
        ({"w_scale": np.ones(4, np.float32)}, r"w_scale must have shape \(3\), got \(4,\)"),
        ({"w_scale": np.ones(3, np.float16)}, "w_scale must be float32, got float16"),
        ({"bias": np.ones(4, np.float32)}, r"bias must have shape \(3\), got \(4,\)"),
        ({"bias": np.ones(3, np.int32)}, "bias must be floating, got int32"),
        ({"out_dtype": jnp.int32}, "float32 or bfloat16, got int32"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        int8_matmul(**{**GOOD, **wrong}, interpret=True)


def test_an_empty_operand_is_refused():
    wrong = {"x": np.zeros((0, 64), np.int8), "x_scale": np.ones((0, 1), np.float32)}
    with pytest.raises(NotImplementedError, match=r"\(0, 64\)"):
        int8_matmul(**{**GOOD, **wrong}, interpret=True)


@pytest.mark.parametrize("m", (1, 50, 256, 4608))
def test_lowers_for_cuda(lower_for_cuda, m):
    spec = jax.ShapeDtypeStruct
    for k in (1152, 3072, 12288, 15360):
        for n in (1152, 3072, 12288, 15360):
            scales = spec((m, 1), jnp.float32), spec((n,), jnp.float32)
            codes = spec((m, k), jnp.int8), spec((n, k), jnp.int8)
            lower_for_cuda(int8_matmul, *codes, *scales)


def test_tails_bias_and_bfloat16_lower_for_cuda(lower_for_cuda):
    def f(*args):
        return int8_matmul(*args, out_dtype=jnp.bfloat16)

    spec = jax.ShapeDtypeStruct
    scales = [spec((130, 1), jnp.float32), spec((257,), jnp.float32), spec((257,), jnp.bfloat16)]
    lower_for_cuda(f, spec((130, 129), jnp.int8), spec((257, 129), jnp.int8), *scales)
