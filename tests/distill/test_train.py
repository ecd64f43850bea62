"""Latent weights and the training loop, against optax by hand and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax import ops
from lowbit_jax.distill import latent, train
from lowbit_jax.distill.split import CODES, SCALES, split
from lowbit_jax.quant import quantizers
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import Recipe, Rule, WeightSpec
from lowbit_jax.quant.transform import quantize
from pallas_kernels.formats import pack_codes

RECIPE = Recipe(
    name="ternary",
    rules=(
        Rule(
            match="blocks/.*",
            weights=WeightSpec(format="ternary", quantizer="least_squares"),
            act_bits=8,
        ),
    ),
)


def tree(seed=0, layers=2):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    block = {"lin": {"kernel": normal(layers, 7, 5), "bias": normal(layers, 5)}}
    return {"blocks": {"0": block}, "head": {"kernel": normal(5, 3)}}


def kernel_of(params):
    return params["blocks"]["0"]["lin"]["kernel"]


def test_training_starts_from_the_quantised_model():
    """Codes and scales to the bit, whatever the codes are; latent weights near the float ones."""
    params, rng = tree(), np.random.default_rng(1)
    quantized = quantize(params, RECIPE)
    tensor = kernel_of(quantized)
    other = jnp.asarray(rng.integers(-1, 2, (2, 5, 7)), jnp.int8)  # as feedback may choose them
    quantized["blocks"]["0"]["lin"]["kernel"] = QTensor(
        codes=pack_codes(other, "ternary"),
        scale=tensor.scale,
        format="ternary",
        shape=(5, 7),
        group=7,
        act_bits=8,
    )
    started = latent.latents(params, quantized)
    back = latent.tensors(started)
    jax.tree.map(np.testing.assert_array_equal, back, quantized)
    value = kernel_of(latent.values(started))
    expected = np.swapaxes(np.asarray(tensor.scale) * np.asarray(other), 1, 2)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    moved = kernel_of(started).weight != kernel_of(params)
    wrong = np.swapaxes(np.asarray(tensor.unpacked()) != np.asarray(other), 1, 2)
    assert moved[wrong].all() and not moved.all()


def test_a_rotated_kernel_stays_rotated():
    """Training sees the product of the rotated tensor, and starts from its codes."""
    rng = np.random.default_rng(7)
    kernel = jnp.asarray(rng.standard_normal((2, 8, 5)), jnp.float32)
    params = {"blocks": {"0": {"lin": {"kernel": kernel}}}}
    rule = dataclasses.replace(RECIPE.rules[0], rotation="full", act_bits=None)
    quantized = quantize(params, dataclasses.replace(RECIPE, rules=(rule,)))
    started = latent.latents(params, quantized)
    jax.tree.map(np.testing.assert_array_equal, latent.tensors(started), quantized)
    x = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    node, tensor = (jax.tree.map(lambda leaf: leaf[1], kernel_of(t)) for t in (started, quantized))
    np.testing.assert_allclose(
        ops.linear(x, node.value()), ops.linear(x, tensor), rtol=1e-5, atol=1e-5
    )


def test_exact_scale_is_that_of_the_quantiser():
    params = tree(2)
    started = latent.latents(params, quantize(params, RECIPE), exact_scale=True)
    found = kernel_of(latent.tensors(started))
    for layer in range(2):
        weight = kernel_of(params)[layer].T
        codes, scale, _ = quantizers.least_squares_fixed_point(weight)
        np.testing.assert_array_equal(found.unpacked()[layer], codes)
        np.testing.assert_allclose(found.scale[layer], scale, rtol=1e-6)


def test_gradients_go_straight_through_and_to_scales():
    """To a latent weight as if codes were not there; to growth the derivative of scale * codes."""
    params = tree(3)
    started = kernel_of(latent.latents(params, quantize(params, RECIPE)))
    upstream = jnp.asarray(np.random.default_rng(4).standard_normal((2, 7, 5)), jnp.float32)
    grads = jax.grad(lambda node: jnp.sum(node.value() * upstream))(started)
    np.testing.assert_array_equal(grads.weight, upstream)
    quantized = np.asarray(started.value())
    np.testing.assert_allclose(
        grads.growth, (quantized * upstream).sum(1, keepdims=True), rtol=1e-5, atol=1e-6
    )


def test_rescaling_keeps_codes_packed():
    """A scale's gradient through `ops.linear` is the finite difference's."""
    params = tree(5)
    started = kernel_of(latent.rescaled(quantize(params, RECIPE)))
    started = jax.tree.map(lambda leaf: leaf[0], started)
    x = jnp.asarray(np.random.default_rng(6).standard_normal((4, 7)), jnp.float32)

    def loss(growth):
        node = latent.Rescaled(tensor=started.tensor, growth=growth)
        assert node.value().codes.dtype == jnp.uint8
        return jnp.sum(jnp.square(ops.linear(x, node.value())))

    grads = jax.grad(loss)(started.growth)
    for i in range(5):
        step = jnp.zeros((5, 1)).at[i].set(1e-2)
        slope = (loss(step) - loss(-step)) / 2e-2
        np.testing.assert_allclose(grads[i, 0], slope, rtol=2e-2, atol=1e-2)  # int8 rows


def test_what_is_trained_is_chosen_by_name():
    params = tree()
    started = latent.latents(params, quantize(params, RECIPE))
    parts = split(started, CODES)
    lin = "blocks/0/lin"
    assert set(parts.trained) == {f"{lin}/kernel/weight", f"{lin}/kernel/growth", f"{lin}/bias"}
    assert set(parts.frozen) == {f"{lin}/kernel/base", "head/kernel"}
    jax.tree.map(np.testing.assert_array_equal, parts.join(parts.trained, parts.frozen), started)
    scales = split(latent.rescaled(quantize(params, RECIPE)), SCALES)
    assert set(scales.trained) == {f"{lin}/kernel/growth", f"{lin}/bias"}
    with pytest.raises(ValueError, match="nothing matches"):
        split(started, "nowhere")


def quadratic(tree, batch):
    return jnp.mean(jnp.square(tree["w"] - batch)) + 0.1 * jnp.mean(jnp.square(tree["v"]))


def quadratic_parts():
    return split({"w": jnp.arange(4.0), "v": jnp.ones(3), "other": jnp.ones(2)}, "[wv]")


def batches(step):
    return np.random.default_rng(step).standard_normal(4).astype(np.float32)


OPTIONS = train.Options(steps=12, learning_rate=0.1, warmup=3)


def by_hand():
    parts = quadratic_parts()
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 12)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    values, state, losses = parts.trained, optimizer.init(parts.trained), []
    for step in range(12):
        loss, grads = jax.value_and_grad(quadratic)(values, batches(step))
        updates, state = optimizer.update(grads, state, values)
        values = optax.apply_updates(values, updates)
        losses.append(loss)
    return values, losses


def test_it_is_adam_with_a_cosine():
    values, losses = by_hand()
    found = train.fit(quadratic, quadratic_parts(), batches, OPTIONS)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found.trained, values)


def test_a_training_that_is_cut_ends_as_one_that_is_not(tmp_path):
    """To the bit, after a stop in time and after a crash."""
    whole = train.fit(quadratic, quadratic_parts(), batches, OPTIONS, tmp_path / "whole")

    def crash(step):
        if step == 7:
            raise KeyboardInterrupt
        return batches(step)

    often = train.Options(steps=12, learning_rate=0.1, warmup=3, checkpoint_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        train.fit(quadratic, quadratic_parts(), crash, often, tmp_path / "cut")
    stopped = train.fit(quadratic, quadratic_parts(), batches, often, tmp_path / "cut", minutes=0)
    assert stopped.step == 7 and np.isnan(stopped.losses[7:]).all()
    rest = train.fit(quadratic, quadratic_parts(), batches, often, tmp_path / "cut")
    assert rest.step == 12
    np.testing.assert_array_equal(rest.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, rest.trained, whole.trained)
    other = dataclasses.replace(OPTIONS, seed=1)
    with pytest.raises(ValueError, match="other settings"):
        train.fit(quadratic, quadratic_parts(), batches, other, tmp_path / "cut")


def test_nan_stops_it_with_the_name_and_the_state_before(tmp_path):
    def poisoned(tree, batch):
        return jnp.mean(jnp.square(tree["w"])) + jnp.mean(jnp.sqrt(tree["v"] * batch))

    def given(step):
        return jnp.float32(-1.0 if step == 5 else 1.0)

    options = train.Options(steps=12, learning_rate=1e-3, checkpoint_minutes=0)
    with pytest.raises(train.DivergedError, match="step 5: .* NaN or infinite in v"):
        train.fit(poisoned, quadratic_parts(), given, options, tmp_path)
    kept = train.fit(poisoned, quadratic_parts(), given, options, tmp_path, minutes=0)
    assert kept.step == 5 and np.isfinite(kept.losses[:5]).all()
    assert all(np.isfinite(leaf).all() for leaf in kept.trained.values())


def test_a_loss_that_grows_stops_it():
    options = train.Options(steps=60, learning_rate=1e-3, diverged=2.0)
    with pytest.raises(train.DivergedError, match="has grown"):
        train.fit(
            lambda tree, batch: batch + 0 * jnp.sum(tree["w"]) + 0 * jnp.sum(tree["v"]),
            quadratic_parts(),
            lambda step: jnp.float32(1 + step),
            options,
        )
    with pytest.raises(ValueError, match="positive"):
        train.Options(steps=0)


def test_the_curve_is_logarithmic():
    falling = np.exp(-np.arange(8.0)).astype(np.float32)
    assert train.curve(falling) == train.BARS[::-1]
    assert train.curve(np.repeat(falling, 40), width=8) == train.BARS[::-1]
    assert train.curve(falling[:1]) == train.BARS[0]
    assert set(train.curve(1 + 1e-4 * falling)) == {train.BARS[0]}
    assert train.curve(np.zeros(3, np.float32)) == 3 * train.BARS[0]
