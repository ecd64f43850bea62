"""`linear` of every format against float64 NumPy that knows the codes before they are packed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.ops import linear, logical_shape
from lowbit_jax.quant.qtensor import QTensor
from pallas_kernels.formats import FORMATS, pack_codes

N, K = 24, 300  # k ends in the middle of a block of 128, and of a group of 64
LINEAR = jax.jit(linear)


class Case(NamedTuple):
    kernel: QTensor
    exact: np.ndarray  # float64 (n, k): scale * (codes - zero)


def case(format, granularity, asymmetric=False, act_bits=None, n=N, k=K, seed=0) -> Case:
    """Random codes over the whole range of a format; scales within a factor of ten."""
    rng = np.random.default_rng(seed)
    spec = FORMATS[format]
    group = granularity if isinstance(granularity, int) else k
    shape = (1, 1) if granularity == "tensor" else (n, -(-k // group))
    codes = rng.integers(spec.low, spec.high, (n, k), np.int8, endpoint=True)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    zero = rng.integers(spec.low, spec.high, shape, np.int8, endpoint=True) if asymmetric else None
    per_input = lambda values: values[:, np.arange(k) // group].astype(float)  # noqa: E731
    exact = per_input(scale) * (codes - (per_input(zero) if asymmetric else 0))
    packed = pack_codes(jnp.asarray(codes), format)
    kernel = QTensor(packed, scale, zero, format, (n, k), group, act_bits)
    return Case(kernel, np.broadcast_to(exact, (n, k)))


def activations(*lead, k=K, seed=1):
    """Rows of very different sizes, as the tokens of a diffusion transformer are."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*lead, k), np.float32) * rng.lognormal(0, 2, (*lead, 1)).astype("f")


def quantized_rows(x, bits):
    """x as the integers stand for it, float64; written apart from the library's `quantize_rows`."""
    qmax = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / qmax)
    scale[scale == 0] = 1
    return np.rint(x * (np.float32(1) / scale)).astype(float) * scale.astype(float)


def bound(x, w, per_term):
    """What roundings of relative size `per_term` in every product and sum can amount to."""
    return per_term * (np.abs(x) @ np.abs(w).T) + 1e-30


FORMS = [
    (format, granularity, asymmetric)
    for format in FORMATS
    for granularity in ("channel", "tensor", 64, 512)
    for asymmetric in ((False, True) if format != "ternary" else (False,))
]


@pytest.mark.parametrize("act_bits", (8, 4))
@pytest.mark.parametrize(("format", "granularity", "asymmetric"), FORMS)
def test_integer_product_equals_float64(format, granularity, asymmetric, act_bits):
    """Sums of codes are exact; 1e-6 is for the few float32 products and group sums after them."""
    kernel, w = case(format, granularity, asymmetric, act_bits)
    x, bias = activations(7), activations(k=N, seed=2)
    x[3] = 0
    row = quantized_rows(x, act_bits)
    out = np.asarray(LINEAR(x, kernel, bias), float)
    assert (np.abs(out - (row @ w.T + bias)) <= bound(row, w, 1e-6) + 1e-7 * np.abs(bias)).all()
    np.testing.assert_array_equal(out[3], bias)


@pytest.mark.parametrize(("format", "granularity", "asymmetric"), FORMS)
def test_weight_only_product_equals_float64(format, granularity, asymmetric):
    """float32 sums of 300 terms: at most 300 roundings of 2^-24 each, in any order."""
    kernel, w = case(format, granularity, asymmetric)
    x = activations(7)
    out = np.asarray(LINEAR(x, kernel), float)
    assert (np.abs(out - x.astype(float) @ w.T) <= bound(x, w, K * 2.0**-24)).all()


@pytest.mark.parametrize(("format", "granularity", "asymmetric"), FORMS)
def test_bfloat16_activations_round_only_the_result(format, granularity, asymmetric):
    """2^-8 of the result. Codes are exact in bfloat16; weights scaled per group are rounded too."""
    kernel, w = case(format, granularity, asymmetric)
    x = jnp.asarray(activations(7), jnp.bfloat16)
    out = LINEAR(x, kernel)
    assert out.dtype == jnp.bfloat16
    x = np.asarray(x, float)
    expected = x @ w.T
    per_term = K * 2.0**-24 + (2.0**-8 if kernel.scale.shape[-1] > 1 else 0)
    error = np.abs(np.asarray(out, float) - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1.01 * bound(x, w, per_term)).all()


@pytest.mark.parametrize("act_bits", (None, 8, 4))
@pytest.mark.parametrize("granularity", ("channel", 64))
def test_products_of_small_integers_are_equal(granularity, act_bits):
    """Every scale a power of two and every row one of integers: nothing may round at all."""
    kernel, w = case("int4", granularity, True, act_bits)
    scale = 2.0 ** np.random.default_rng(5).integers(-3, 4, kernel.scale.shape).astype(np.float32)
    group = kernel.group
    w = np.rint(w / np.repeat(kernel.scale, group, axis=1)[:, :K])
    w = w * np.repeat(scale, group, axis=1)[:, :K]
    kernel = QTensor(kernel.codes, scale, kernel.zero, kernel.format, kernel.shape, group, act_bits)
    qmax = 7 if act_bits == 4 else 127
    x = np.random.default_rng(6).integers(-qmax, qmax, (5, K), endpoint=True).astype(np.float32)
    x[:, 0] = qmax  # so that the scale of a row is 1 (times the rounding of 1 / qmax)
    if act_bits:  # peak * f32(1 / qmax) is 1 exactly for both sizes
        assert (np.float32(qmax) * np.float32(1 / qmax)) == 1
    np.testing.assert_array_equal(LINEAR(x, kernel), x.astype(float) @ w.T)


@pytest.mark.parametrize("lead", [(), (1,), (2, 1), (3, 1, 2), (0, 4)])
@pytest.mark.parametrize("granularity", (None, "channel", 64))
@pytest.mark.parametrize("act_bits", (None, 8))
def test_leading_axes(granularity, act_bits, lead):
    """Any leading axes, one row, no row at all: each row as if it were alone."""
    if granularity is None:
        kernel = activations(K, k=N)
    else:
        kernel = case("int8", granularity, act_bits=act_bits).kernel
    x = activations(*lead)
    out = linear(x, kernel)
    assert out.shape == (*lead, N)
    assert out.dtype == jnp.float32
    alone = [linear(row[None], kernel)[0] for row in x.reshape(-1, K)]
    expected = np.reshape(alone, out.shape)
    np.testing.assert_allclose(
        out, expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max(initial=0)
    )


@pytest.mark.parametrize("bad", (np.nan, np.inf))
@pytest.mark.parametrize("granularity", (None, "channel", 64))
@pytest.mark.parametrize("act_bits", (None, 8))
def test_a_bad_row_shows_in_its_own_outputs_only(granularity, act_bits, bad):
    if granularity is None:
        kernel = activations(K, k=N)
    else:
        kernel = case("int4", granularity, True, act_bits).kernel
    x = activations(4)
    clean = np.asarray(LINEAR(x, kernel))
    x[2, 17] = bad
    out = np.asarray(LINEAR(x, kernel))
    hit = np.isfinite(out[2])
    if act_bits or np.isnan(bad):
        assert not hit.any()
    else:  # an inf times a weight that is 0 is NaN, times any other inf
        assert not hit[np.asarray(dense(kernel))[17] != 0].any()
    np.testing.assert_array_equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def dense(kernel):
    return kernel.dequantize().T if isinstance(kernel, QTensor) else kernel


def test_float_kernel_equals_numpy_and_is_summed_in_float32():
    x, kernel, bias = activations(2, 5), activations(K, k=N, seed=3), activations(k=N)
    out = np.asarray(LINEAR(x, kernel, bias), float)
    expected = x.astype(float) @ kernel + bias
    flat = x.reshape(-1, K)
    error = np.abs(out - expected).reshape(-1, N) - 1e-7 * np.abs(bias)
    assert (error <= bound(flat, kernel.T, K * 2.0**-24)).all()
    low = [jnp.asarray(a, jnp.bfloat16) for a in (np.ones((1, 4096)), np.ones((4096, 1)))]
    assert float(LINEAR(*low)[0, 0]) == 4096  # bfloat16 sums would stop at 256


@pytest.mark.parametrize(
    "kernel", [np.ones((5, 3), np.float32), case("int8", "channel", n=3, k=5)[0]]
)
def test_a_wrong_number_of_features_is_named(kernel):
    assert logical_shape(kernel) == (5, 3)
    with pytest.raises(ValueError, match="x has 4 features, the kernel takes 5"):
        linear(np.ones((2, 4), np.float32), kernel)


@pytest.mark.parametrize("lead", [(6,), (2, 3), (2, 1, 3)])
def test_gradients_of_the_float_path_equal_autodiff_of_dot(lead):
    """float32; 1e-5 of the largest: sums over other axes in another order."""
    x, kernel, bias = activations(*lead, k=40), activations(40, k=9, seed=3), activations(k=9)

    def loss(product):
        return lambda *args: jnp.sum(jnp.sin(0.1 * product(*args)))

    expected = jax.grad(loss(lambda x, w, b: jnp.dot(x, w) + b), (0, 1, 2))(x, kernel, bias)
    found = jax.jit(jax.grad(loss(linear), (0, 1, 2)))(x, kernel, bias)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_gradients_in_bfloat16_reach_float32_parameters():
    """1 %: the incoming gradient is rounded to bfloat16 (2^-9), sums are float32."""
    x, kernel = activations(2, 3, k=40), activations(40, k=9, seed=3)
    g = activations(2, 3, k=9, seed=4)

    def loss(kernel):
        out = linear(jnp.asarray(x, jnp.bfloat16), kernel)
        return jnp.sum(out.astype(jnp.float32) * g)

    grad = jax.grad(loss)(jnp.asarray(kernel))
    assert grad.dtype == jnp.float32
    expected = np.einsum("abk,abn->kn", x, g)
    np.testing.assert_allclose(grad, expected, rtol=0, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("granularity", ("tensor", "channel", 64))
@pytest.mark.parametrize("act_bits", (None, 8))
def test_under_vmap_each_layer_meets_its_own_kernel(granularity, act_bits):
    kernels = [case("ternary", granularity, act_bits=act_bits, seed=i).kernel for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
    x = activations(3, 4)
    out = jax.jit(jax.vmap(linear))(x, stacked)
    for i, kernel in enumerate(kernels):
        alone = np.asarray(LINEAR(x[i], kernel))
        np.testing.assert_allclose(out[i], alone, rtol=0, atol=1e-5 * np.abs(alone).max())
