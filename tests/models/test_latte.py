"""Class-conditional Latte against plain torch; its exact size; what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.latte import (
    LATTE_XL_2_UCF101,
    LatteConfig,
    LatteTransformer,
    abstract_params,
    latte,
)
from tests.references.latte_files import TINY, original_shapes
from tests.references.video_params import latte_params


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with torch's side of Latte."""
    pytest.importorskip("torch", reason="the reference is torch")
    import tests.references.latte as reference

    return reference


def example(config, batch=2, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, config.num_classes + 1, batch).astype(np.int32)
    return {
        "x": rng.standard_normal((batch, *config.latents), np.float32),
        "timestep": np.array([503, 3, 999], np.int32)[:batch],
    } | ({"labels": labels} if config.num_classes else {})


def error(reference, config, batch=2):
    """Largest difference from torch, relative to the largest output; float32, same weights."""
    theirs = reference.torch_latte(config)
    inputs = example(config, batch)
    expected = reference.run(theirs, inputs)
    params = latte_params(reference.state_arrays(theirs), config)
    out = np.asarray(jax.jit(LatteTransformer(config).apply)({"params": params}, **inputs))
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="patch-2"),
        pytest.param({"patch_size": 4, "sample_size": 12, "learn_sigma": False}, id="patch-4"),
        pytest.param({"num_classes": 0, "num_frames": 1, "depth": 2}, id="unconditional-one-frame"),
        pytest.param({"num_heads": 4, "num_frames": 16, "depth": 2}, id="frames-as-patches"),
    ],
)
def test_float32_output_equals_torch(reference, changes):
    """Frequencies rounded to float32 by other means, times up to 999, are most of the error."""
    assert error(reference, tiny(**changes)) < 2e-5


@pytest.mark.slow
def test_full_width_pair_equals_torch(reference):
    """A pair of blocks at Latte-XL/2's own width, heads and patches, 4 frames."""
    config = dataclasses.replace(LATTE_XL_2_UCF101, depth=2, num_frames=4)
    assert error(reference, config, batch=1) < 2e-5


def test_bfloat16_runs_near_float32(reference):
    """8 bits, and the roundings of 4 blocks: about 1 %."""
    theirs = reference.torch_latte(TINY)
    params = latte_params(reference.state_arrays(theirs), TINY)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = jax.jit(LatteTransformer(TINY).apply)({"params": low}, **example(TINY))
    out = jax.jit(LatteTransformer(TINY, jnp.bfloat16).apply)({"params": low}, **example(TINY))
    assert out.dtype == jnp.bfloat16
    difference = np.asarray(out, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(difference**2)) < 0.02 * np.sqrt(np.mean(np.square(exact)))


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def test_names_shapes_and_sizes_are_the_published_ones(reference):
    """The paper's table 1, in millions: trainable, without classes."""
    tables = {"pos_embed", "temp_embed"}
    for config in (LATTE_XL_2_UCF101, tiny(num_classes=0)):
        shapes = original_shapes(config)
        state = reference.meta_latte(config).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == shapes
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        assert count(config) == sum(n for name, n in sizes.items() if name not in tables)
    assert LatteConfig() == LATTE_XL_2_UCF101
    for size, millions in (("S", 32.48), ("B", 129.54), ("L", 456.81), ("XL", 673.68)):
        assert count(latte(size, 2, num_classes=0)) / 1e6 == pytest.approx(millions, abs=0.2)


def test_the_full_size_model_traces_and_does_not_grow_with_depth():
    def traced(config):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example(config))
        params = {"params": abstract_params(config)}
        return jax.jit(LatteTransformer(config, jnp.bfloat16).apply).trace(params, **shapes)

    full = traced(LATTE_XL_2_UCF101)
    assert full.out_info.shape == (2, 8, 16, 32, 32)
    half = traced(dataclasses.replace(LATTE_XL_2_UCF101, depth=14))
    assert len(str(full.jaxpr)) == pytest.approx(len(str(half.jaxpr)), rel=0.02)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8, 10), (2, 3, 4, 8, 8), (2, 5, 3, 8, 8)])
def test_latents_of_another_shape_are_refused(shape):
    """Other frames, other sizes, and the order of the original code (frames before channels)."""
    inputs = example(TINY) | {"x": np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=r"this Latte needs \(3, 5, 8, 8\)"):
        jax.eval_shape(LatteTransformer(TINY).init, jax.random.key(0), **inputs)


@pytest.mark.parametrize("classes", [0, 10])
def test_labels_must_be_given_if_and_only_if_there_are_classes(classes):
    config = tiny(num_classes=classes)
    inputs = example(tiny(num_classes=10 - classes))
    with pytest.raises(ValueError, match=f"labels given to a Latte of {classes} classes"):
        jax.eval_shape(LatteTransformer(config).init, jax.random.key(0), **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "depth 3: blocks come in pairs, spatial and temporal"),
        ({"num_frames": 0}, "num_frames 0: a video has at least one frame"),
        ({"sample_size": 9}, "sample_size 9 is not a multiple of patch_size 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
