"""Modulations made before the first step: the same pictures, with a quarter fewer weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.flux import FluxConfig, FluxTransformer, abstract_params, image_ids, text_ids
from lowbit_jax.models.flux_modulation import (
    modulation_bytes,
    modulations,
    split_modulation,
    step_of,
)
from lowbit_jax.pipelines.flux import sample_tokens, step_times
from lowbit_jax.quant import RECIPES, Recipe, Rule, WeightSpec, quantize
from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.samplers.flow_euler import FLUX_SCHNELL_SCHEDULE

CONFIG = FluxConfig(
    in_channels=4,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
)
FIRST_LAYERS = Recipe(  # cuts both stacks into two segments
    name="first layers",
    rules=(
        Rule(
            match=r"(double|single)_blocks/0/.*",
            weights=WeightSpec(format="ternary", quantizer="least_squares"),
            act_bits=8,
        ),
    ),
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.1)  # noqa: E731
    return jax.tree.map(draw, abstract_params(CONFIG))


def inputs(batch=2, text=5):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    noise, txt = normal(batch, 12, CONFIG.in_channels), normal(batch, text, CONFIG.context_in_dim)
    return noise, txt, normal(batch, CONFIG.vec_in_dim), jnp.array([3.5, 2.0])


@pytest.mark.parametrize("recipe", [RECIPES["float"], RECIPES["w8a8"], FIRST_LAYERS])
def test_the_picture_is_the_same(params, recipe):
    """Four steps in float32: products of 8 rows are summed as those of 2 are, or in another order,
    1e-7; where activations are rounded to codes that may be another code in a layer or two."""
    params = quantize(params, recipe)
    model, sigmas = FluxTransformer(CONFIG), FLUX_SCHNELL_SCHEDULE.sigmas(4, 12)
    noise, txt, pooled, guidance = inputs()
    expected = sample_tokens(
        model, params, noise, txt, pooled, sigmas, grid=(3, 4), guidance=guidance
    )
    steps, once = split_modulation(params)
    given = modulations(model, once, step_times(sigmas, 2), pooled, guidance)
    found = sample_tokens(model, steps, noise, txt, None, sigmas, grid=(3, 4), modulations=given)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert difference < (2e-6 if recipe.name == "float" else 2e-2)


def test_one_step_is_the_forward_pass(params):
    noise, txt, pooled, guidance = inputs()
    model, t = FluxTransformer(CONFIG), jnp.array([0.7, 0.2])
    ids = image_ids(3, 4), text_ids(5)
    expected = model.apply({"params": params}, noise, txt, t, pooled, *ids, guidance=guidance)
    steps, once = split_modulation(params)
    given = step_of(modulations(model, once, t[None], pooled, guidance), 0)
    found = model.apply({"params": steps}, noise, txt, None, None, *ids, modulations=given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    with pytest.raises(ValueError, match="modulations stand for timestep, pooled and guidance"):
        model.apply({"params": steps}, noise, txt, t, None, *ids, modulations=given)


def test_nothing_is_lost_and_the_numbers_are_those_of_flux_dev(params):
    steps, once = split_modulation(params)
    assert tree_bytes(steps) + tree_bytes(once) == tree_bytes(params)
    assert set(once) == {
        "time_in", "guidance_in", "vector_in", "double_blocks", "single_blocks", "final_layer"
    }  # fmt: skip
    # by hand: 76 layers and the last one's, each output with its 3072 weights and a bias, and what
    # embeds time and guidance (256 wide) and pooled text (768)
    layers = (1_050_624 + 2 * 3072) * (3072 + 1)
    embedders = (2 * 256 + 768 + 3 * 3072 + 6) * 3072
    dev = abstract_params(FluxConfig())
    steps, once = split_modulation(dev)
    assert (tree_bytes(once) // 2, tree_bytes(dev) // 2) == (layers + embedders, 11_901_408_320)
    assert modulation_bytes(FluxConfig(), 50) == 50 * 2 * (1_050_624 + 2 * 3072)
