"""Layers of a stack one by one: equal to a Python loop, differentiable, and never copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models.layers import BlockStack, Linear
from lowbit_jax.models.scan import scan_layers
from lowbit_jax.quant.qtensor import QTensor


def some(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def mixed_stack(layers=3, width=8):
    """Leaves of several dtypes, in a tree with a QTensor and a None in it."""
    codes = np.random.default_rng(1).integers(-127, 128, (layers, width, width), np.int8)
    scale = some(layers, width, 1, seed=2, dtype=jnp.float32) / 500
    weight = QTensor(jnp.asarray(codes), scale, None, "int8", (width, width), width)
    bias = some(layers, width, seed=4, dtype=jnp.float32)
    return {
        "narrow": some(layers, width, width, seed=3),
        "wide": {"bias": bias},
        "quantised": weight,
    }


def step(x, layer):
    """No two layers commute."""
    y = jnp.dot(x, layer["narrow"].astype(jnp.float32)) + layer["wide"]["bias"]
    return jnp.tanh(y) @ layer["quantised"].dequantize().T, None


def looped(x, stack):
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
        x, _ = step(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
    return x


def test_scan_equals_a_loop():
    """1e-6: the same operations, fused otherwise. Special values keep their bits."""
    x, stack = some(2, 8, dtype=jnp.float32), mixed_stack()
    for run in (scan_layers, jax.jit(scan_layers, static_argnums=0)):
        np.testing.assert_allclose(run(step, x, stack)[0], looped(x, stack), rtol=1e-5, atol=1e-6)
    special = jnp.asarray([[0.0, -0.0, jnp.inf, jnp.nan, 2.0**-133, -1.5]], jnp.bfloat16)
    keep = lambda _, layer: (layer, None)  # noqa: E731
    out = jax.jit(lambda s: scan_layers(keep, jnp.zeros(6, jnp.bfloat16), s)[0])(special)
    assert out.tobytes() == special[0].tobytes()


def test_what_layers_give_beside_is_stacked():
    stack = mixed_stack()
    beside = lambda x, layer: (x, layer["narrow"].astype(jnp.float32).sum())  # noqa: E731
    _, out = scan_layers(beside, jnp.zeros(2), stack)
    sums = stack["narrow"].astype(jnp.float32).reshape(len(stack["narrow"]), -1).sum(1)
    assert stack["narrow"].dtype == jnp.bfloat16
    np.testing.assert_allclose(out, sums, rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_reach_every_leaf(remat):
    """Those of the loop; 1e-2 of the largest, as gradients of bfloat16 leaves are rounded."""
    x, stack = some(2, 8, dtype=jnp.float32), mixed_stack()
    one = jax.checkpoint(step) if remat else step

    def loss(run, floats):
        return jnp.sum(jnp.square(run(stack | floats)))

    floats = {key: stack[key] for key in ("narrow", "wide")}
    scanned = jax.jit(jax.grad(lambda f: loss(lambda s: scan_layers(one, x, s)[0], f)))(floats)
    expected = jax.grad(lambda f: loss(lambda s: looped(x, s), f))(floats)
    for got, want in zip(jax.tree.leaves(scanned), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype and np.abs(want.astype(np.float32)).max() > 0
        scale = float(jnp.abs(want.astype(jnp.float32)).max())
        difference = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
        assert float(difference.max()) < 1e-2 * scale


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, gain):
        return (x + gain * nn.silu(Linear(8, dtype=jnp.bfloat16, name="lin")(x)),)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_a_block_stack_in_bfloat16(remat):
    """Against the blocks one after another; 5e-2 of the largest: bfloat16 throughout."""
    params = {"0": {"lin": {"kernel": some(3, 8, 8), "bias": some(3, 8, seed=1)}}}
    x, gain = some(4, 8, seed=2), jnp.bfloat16(0.5)

    def stacked(params):
        stack = BlockStack(lambda layer: Step(parent=None), 3, remat=remat)
        return stack.apply({"params": params}, (x,), gain)[0]

    def one_by_one(params):
        carry = (x,)
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["0"])
            carry = Step().apply({"params": layer}, *carry, gain)
        return carry[0]

    def gradients(run):
        loss = lambda params: jnp.sum(run(params).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for got, want in zip(gradients(stacked), gradients(one_by_one), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.abs(got - want).max() < 5e-2 * np.abs(want).max()


def test_a_stack_is_not_copied():
    """Sixteen layers of 128 KB: room for one and its float32 form, not for the stack's 2 MB."""
    stack = jax.ShapeDtypeStruct((16, 256, 256), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    product = lambda x, w: (jnp.dot(x, w), None)  # noqa: E731
    compiled = jax.jit(lambda x, s: scan_layers(product, x, s)[0]).lower(x, stack).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend tells no sizes")
    assert memory.temp_size_in_bytes < 4 * 256 * 256 * 2
