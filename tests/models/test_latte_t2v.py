"""Latte-1 against diffusers' own model; its exact size; captions of any length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.latte_t2v import (
    LATTE_1,
    LatteT2VConfig,
    LatteT2VTransformer,
    abstract_params,
)
from tests.references.latte_t2v_files import TINY, diffusers_shapes
from tests.references.video_params import random_tree


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side of Latte."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.latte_t2v as reference

    return reference


def example(config, frames=None, rows=None, columns=None, tokens=7, seed=1):
    """Two videos; their captions have 4 tokens and all."""
    rng = np.random.default_rng(seed)
    side = config.sample_size
    shape = (2, config.in_channels, frames or config.num_frames, rows or side, columns or side)
    return {
        "x": rng.standard_normal(shape, np.float32),
        "timestep": np.array([503, 3], np.int32),
        "caption": rng.standard_normal((2, tokens, config.caption_channels), np.float32),
        "caption_mask": np.arange(tokens) < np.array([[4], [tokens]]),
    }


def error(reference, config, **sizes):
    """Largest difference from diffusers, relative to the largest output; float32, same weights."""
    theirs = reference.diffusers_latte(config)
    inputs = example(config, **sizes)
    expected = reference.run(theirs, inputs)
    params = {"params": reference.params_of(theirs, config)}
    out = np.asarray(jax.jit(LatteT2VTransformer(config).apply)(params, **inputs))
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        pytest.param({}, {}, id="as-trained"),
        pytest.param({}, {"frames": 1, "rows": 6, "columns": 10}, id="a-wide-picture"),
        pytest.param({"learn_sigma": False, "num_frames": 16, "pairs": 1}, {}, id="frames-16"),
        pytest.param(
            {"patch_size": 4, "sample_size": 128, "num_heads": 4},
            {"rows": 12, "columns": 8},
            id="interpolated",
        ),
    ],
)
def test_float32_output_equals_diffusers(reference, changes, sizes):
    """Frequencies rounded to float32 by other means, times up to 999, are most of the error."""
    assert error(reference, tiny(**changes), **sizes) < 2e-5


@pytest.mark.slow
def test_a_full_width_pair_equals_diffusers(reference):
    """A pair of blocks at Latte-1's own width, heads and caption channels."""
    config = dataclasses.replace(LATTE_1, pairs=1, num_frames=3, sample_size=32)
    assert error(reference, config, tokens=120) < 2e-5


def random_params(config):
    """A tree that needs no reference."""
    return random_tree(abstract_params(config, jnp.float32))


def test_padding_of_a_caption_changes_nothing():
    """Not a bit, whatever it holds; without it, only sums are of another length."""
    params = {"params": random_params(TINY)}
    apply = jax.jit(LatteT2VTransformer(TINY).apply)
    inputs = example(TINY, frames=2)
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


def test_a_caption_of_nothing_but_padding_is_visible():
    inputs = example(TINY, frames=2)
    inputs["caption_mask"] = inputs["caption_mask"] & np.array([[False], [True]])
    out = np.asarray(LatteT2VTransformer(TINY).apply({"params": random_params(TINY)}, **inputs))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_bfloat16_runs_near_float32():
    """8 bits, and the roundings of 3 pairs of blocks."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(TINY))
    exact = jax.jit(LatteT2VTransformer(TINY).apply)({"params": params}, **example(TINY))
    low = jax.jit(LatteT2VTransformer(TINY, jnp.bfloat16).apply)
    out = low({"params": params}, **example(TINY))
    assert out.dtype == jnp.bfloat16
    difference = np.asarray(out, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(np.square(exact)))


def test_names_shapes_and_the_parameter_count_are_those_of_diffusers(reference):
    state = reference.diffusers_latte(LATTE_1, device="meta").state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == diffusers_shapes(LATTE_1)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(LATTE_1)))
    assert count == sum(value.numel() for value in state.values()) == 1_057_246_880
    assert LatteT2VConfig() == LATTE_1


def test_the_full_size_model_traces_and_does_not_grow_with_depth():
    def traced(config):
        inputs = example(config, tokens=120)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        apply = jax.jit(LatteT2VTransformer(config, jnp.bfloat16).apply)
        return apply.trace({"params": abstract_params(config)}, **shapes)

    full = traced(LATTE_1)
    assert full.out_info.shape == (2, 8, 16, 64, 64)
    half = traced(dataclasses.replace(LATTE_1, pairs=14))
    assert len(str(full.jaxpr)) == pytest.approx(len(str(half.jaxpr)), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 3, 5, 8, 7))}, "rows and columns in multiples of"),
        ({"x": np.zeros((2, 5, 3, 8, 8))}, "this network needs 3 channels"),
        ({"x": np.zeros((2, 3, 0, 8, 8))}, "latents have shape"),
        ({"caption": np.zeros((2, 7, 23))}, r"caption has shape \(2, 7, 23\)"),
        ({"caption_mask": np.ones((2, 6), bool)}, r"its mask \(2, 6\)"),
        ({"caption": np.zeros((1, 7, 24))}, r"needs \(2, tokens, 24\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    inputs = example(TINY) | changes
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(LatteT2VTransformer(TINY).init, jax.random.key(0), **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "hidden_size 80 is not a multiple of num_heads 7"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of 4"),
        ({"sample_size": 9}, "sample_size 9 is not a multiple of patch_size 2"),
        ({"pairs": 0}, "pairs 0: a Latte has at least one pair of blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
