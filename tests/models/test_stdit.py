"""STDiT against plain torch; its exact size; captions of any length, videos of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.stdit import (
    STDIT_XL_2_16X256,
    STDIT_XL_2_16X512,
    STDIT_XL_2_64X512,
    STDiTConfig,
    STDiTTransformer,
    abstract_params,
)
from tests.references.stdit_files import TINY, original_shapes
from tests.references.video_params import random_tree, stdit_params


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with torch's side of STDiT."""
    pytest.importorskip("torch", reason="the reference is torch")
    import tests.references.stdit as reference

    return reference


def example(config, size=None, tokens=7, seed=1):
    """Two videos; their captions have 4 tokens and all."""
    rng = np.random.default_rng(seed)
    shape = (2, config.in_channels, *(size or config.input_size))
    return {
        "x": rng.standard_normal(shape, np.float32),
        "timestep": np.array([503, 3], np.int32),
        "caption": rng.standard_normal((2, tokens, config.caption_channels), np.float32),
        "caption_mask": np.arange(tokens) < np.array([[4], [tokens]]),
    }


def error(reference, config, size=None, tokens=7):
    """Largest difference from torch, relative to the largest output; float32, same weights."""
    theirs = reference.torch_stdit(config, size or config.input_size)
    inputs = example(config, size, tokens)
    expected = reference.run(theirs, inputs)
    params = {"params": stdit_params(reference.state_arrays(theirs), config)}
    out = np.asarray(jax.jit(STDiTTransformer(config).apply)(params, **inputs))
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        pytest.param({}, None, id="as-trained"),
        pytest.param({}, (3, 6, 10), id="odd-frames-wide"),
        pytest.param({"space_scale": 1.0, "depth": 1}, (1, 12, 4), id="one-frame-tall"),
        pytest.param({"num_heads": 4, "learn_sigma": False}, (16, 4, 8), id="more-frames"),
        pytest.param(
            {"patch_size": (2, 4, 2), "input_size": (2, 8, 8)}, (4, 8, 6), id="frames-in-a-patch"
        ),
    ],
)
def test_float32_output_equals_torch(reference, changes, size):
    """Frequencies rounded to float32 by other means, times up to 999, are most of the error."""
    assert error(reference, tiny(**changes), size) < 2e-5


@pytest.mark.slow
def test_a_full_width_block_equals_torch(reference):
    """A block at STDiT-XL/2's own width, heads and caption channels."""
    config = dataclasses.replace(STDIT_XL_2_16X512, depth=1)
    assert error(reference, config, (3, 16, 24), tokens=120) < 2e-5


def random_params(config):
    """A tree that needs no reference."""
    return random_tree(abstract_params(config, jnp.float32))


def test_padding_of_a_caption_changes_nothing():
    """Not a bit, whatever it holds; without it, only sums are of another length."""
    params = {"params": random_params(TINY)}
    apply = jax.jit(STDiTTransformer(TINY).apply)
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


def test_the_null_caption_is_an_input_like_any_other():
    """Only by being given: the parameter itself is in no path of the program."""
    params = random_params(TINY)
    apply = jax.jit(STDiTTransformer(TINY).apply)
    inputs = example(TINY, (1, 2, 2), tokens=TINY.null_caption_length)
    out = apply({"params": params}, **inputs)
    null = params["y_embedder"]["y_embedding"]
    assert null.shape == (TINY.null_caption_length, TINY.caption_channels)
    guided = inputs | {"caption": np.stack([inputs["caption"][0], null])}
    assert np.abs(apply({"params": params}, **guided) - out)[1].max() > 1e-3
    params["y_embedder"]["y_embedding"] = null * np.nan
    np.testing.assert_array_equal(apply({"params": params}, **inputs), out)


def test_bfloat16_runs_near_float32():
    """8 bits, and the roundings of 3 blocks."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(TINY))
    inputs = example(TINY)
    exact = jax.jit(STDiTTransformer(TINY).apply)({"params": params}, **inputs)
    out = jax.jit(STDiTTransformer(TINY, jnp.bfloat16).apply)({"params": params}, **inputs)
    assert out.dtype == jnp.bfloat16
    difference = np.asarray(out, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(np.square(exact)))


def test_names_shapes_and_the_parameter_count_are_the_published_ones(reference):
    """724M in the report: without the null caption, a buffer there, and M for 2^20."""
    for config in (STDIT_XL_2_16X256, STDIT_XL_2_16X512, STDIT_XL_2_64X512, TINY):
        state = reference.meta_stdit(config).state_dict()
        assert {name: tuple(v.shape) for name, v in state.items()} == original_shapes(config)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
        tables = ("pos_embed", "pos_embed_temporal")
        assert count == sum(v.numel() for name, v in state.items() if name not in tables)
    parameters = sum(p.numel() for p in reference.meta_stdit(STDIT_XL_2_16X512).parameters())
    assert parameters // 2**20 == 724
    assert STDiTConfig() == STDIT_XL_2_16X512


def test_the_full_size_model_traces_and_does_not_grow_with_depth():
    def traced(config):
        inputs = example(config, tokens=120)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        apply = jax.jit(STDiTTransformer(config, jnp.bfloat16).apply)
        return apply.trace({"params": abstract_params(config)}, **shapes)

    full = traced(STDIT_XL_2_16X512)
    assert full.out_info.shape == (2, 8, 16, 64, 64)
    half = traced(dataclasses.replace(STDIT_XL_2_16X512, depth=14))
    assert len(str(full.jaxpr)) == pytest.approx(len(str(half.jaxpr)), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 3, 5, 8, 7))}, r"rows and columns in multiples of \(1, 2, 2\)"),
        ({"x": np.zeros((2, 5, 3, 8, 8))}, "this network needs 3 channels"),
        ({"caption": np.zeros((2, 7, 23))}, r"caption has shape \(2, 7, 23\)"),
        ({"caption_mask": np.ones((2, 6), bool)}, r"its mask \(2, 6\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    inputs = example(TINY) | changes
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(STDiTTransformer(TINY).init, jax.random.key(0), **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "hidden_size 144 is not a multiple of num_heads 7"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of 4"),
        ({"input_size": (5, 9, 8)}, r"latents have shape \(3, 5, 9, 8\)"),
        ({"depth": 0}, "depth 0: an STDiT has at least one block"),
        ({"time_scale": 0.0}, "time_scale 0.0 divide positions"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
