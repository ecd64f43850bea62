"""STDiT3 against plain torch; its exact size; captions of any length, videos of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.stdit3 import (
    STDIT3_3B_2,
    STDIT3_XL_2,
    STDiT3Config,
    STDiT3Transformer,
    abstract_params,
)
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from tests.references.stdit3_files import TINY, original_shapes
from tests.references.video_params import random_tree, stdit3_params

SIZE = (5, 8, 8)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with torch's side of STDiT3."""
    pytest.importorskip("torch", reason="the reference is torch")
    import tests.references.stdit3 as reference

    return reference


def example(config, size=SIZE, tokens=7, seed=1):
    """Two videos of other rates and pixels; their captions have 4 tokens and all."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((2, config.in_channels, *size), np.float32),
        "timestep": np.array([503.25, 3], np.float32),
        "caption": rng.standard_normal((2, tokens, config.caption_channels), np.float32),
        "caption_mask": np.arange(tokens) < np.array([[4], [tokens]]),
        "fps": np.array([24, 8], np.float32),
        "height": np.array([480, 144], np.float32),
        "width": np.array([854, 256], np.float32),
    }


def error(reference, config, size=SIZE, tokens=7, given=None):
    """Largest difference from torch, relative to the largest output; float32, same weights."""
    theirs = reference.torch_stdit3(config)
    inputs = example(config, size, tokens)
    if given is not None:
        inputs["frame_mask"] = ~np.array(given)
    expected = reference.run(theirs, inputs)
    params = {"params": stdit3_params(reference.state_arrays(theirs), config)}
    out = np.asarray(jax.jit(STDiT3Transformer(config).apply)(params, **inputs))
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        pytest.param({}, SIZE, id="square"),
        pytest.param({}, (1, 7, 13), id="a-wide-picture-of-odd-sizes"),
        pytest.param({"pairs": 1, "qk_norm": False}, (15, 5, 4), id="without-qk-norm"),
        pytest.param({"num_heads": 4, "learn_sigma": False}, (8, 4, 6), id="heads-4"),
        pytest.param({"patch_size": (2, 4, 2), "pairs": 1}, (5, 6, 7), id="all-axes-padded"),
        pytest.param({"base_resolution": 64, "pairs": 1}, (2, 4, 10), id="dense-positions"),
    ],
)
def test_float32_output_equals_torch(reference, changes, size):
    """Frequencies rounded to float32 by other means, times up to 503, are most of the error."""
    assert error(reference, tiny(**changes), size) < 2e-5


def test_given_frames_are_modulated_as_at_time_zero(reference):
    """Other frames in each video; no frame given is the same as no mask."""
    given = [[True, False, False, True, False], [False, False, True, False, False]]
    assert error(reference, TINY, given=given) < 2e-5
    params, inputs = {"params": random_params(TINY)}, example(TINY, (3, 4, 4))
    apply = jax.jit(STDiT3Transformer(TINY).apply)
    out = apply(params, **inputs)
    all_made = apply(params, **inputs, frame_mask=np.ones((2, 3), bool))
    assert np.abs(out - all_made).max() < 1e-5 * np.abs(out).max()
    given = np.array([[False, True, True], [True, True, True]])
    some_given = apply(params, **inputs, frame_mask=given)
    assert np.abs(out - some_given)[0].max() > 1e-3 * np.abs(out).max()
    assert np.abs(out - some_given)[1].max() < 1e-5 * np.abs(out).max()


def test_given_frames_of_a_quantised_tree():
    """Vectors per frame and per sample take the same integer products."""
    config = tiny(pairs=1)
    params = random_tree(abstract_params(config, jnp.float32))
    low = quantize(params, RECIPES["w8a8"])
    apply, inputs = jax.jit(STDiT3Transformer(config).apply), example(config, (3, 4, 4))
    out = np.asarray(apply({"params": low}, **inputs))
    made = apply({"params": low}, **inputs, frame_mask=np.ones((2, 3), bool))
    assert np.abs(out - made).max() < 1e-3 * np.abs(out).max()
    given = {"frame_mask": np.array([[False, True, True], [True, False, True]])}
    exact = apply({"params": params}, **inputs, **given)
    coarse = apply({"params": low}, **inputs, **given)
    assert 0 < np.abs(coarse - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(exact - out).max() > 0.1 * np.abs(exact).max()


@pytest.mark.slow
def test_a_full_width_pair_equals_torch(reference):
    """A pair of blocks at STDiT3-XL/2's own width, heads and caption channels."""
    config = dataclasses.replace(STDIT3_XL_2, pairs=1)
    assert error(reference, config, (3, 15, 27), tokens=120) < 2e-5


def random_params(config):
    """A tree that needs no reference."""
    return random_tree(abstract_params(config, jnp.float32))


def test_padding_of_a_caption_changes_nothing():
    """Not a bit, whatever it holds; without it, only sums are of another length."""
    params = {"params": random_params(TINY)}
    apply = jax.jit(STDiT3Transformer(TINY).apply)
    inputs = example(TINY, (2, 4, 4))
    out = np.asarray(apply(params, **inputs))
    other = inputs["caption"].copy()
    other[0, 4:] = [[1e30], [np.nan], [np.inf]]
    np.testing.assert_array_equal(apply(params, **(inputs | {"caption": other})), out)
    alone = {name: value[:1] for name, value in inputs.items()}
    for name in ("caption", "caption_mask"):
        alone[name] = alone[name][:, :4]
    short = np.asarray(apply(params, **alone))
    assert np.abs(short - out[:1]).max() < 1e-5 * np.abs(out).max()
    swapped = inputs | {"caption": inputs["caption"][:, ::-1]}  # what counts does change it
    assert np.abs(apply(params, **swapped) - out).max() > 1e-3 * np.abs(out).max()


@pytest.mark.parametrize("name", ["fps", "height", "width", "timestep"])
def test_every_condition_has_an_effect_on_its_own_video_only(name):
    params = {"params": random_params(TINY)}
    apply = jax.jit(STDiT3Transformer(TINY).apply)
    inputs = example(TINY, (2, 4, 4))
    out = np.asarray(apply(params, **inputs))
    changed = inputs | {name: inputs[name] * np.array([1, 2], np.float32)}
    other = np.asarray(apply(params, **changed))
    np.testing.assert_array_equal(other[0], out[0])
    assert np.abs(other - out)[1].max() > 1e-3 * np.abs(out).max()


def test_bfloat16_runs_near_float32():
    """8 bits, and the roundings of 2 pairs of blocks."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(TINY))
    inputs = example(TINY)
    exact = jax.jit(STDiT3Transformer(TINY).apply)({"params": params}, **inputs)
    out = jax.jit(STDiT3Transformer(TINY, jnp.bfloat16).apply)({"params": params}, **inputs)
    assert out.dtype == jnp.bfloat16
    difference = np.asarray(out, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(np.square(exact)))


def test_names_shapes_and_the_parameter_count_are_the_published_ones(reference):
    """1.1B in the report, for 2^30."""
    for config in (STDIT3_XL_2, STDIT3_3B_2, tiny(qk_norm=False)):
        state = reference.meta_stdit3(config).state_dict()
        assert {name: tuple(v.shape) for name, v in state.items()} == original_shapes(config)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
        assert count == sum(v.numel() for name, v in state.items() if name != "rope.freqs")
    found = [
        sum(p.numel() for p in reference.meta_stdit3(config).parameters()) / 2**30
        for config in (STDIT3_XL_2, STDIT3_3B_2)
    ]
    assert found == pytest.approx([1.1, 3.0], abs=0.05)
    assert STDiT3Config() == STDIT3_XL_2


def test_the_full_size_model_traces_and_does_not_grow_with_depth():
    """240p, 9:16, 51 frames: what the published configuration samples."""

    def traced(config):
        inputs = example(config, size=(15, 30, 53), tokens=300)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        apply = jax.jit(STDiT3Transformer(config, jnp.bfloat16).apply)
        return apply.trace({"params": abstract_params(config)}, **shapes)

    full = traced(STDIT3_XL_2)
    assert full.out_info.shape == (2, 8, 15, 30, 53)
    half = traced(dataclasses.replace(STDIT3_XL_2, pairs=14))
    assert len(str(full.jaxpr)) == pytest.approx(len(str(half.jaxpr)), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 5, 3, 8, 8))}, "this network needs 3 channels"),
        ({"x": np.zeros((2, 3, 5, 0, 8))}, r"latents have shape \(3, 5, 0, 8\)"),
        ({"caption": np.zeros((2, 7, 23))}, r"caption has shape \(2, 7, 23\)"),
        ({"caption_mask": np.ones((2, 6), bool)}, r"its mask \(2, 6\)"),
        ({"frame_mask": np.ones((2, 4), bool)}, r"\(2, 4\); these latents need \(2, 5\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    inputs = example(TINY) | changes
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(STDiT3Transformer(TINY).init, jax.random.key(0), **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "hidden_size 144 is not a multiple of num_heads 7"),
        ({"num_heads": 48}, "hidden_size 144 is not a multiple of 2 x num_heads 48, as rotary"),
        ({"hidden_size": 50, "num_heads": 5}, "hidden_size 50 is not a multiple of 4"),
        ({"pairs": 0}, "pairs 0: an STDiT3 has at least one pair of blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
