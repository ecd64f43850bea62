"""The kernel in interpret mode: its int32 sums equal NumPy's over unpacked weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packing, reference
from pallas_kernels.ternary_matmul import choose_tile, ternary_matmul
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
    w = rng.integers(-1, 2, (n, k)).astype(np.int8)
    scales = rng.uniform(1e-3, 1, (m, 1)), rng.uniform(1e-3, 1, n)
    return x, w, *(scale.astype(np.float32) for scale in scales)


def packed(w):
    """The layout spelled out byte by byte; every code behind the last is 3."""
    n, k = w.shape
    out = np.full((n, packing.packed_size(k, 2)), 255, np.uint8)
    for i in range(k):
        byte, shift = i // 128 * 32 + i % 32, i % 128 // 32 * 2
        out[:, byte] &= 255 - (3 << shift)
        out[:, byte] |= (w[:, i] + 1).astype(np.uint8) << shift
    return out


def sums(x, w):
    return x.astype(np.int64) @ w.astype(np.int64).T


def kernel(x, w, *args, **options):
    return ternary_matmul(*map(jnp.asarray, (x, packed(w), *args)), interpret=True, **options)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_numpy_and_reference(m, n, k):
    x, w, x_scale, w_scale = operands(m, n, k, seed=m + n + k)
    y = kernel(x, w, x_scale, w_scale)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, sums(x, w).astype(np.float32) * x_scale * w_scale)
    ones = np.ones_like(x_scale), np.ones_like(w_scale)
    np.testing.assert_array_equal(kernel(x, w, *ones), reference.matmul_int32(x, w))


def test_reads_what_packing_writes():
    x, w, x_scale, w_scale = operands(3, 5, 200)
    codes = packing.pack(jnp.asarray((w + 1).astype(np.uint8)), 2)
    y = ternary_matmul(*map(jnp.asarray, (x, codes, x_scale, w_scale)), interpret=True)
    np.testing.assert_array_equal(y, kernel(x, w, x_scale, w_scale))


@pytest.mark.parametrize(("a", "b"), [(-128, -1), (-128, 1), (127, 1), (127, 0)])
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
    # three roundings to float32 of values below 2^14, and one to the result's dtype
    np.testing.assert_allclose(y.astype(float), exact, rtol=jnp.finfo(dtype).eps, atol=4e-3)


def test_a_non_finite_scale_is_not_hidden():
    x, w, x_scale, w_scale = operands(2, 3, 64)
    x_scale[0], x[0] = np.nan, 0
    y = kernel(x, w, x_scale, w_scale)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_another_tile():
    x, w, x_scale, w_scale = operands(33, 40, 129)
    y = kernel(x, w, x_scale, w_scale, tile=Tile(16, 32, 128, 4, 2))
    np.testing.assert_array_equal(y, sums(x, w).astype(np.float32) * x_scale * w_scale)


def test_few_rows_take_a_small_tile():
    tiles = [choose_tile(m) for m in (1, 16, 17, 64, 65, 4608)]
    assert [tile.m for tile in tiles] == [16, 16, 64, 64, 128, 128]


GOOD = dict(
    x=np.zeros((2, 64), np.int8),
    w=np.zeros((3, 32), np.uint8),
    x_scale=np.ones((2, 1), np.float32),
    w_scale=np.ones(3, np.float32),
    bias=np.ones(3, np.float32),
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": np.zeros((2, 64), np.uint8)}, "x must be int8, got uint8"),
        ({"w": np.zeros((3, 32), np.int8)}, "w must be uint8, got int8"),
        ({"w": np.zeros((3, 16), np.uint8)}, "64 ternary codes take 32 bytes, w has 16"),
        ({"x": np.zeros((2, 129), np.int8)}, "129 ternary codes take 64 bytes, w has 32"),
        ({"x_scale": np.ones((1, 2), np.float32)}, r"shape \(2, 1\), got \(1, 2\)"),
        ({"w_scale": np.ones((3, 1), np.float32)}, r"shape \(3\), got \(3, 1\)"),
        ({"tile": Tile(16, 32, 64, 4, 2)}, "tile.k must be 128, got 64"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        ternary_matmul(**{**GOOD, **wrong}, interpret=True)


def test_an_empty_operand_is_refused():
    wrong = {"w": np.zeros((0, 32), np.uint8), "w_scale": np.ones(0, np.float32), "bias": None}
    with pytest.raises(NotImplementedError, match=r"\(0, 32\)"):
        ternary_matmul(**{**GOOD, **wrong}, interpret=True)


@pytest.mark.parametrize("m", (1, 50, 256, 4608))
def test_lowers_for_cuda(lower_for_cuda, m):
    spec = jax.ShapeDtypeStruct
    for k in (1152, 3072, 12288, 15360):
        for n in (1152, 3072, 12288, 15360):
            scales = spec((m, 1), jnp.float32), spec((n,), jnp.float32)
            codes = spec((m, k), jnp.int8), spec((n, packing.packed_size(k, 2)), jnp.uint8)
            lower_for_cuda(ternary_matmul, *codes, *scales)


def test_tails_bias_and_bfloat16_lower_for_cuda(lower_for_cuda):
    def f(*args):
        return ternary_matmul(*args, out_dtype=jnp.bfloat16)

    spec = jax.ShapeDtypeStruct
    scales = [spec((130, 1), jnp.float32), spec((257,), jnp.float32), spec((257,), jnp.bfloat16)]
    lower_for_cuda(f, spec((130, 129), jnp.int8), spec((257, 64), jnp.uint8), *scales)
