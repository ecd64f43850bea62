"""`linear` with something before the product and something after it, and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.layers import AdaLN, Gelu
from lowbit_jax.ops import linear
from lowbit_jax.quant import Rule, WeightSpec
from lowbit_jax.quant.transform import quantize_kernel
from tests.references import rows as exactly

B, T, K, N = 2, 5, 192, 24
SPECS = {
    "float": None,
    "w8a8": ("int8", "absmax", "channel", 8),
    "w4a8-asymmetric": ("int4", "minmax", 64, 8),
    "w4a16": ("int4", "minmax", 128, None),
    "ternary-a16": ("ternary", "least_squares", "channel", None),
    "ternary-a8": ("ternary", "least_squares", "channel", 8),
}
EVERY = pytest.mark.parametrize("name", SPECS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def kernel_of(name):
    """(kernel, the float64 matrix (k, n) it stands for, act_bits)."""
    w = normal(K, N, seed=9) / K**0.5
    if SPECS[name] is None:
        return jnp.asarray(w), w.astype(float), None
    format, quantizer, granularity, act_bits = SPECS[name]
    weights = WeightSpec(format=format, quantizer=quantizer, granularity=granularity)
    kernel = quantize_kernel(jnp.asarray(w), Rule(match=".*", weights=weights, act_bits=act_bits))
    return kernel, np.asarray(kernel.dequantize(), float).T, act_bits


def rounded(x, bits):
    """float64 rows as their codes stand for them."""
    if bits is None:
        return x
    step = np.abs(x).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(x / step) * step


BEFORE = {
    "adaln": (
        lambda: AdaLN(*(jnp.asarray(normal(B, K, seed=s)) for s in (1, 2)), eps=1e-5),
        lambda x: exactly.modulate(x, *(normal(B, K, seed=s).astype(float) for s in (1, 2)), 1e-5),
    ),
    "gelu": (Gelu, exactly.gelu),
    "nothing": (lambda: None, lambda x: x),
}


@EVERY
@pytest.mark.parametrize("kind", BEFORE)
def test_before_gate_and_residual_equal_float64(name, kind):
    """A code at a tie of float32 and float64 may differ by one step of its row: 1 % of the sum."""
    kernel, w, act_bits = kernel_of(name)
    before, exact_before = BEFORE[kind][0](), BEFORE[kind][1]
    x, bias, gate, residual = normal(B, T, K), normal(N), normal(B, N, seed=3), normal(B, T, N)
    call = jax.jit(lambda *a: linear(*a[:3], before=before, gate=a[3], residual=a[4]))
    found = np.asarray(call(x, kernel, bias, gate, residual), float)
    rows = rounded(exact_before(x.astype(float)), act_bits)
    exact = residual + gate.astype(float)[:, None] * (rows @ w + bias)
    steps = 0 if act_bits is None else np.abs(rows).max() / (2 ** (act_bits - 1) - 1)
    tolerance = 1e-4 + 2 * steps * np.abs(w).max() * np.abs(gate).max()
    np.testing.assert_allclose(found, exact, atol=tolerance)
    assert np.abs(found - exact).mean() < 1e-4  # and ties are rare


@EVERY
def test_gate_alone_and_residual_alone(name):
    kernel, _, _ = kernel_of(name)
    x, gate, residual = normal(B, T, K), normal(B, N, seed=3), normal(B, T, N)
    plain = linear(x, kernel)
    np.testing.assert_allclose(linear(x, kernel, gate=gate), gate[:, None] * plain, rtol=1e-5)
    np.testing.assert_allclose(linear(x, kernel, residual=residual), residual + plain, atol=1e-5)


@EVERY
@pytest.mark.parametrize("kind", BEFORE)
def test_gradient_is_that_of_the_weights_it_stands_for(name, kind):
    """Straight through the rounding of the input: autodiff of the float product, in float64."""
    kernel, w, _ = kernel_of(name)
    before = BEFORE[kind][0]()
    x, gate, residual = normal(B, T, K), normal(B, N, seed=3), normal(B, T, N)
    weight = normal(B, T, N, seed=8)

    def loss(x, gate, residual):
        y = linear(x, kernel, before=before, gate=gate, residual=residual)
        return jnp.sum(weight * y)

    def exact(x, gate, residual):
        y = (x if before is None else before(x)) @ jnp.asarray(w, jnp.float32)
        return jnp.sum(weight * (residual + gate[:, None] * y))

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(x, gate, residual)
    for ours, theirs in zip(found, jax.grad(exact, (0, 1, 2))(x, gate, residual), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", [name for name in SPECS if name != "float"])
def test_scales_have_gradients(name):
    """By finite differences of float64: y is linear in every scale."""
    kernel, _, act_bits = kernel_of(name)
    x = normal(1, 1, K)

    def loss(scale):
        return jnp.sum(linear(x, dataclasses.replace(kernel, scale=scale)))

    found = np.asarray(jax.grad(loss)(kernel.scale), float)
    codes = np.asarray(dataclasses.replace(kernel, scale=jnp.ones_like(kernel.scale)).dequantize())
    products = codes.astype(float) * x[0, 0]
    groups = kernel.scale.shape[1]
    exact = products.reshape(N, groups, -1).sum(axis=-1) if K % groups == 0 else None
    if K % kernel.group:  # 192 in groups of 128: 128 and 64
        exact = np.stack([products[:, :128].sum(1), products[:, 128:].sum(1)], axis=1)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())
    assert act_bits is None or np.isfinite(found).all()


def test_codes_and_inputs_keep_their_shapes_under_vmap():
    """Stacked weights: what a scan over layers does."""
    kernel, _, _ = kernel_of("ternary-a8")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), kernel)
    x = normal(B, T, K)
    both = jax.vmap(lambda kernel: linear(x, kernel, before=Gelu()))(stacked)
    np.testing.assert_allclose(both[1], linear(x, kernel, before=Gelu()), rtol=1e-5)
