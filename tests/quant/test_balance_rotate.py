"""`balance` and `rotate`: exact identities on floating trees; quantised after, they equal NumPy."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import ops
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.models.layers import AdaLN, Gelu
from lowbit_jax.quant import (
    Balance,
    Recipe,
    Rule,
    WeightSpec,
    balance,
    dequantize,
    hadamard,
    quantize,
    rotate,
)
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, tree_bytes
from lowbit_jax.quant.recipe import RecipeError
from tests.references import rows as exactly

INT8 = WeightSpec(format="int8", quantizer="absmax")
INT4 = WeightSpec(format="int4", quantizer="minmax", granularity=128)
B, T, N = 2, 3, 12
WIDTHS = (192, 1152, 3072, 4608, 12288, 15360)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tree(k=192, layers=3):
    """A stack with a linear, and one beside it; a few rows of the kernels are outliers."""
    kernel = normal(layers, k, N, seed=2) / k**0.5
    kernel[:, ::17] *= 20
    beside = normal(k, N, seed=3) / k**0.5
    return {"blocks": {"0": {"fc": {"kernel": kernel}}}, "head": {"kernel": beside}}


def statistics(params, seed=5):
    """What `quantize` reads of calibration: absmax (h, r, k) of every layer, and a check."""
    k = params["head"]["kernel"].shape[0]
    paths = [f"blocks/{i}/fc" for i in range(3)] + ["head"]
    rng = np.random.default_rng(seed)
    absmax = {path: np.exp(rng.normal(0, 1.5, (2, 3, k))).astype(np.float32) for path in paths}
    layers = {path: SimpleNamespace(absmax=values) for path, values in absmax.items()}
    ranges = TimestepRanges((0, 250, 500, 1000))
    return SimpleNamespace(layers=layers, ranges=ranges, check=lambda params: None)


def layers(params):
    """{layer path: kernel} with stacks taken apart."""
    found = {"head": params["head"]["kernel"]}
    for first, segment in params["blocks"].items():
        kernel = segment["fc"]["kernel"]
        for i in range(jax.tree.leaves(kernel)[0].shape[0]):
            found[f"blocks/{int(first) + i}/fc"] = jax.tree.map(lambda leaf, i=i: leaf[i], kernel)
    return found


def oracle(path, kernel, stats, alpha, rotation, seed):
    """(mask, the kernel's transpose after the transforms), float64, from the formulas."""
    kernel = kernel.astype(float)
    mask = np.ones(len(kernel))
    if alpha is not None:
        absmax = stats.layers[path].absmax.astype(float).max((0, 1))
        mask = np.abs(kernel).max(1) ** (1 - alpha) / absmax**alpha
    if rotation is not None:
        mask = mask * hadamard.signs(seed, path, len(kernel))
    weight = (kernel / mask[:, None]).T
    if rotation is not None:
        weight = weight @ matrix(len(kernel), rotation)
    return mask, weight


def matrix(k, rotation):
    block = np.ones((1, 1))
    for part in hadamard.factors(rotation):
        block = np.kron(block, hadamard.hadamard(part).astype(float))
    return np.kron(np.eye(k // rotation), block / rotation**0.5)


BEFORE = {
    "adaln": (
        lambda k: AdaLN(*(jnp.asarray(normal(B, k, seed=s)) for s in (1, 2))),
        lambda x: exactly.modulate(
            x, *(normal(B, x.shape[-1], seed=s).astype(float) for s in (1, 2)), 1e-6
        ),
    ),
    "gelu": (lambda k: Gelu(), exactly.gelu),
    "nothing": (lambda k: None, lambda x: x),
}


@pytest.mark.parametrize(
    ("kind", "k"), [("adaln", 192), ("gelu", 192), *(("nothing", k) for k in WIDTHS)]
)
def test_float_products_do_not_change(kind, k):
    """1e-5 of the largest output, for every width named; mask and signs are the formulas'."""
    params = tree(k, layers=1)
    stats = statistics(params)
    done = balance(params, stats, match=".*", alpha=0.3)
    done = rotate(done, match="blocks/.*", rotation="full", seed=7)
    x = normal(B, T, k)
    before, exact = BEFORE[kind][0](k), BEFORE[kind][1]
    for path, kernel in layers(done).items():
        assert isinstance(kernel, TransformedKernel)
        original = layers(params)[path]
        rotation = k if path != "head" else None
        mask, weight = oracle(path, original, stats, 0.3, rotation if k < 3072 else None, 7)
        if k < 3072 or rotation is None:  # the dense matrix of more is too large for a test
            np.testing.assert_allclose(kernel.mask, mask, rtol=1e-5)
            np.testing.assert_allclose(kernel.kernel.T, weight, atol=1e-5 * np.abs(weight).max())
        assert kernel.rotation == rotation
        expected = exact(x.astype(float)) @ original.astype(float)
        found = jax.jit(ops.linear)(x, kernel, before=before)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(kernel.restore(), original, atol=1e-5 * np.abs(original).max())


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    ("kind", "alpha", "rotation"),
    [
        ("nothing", 0.4, None),
        ("nothing", None, 64),
        ("adaln", 0.4, 64),
        ("adaln", None, 192),
        ("gelu", 0.4, 192),
        ("gelu", 0.4, 64),
    ],
)
def test_quantised_products_equal_float64(kind, alpha, rotation, bits):
    """In one recipe: codes of the transformed weights, rows of the transformed inputs.

    A code at a tie of float32 and float64 may differ by one step, in few outputs.
    """
    params = tree()
    stats = statistics(params)
    rule = Rule(
        match=".*",
        weights=INT8 if bits else INT4,
        act_bits=bits,
        balance=None if alpha is None else Balance(alpha=alpha),
        rotation=rotation,
    )
    done = quantize(params, Recipe(name="test", rules=(rule,), seed=1), stats)
    x, gate, residual = normal(B, T, 192), normal(B, N, seed=3), normal(B, T, N)
    before, exact = BEFORE[kind][0](192), BEFORE[kind][1]
    for path, kernel in layers(done).items():
        assert isinstance(kernel, QTensor) and kernel.rotation == rotation
        mask, weight = oracle(path, layers(params)[path], stats, alpha, rotation, 1)
        np.testing.assert_allclose(kernel.mask, mask, rtol=1e-5)
        stored = np.asarray(kernel.dequantize_stored(), float)
        step = np.asarray(kernel.scale).max(axis=1, keepdims=True)
        assert (np.abs(stored - weight) <= 0.501 * step).all()
        rows = exact(x.astype(float)) * mask
        rows = rows if rotation is None else rows @ matrix(192, rotation)
        steps = 0
        if bits:
            scale = np.abs(rows).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
            rows, steps = np.rint(rows / scale) * scale, scale.max()
        expected = residual + gate.astype(float)[:, None] * (rows @ stored.T)
        found = jax.jit(ops.linear)(x, kernel, before=before, gate=gate, residual=residual)
        error = np.abs(np.asarray(found) - expected)
        size = np.abs(expected).max()
        assert (error <= 1e-5 * size + 2 * steps * np.abs(stored).max() * np.abs(gate).max()).all()
        assert error.mean() < 1e-4 * size


def test_one_by_one_is_what_one_recipe_does():
    params = tree()
    stats = statistics(params)
    rule = Rule(match=".*", weights=INT8, act_bits=8, balance=Balance(alpha=0.2), rotation=64)
    once = quantize(params, Recipe(name="test", rules=(rule,), seed=4), stats)
    steps = balance(params, stats, match=".*", alpha=0.2)
    steps = rotate(steps, match=".*", rotation=64, seed=4)
    plain = Rule(match=".*", weights=INT8, act_bits=8)
    steps = quantize(steps, Recipe(name="test", rules=(plain,)))
    assert jax.tree.structure(steps) == jax.tree.structure(once)
    for a, b in zip(jax.tree.leaves(steps), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, b, atol=1 if a.dtype == jnp.int8 else 1e-5 * np.abs(b).max())


def test_it_works_under_jit_and_as_a_plan():
    params = tree()
    stats = statistics(params)
    rules = (
        Rule(match="blocks/0/.*", weights=INT8, balance=Balance(alpha=0.2), rotation="auto"),
        Rule(match="blocks/.*", weights=None, rotation="full"),
        Rule(match="head", weights=None, balance=Balance(alpha=0.5)),
    )
    fn = partial(quantize, recipe=Recipe(name="test", rules=rules), statistics=stats)
    eager, jitted, plan = fn(params), jax.jit(fn)(params), jax.eval_shape(fn, params)
    assert sorted(eager["blocks"]) == ["0", "1"]
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(plan)
    assert tree_bytes(plan) == tree_bytes(eager)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_alpha_for_each_layer_does_not_cut_the_stack():
    params = tree()
    stats = statistics(params)
    rules = tuple(
        Rule(match=f"blocks/{i}/fc", weights=INT8, act_bits=8, balance=Balance(alpha=i / 2))
        for i in range(3)
    )
    done = quantize(params, Recipe(name="test", rules=rules), stats)
    assert list(done["blocks"]) == ["0"]
    for i in range(3):
        path = f"blocks/{i}/fc"
        mask, _ = oracle(path, layers(params)[path], stats, i / 2, None, 0)
        np.testing.assert_allclose(layers(done)[path].mask, mask, rtol=1e-5)


def test_dequantize_gives_the_kernel_for_inputs_as_they_are():
    params = tree()
    done = balance(params, statistics(params), match="blocks/.*", alpha=0.4)
    done = rotate(done, match="blocks/[12]/.*")
    done = quantize(done, Recipe(name="test", rules=(Rule(match="blocks/2/.*", weights=INT8),)))
    restored, original = layers(dequantize(done)), layers(params)
    for path, kernel in original.items():
        exact = path != "blocks/2/fc"
        size = np.linalg.norm(kernel)
        error = np.linalg.norm(restored[path] - kernel)
        assert error < (1e-5 if exact else 0.02) * size
        assert exact or error > 1e-4 * size


def test_gradients_are_those_of_the_kernel_it_stands_for():
    params = tree()
    rule = Rule(match=".*", weights=INT8, act_bits=8, balance=Balance(alpha=0.4), rotation=64)
    done = quantize(params, Recipe(name="test", rules=(rule,)), statistics(params))
    kernel = layers(done)["head"]
    x, weight, before = normal(B, T, 192), normal(B, T, N, seed=8), BEFORE["adaln"][0](192)

    def loss(x, kernel):
        return jnp.sum(weight * ops.linear(x, kernel, before=before))

    found = jax.jit(jax.grad(loss))(x, kernel)
    expected = jax.grad(loss)(x, kernel.dequantize().T)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    floating = rotate(balance(params, statistics(params), match="head"), match="head")
    dx, dkernel = jax.jit(jax.grad(loss, (0, 1)))(x, layers(floating)["head"])
    expected, slope = jax.grad(loss, (0, 1))(x, params["head"]["kernel"])
    np.testing.assert_allclose(dx, expected, atol=1e-4 * np.abs(expected).max())
    mask = layers(floating)["head"].mask
    turned = hadamard.rotate((slope * mask[:, None]).T, 64).T
    np.testing.assert_allclose(dkernel.kernel, turned, atol=1e-4 * np.abs(turned).max())


def test_what_is_refused():
    params = tree()
    stats = statistics(params)
    needs = Recipe(name="b", rules=(Rule(match=".*", weights=INT8, balance=Balance(alpha=0.1)),))
    with pytest.raises(
        RecipeError, match="'b' needs statistics .* of 4 layers, such as blocks/0/fc"
    ):
        quantize(params, needs)
    turned = rotate(params, match="head")
    with pytest.raises(ValueError, match="rule 'head' balances or rotates a kernel that is"):
        rotate(turned, match="head")
    with pytest.raises(ValueError, match="rule 'head' balances or rotates a kernel that is"):
        balance(turned, stats, match="head")
    with pytest.raises(ValueError, match=r"rotation 'full' of 100 channels: .* 20, 4, 2"):
        rotate({"head": {"kernel": normal(100, 4)}}, match="head", rotation="full")
    bad = tree()
    bad["head"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or inf in head"):
        rotate(bad, match=".*")


@pytest.mark.parametrize("alpha", [None, 0.4])
def test_static_scales_equal_float64(alpha):
    """One scale of all rows, of the largest value in the statistics; the rest is clipped."""
    params = tree()
    stats = statistics(params)
    chosen = None if alpha is None else Balance(alpha=alpha)
    rule = Rule(match=".*", weights=INT8, act_bits=8, balance=chosen, act_static=True)
    done = quantize(params, Recipe(name="test", rules=(rule,)), stats)
    assert list(done["blocks"]) == ["0"]
    x = normal(B, T, 192) * 3
    x[0, 0] = 0
    x[1, 1, 3] = 1e4
    for path, kernel in layers(done).items():
        mask, _ = oracle(path, layers(params)[path], stats, alpha, None, 0)
        scale = (stats.layers[path].absmax.max((0, 1)) * mask).max() / 127
        np.testing.assert_allclose(kernel.act_scale, scale, rtol=1e-5)
        rows = np.clip(np.rint(exactly.gelu(x.astype(float)) * mask / scale), -127, 127) * scale
        stored = np.asarray(kernel.dequantize_stored(), float)
        expected = rows @ stored.T
        error = np.abs(np.asarray(jax.jit(ops.linear)(x, kernel, before=Gelu())) - expected)
        assert (error <= 1e-5 * np.abs(expected).max() + 1.01 * scale * np.abs(stored).max()).all()
        assert error.mean() < 1e-4 * np.abs(expected).max()
        x[0, 1, 0] = np.nan
        bad = np.isfinite(ops.linear(x, kernel)).all(-1)
        np.testing.assert_array_equal(bad, [[True, False, True], [True, True, True]])
        x[0, 1, 0] = 0
