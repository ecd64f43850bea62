"""LoRA beside quantised kernels and merged into float ones, against products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import ops
from lowbit_jax.models.flux import FluxTransformer, abstract_params
from lowbit_jax.models.layers import AdaLN, Gelu
from lowbit_jax.quant.lora import LoraError, LoraKernel, LowRank, attach, detach, merge
from lowbit_jax.quant.recipe import RECIPES, Rule, WeightSpec
from lowbit_jax.quant.transform import dequantize, quantize, quantize_kernel, rotate
from tests.quant.test_transform_flux import SMALL

RNG = np.random.default_rng(0)
TERNARY = Rule(match=".*", weights=WeightSpec(format="ternary", quantizer="least_squares"))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def random_params():
    leaves, structure = jax.tree.flatten(abstract_params(SMALL, jnp.float32))
    return structure.unflatten([0.2 * normal(*leaf.shape) for leaf in leaves])


def update(k, n, rank):
    return LowRank(normal(k, rank), 0.1 * normal(rank, n))


def updates_of_flux():
    h = SMALL.hidden_size
    return {
        "double_blocks/1/img_attn/qkv": update(h, 3 * h, 3),
        "double_blocks/0/img_attn/qkv": update(h, 3 * h, 5),
        "single_blocks/2/linear2": update(5 * h, h, 2),
        "final_layer/linear": update(h, SMALL.in_channels, 1),
    }


def flux_inputs():
    return (
        normal(2, 6, SMALL.in_channels),
        normal(2, 5, SMALL.context_in_dim),
        np.array([0.3, 0.9], np.float32),
        normal(2, SMALL.vec_in_dim),
        np.zeros((6, 3), np.float32),
        np.zeros((5, 3), np.float32),
    )


@pytest.mark.parametrize("before", [None, "adaln", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_branch_adds_its_product_before_the_gate(before, gated, quantised):
    """residual + gate * (before(x) @ (base + down @ up) + bias) in float64, to 1e-5 of its size."""
    x, kernel, bias = normal(2, 3, 40), normal(40, 24), normal(24)
    gate, residual = (normal(2, 24), normal(2, 3, 24)) if gated else (None, None)
    low = update(40, 24, 4)
    first = {"adaln": AdaLN(normal(2, 40), normal(2, 40)), "gelu": Gelu(), None: None}[before]
    base = quantize_kernel(jnp.asarray(kernel), TERNARY) if quantised else kernel
    found = ops.linear(x, LoraKernel(base, *low), bias, before=first, gate=gate, residual=residual)
    rows = np.float64(x if first is None else first(x))
    weights = np.float64(base.dequantize().T if quantised else kernel)
    expected = rows @ (weights + np.float64(low.down) @ np.float64(low.up)) + bias
    if gated:
        expected = residual + gate[:, None] * expected
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_quantised_base_is_multiplied_as_without_the_branch():
    """Int8 activations: a branch of zeros changes not a bit, though the branch sees floats."""
    x, low = normal(3, 40), LowRank(np.zeros((40, 2), np.float32), normal(2, 24))
    rule = Rule(match=".*", weights=WeightSpec(format="int8", quantizer="absmax"), act_bits=8)
    base = quantize_kernel(jnp.asarray(normal(40, 24)), rule)
    np.testing.assert_array_equal(ops.linear(x, LoraKernel(base, *low)), ops.linear(x, base))


@pytest.mark.parametrize("recipe", ["float", "flux-1.58bit"])
def test_attached_branches_are_the_merged_model(recipe):
    """Layers without an update, and of another rank, share their segment; 1e-5 of the output."""
    params, updates = random_params(), updates_of_flux()
    base = quantize(params, RECIPES[recipe])
    attached = attach(base, updates, 0.5, dtype=jnp.float32)
    assert list(attached["double_blocks"]) == ["0"]
    model = FluxTransformer(SMALL)
    inputs = flux_inputs()
    found = model.apply({"params": attached}, *inputs)
    expected = model.apply({"params": merge(dequantize(base), updates, 0.5)}, *inputs)
    without = model.apply({"params": base}, *inputs)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
    assert float(jnp.abs(expected - without).max()) > 1e-2 * scale


def test_attaching_twice_adds_and_detaching_gives_back():
    params, updates = random_params(), updates_of_flux()
    once = attach(params, updates, 2.0, dtype=jnp.float32)
    twice = attach(attach(params, updates, 0.5, dtype=jnp.float32), updates, 1.5, dtype=jnp.float32)
    model, inputs = FluxTransformer(SMALL), flux_inputs()
    np.testing.assert_allclose(
        model.apply({"params": once}, *inputs), model.apply({"params": twice}, *inputs), atol=1e-4
    )
    assert jax.tree.structure(detach(twice)) == jax.tree.structure(params)
    for found, expected in zip(
        jax.tree.leaves(detach(twice)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_merging_equals_float64():
    params, updates = random_params(), updates_of_flux()
    merged = merge(params, updates, -0.7)
    for layer in (0, 1):
        down, up = updates[f"double_blocks/{layer}/img_attn/qkv"]
        before = np.float64(params["double_blocks"]["0"]["img_attn"]["qkv"]["kernel"][layer])
        found = merged["double_blocks"]["0"]["img_attn"]["qkv"]["kernel"][layer]
        np.testing.assert_allclose(found, before - 0.7 * np.float64(down) @ up, atol=1e-6)
    np.testing.assert_array_equal(
        merged["single_blocks"]["0"]["linear2"]["kernel"][0],
        params["single_blocks"]["0"]["linear2"]["kernel"][0],
    )


def test_gradients_reach_a_branch_of_quantised_weights():
    """Those of the float product with the weights that the codes stand for, in float64."""
    x, low = normal(3, 40), update(40, 24, 2)
    base = quantize_kernel(jnp.asarray(normal(40, 24)), TERNARY)
    ones = jnp.ones((3, 24))

    def total(down, up):
        return jnp.sum(ops.linear(x, LoraKernel(base, down, up)) * ones)

    down, up = jax.grad(total, argnums=(0, 1))(*map(jnp.asarray, low))
    np.testing.assert_allclose(down, x.T @ np.ones((3, 24)) @ low.up.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(up, low.down.T @ x.T @ np.ones((3, 24)), rtol=1e-4, atol=1e-4)


def test_updates_that_do_not_fit_are_all_named():
    updates = {
        "double_blocks/7/img_attn/qkv": update(32, 96, 2),
        "single_blocks/0/linear2": update(32, 32, 2),
    }
    for use in (attach, merge):
        with pytest.raises(LoraError) as error:
            use(random_params(), updates)
        assert "double_blocks/7/img_attn/qkv: the model has no such linear" in str(error.value)
        assert "linear2: the kernel is (160, 32), the update (32, 2) times (2, 32)" in str(
            error.value
        )


def test_merging_into_quantised_or_branched_kernels_is_refused():
    updates = updates_of_flux()
    quantised = quantize(random_params(), RECIPES["flux-1.58bit"])
    with pytest.raises(LoraError, match="double_blocks/0/img_attn/qkv.*quantise that, or attach"):
        merge(quantised, updates)
    branched = attach(random_params(), updates)
    with pytest.raises(LoraError, match="with a branch"):
        merge(branched, updates)
    with pytest.raises(ValueError, match="double_blocks/0/img_attn/qkv .*have a branch"):
        quantize(branched, RECIPES["w8a8"])


def test_a_branch_of_a_rotated_kernel_sees_the_input_as_it_is():
    """The product of the kernel before the rotation, and the branch's, in float64."""
    params = {"layer": {"kernel": jnp.asarray(normal(64, 24))}}
    low = update(64, 24, 3)
    rotated = attach(rotate(params, match="layer"), {"layer": low}, dtype=jnp.float32)
    x = normal(5, 64)
    expected = np.float64(x) @ (params["layer"]["kernel"] + np.float64(low.down) @ low.up)
    found = ops.linear(x, rotated["layer"]["kernel"])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
