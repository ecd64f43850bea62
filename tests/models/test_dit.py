"""DiT against diffusers' own model; its exact size; programs that do not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.dit import (
    DIT_XL_2_256,
    DIT_XL_2_512,
    DiTConfig,
    DiTTransformer,
    abstract_params,
    dit,
)
from lowbit_jax.models.layers import timestep_embedding
from tests.references.dit_files import TINY, diffusers_shapes


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side of DiT."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.dit as reference

    return reference


def relative_error(out, expected):
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


def errors(reference, config, batch=3):
    """Relative errors against diffusers in float32, same weights: (at usual steps, at step 0)."""
    theirs = reference.diffusers_dit(config)
    usual = reference.dit_inputs(config, batch)
    cases = [usual, usual | {"timestep": 0 * usual["timestep"]}]
    expected = [reference.run_dit(theirs, inputs) for inputs in cases]
    params = jax.tree.map(jnp.asarray, reference.dit_params(theirs.state_dict(), config))
    apply = jax.jit(DiTTransformer(config).apply)
    outputs = [np.asarray(apply({"params": params}, **inputs)) for inputs in cases]
    return [relative_error(*pair) for pair in zip(outputs, expected, strict=True)]


# Both sum in float32, in different orders. At steps other than 0 comes the embedding: frequencies
# rounded to float32 by other means, times up to 999.
AT_ZERO, AT_USUAL = 4e-6, 5e-5


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="patch-2"),
        pytest.param({"patch_size": 4, "sample_size": 12}, id="patch-4"),
        pytest.param({"learn_sigma": False}, id="fixed-variance"),
        pytest.param({"patch_size": 4, "learn_sigma": False, "depth": 1}, id="both"),
        pytest.param({"num_heads": 4, "in_channels": 4, "mlp_norm_eps": 0.1}, id="heads-and-eps"),
    ],
)
def test_float32_output_equals_diffusers(reference, changes):
    usual, zero = errors(reference, tiny(**changes))
    assert zero < AT_ZERO
    assert usual < AT_USUAL


@pytest.mark.slow
def test_full_width_blocks_equal_diffusers(reference):
    """Two blocks at DiT-XL/2's own width, heads, classes and number of tokens."""
    usual, zero = errors(reference, dataclasses.replace(DIT_XL_2_256, depth=2), batch=2)
    assert zero < AT_ZERO
    assert usual < AT_USUAL


def test_bfloat16_is_as_close_to_float32_as_diffusers_bfloat16(reference):
    """8 bits, and the roundings of 3 blocks: about 1 %. Ours must not be the coarser one."""
    import torch

    theirs = reference.diffusers_dit(TINY).to(torch.bfloat16).float()  # exact in bfloat16
    inputs = reference.dit_inputs(TINY)
    inputs["x"] = np.asarray(inputs["x"].astype(jnp.bfloat16), np.float32)
    exact = reference.run_dit(theirs, inputs)
    params = reference.dit_params({k: v.clone() for k, v in theirs.state_dict().items()}, TINY)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    coarse = reference.run_dit(theirs.to(torch.bfloat16), inputs)
    out = jax.jit(DiTTransformer(TINY, jnp.bfloat16).apply)({"params": params}, **inputs)
    assert out.dtype == jnp.bfloat16
    ours, diffusers = (
        np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)) for x in (out, coarse)
    )
    assert ours < 0.02 * np.sqrt(np.mean(exact**2))
    assert ours < 1.5 * diffusers


@pytest.mark.parametrize("shift", [0, 1])
def test_both_time_embeddings_equal_their_formula(shift):
    """facebook's frequencies (shift 0) and diffusers' (1), in float64; angles in float32."""
    t = np.array([0.0, 1.0, 250.0, 999.0])
    angles = t[:, None] * 10000.0 ** (-np.arange(128) / (128 - shift))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    found = np.asarray(timestep_embedding(jnp.asarray(t, jnp.float32), scale=1.0, shift=shift))
    assert (np.abs(found - expected) <= 1e-6 + 3e-7 * t[:, None]).all()


def random_params(config, seed=0):
    """A tree of our own with nothing at zero, for checks that need no reference."""
    leaves, tree = jax.tree.flatten(abstract_params(config, jnp.float32))
    rng = np.random.default_rng(seed)
    return tree.unflatten([0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def example(config, labels=(0, 1)):
    rng = np.random.default_rng(1)
    size = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    return {
        "x": rng.standard_normal(size, np.float32),
        "timestep": np.linspace(10, 900, len(labels), dtype=np.float32),
        "labels": np.array(labels, np.int32),
    }


def test_a_label_out_of_range_is_visible_and_touches_no_other_picture():
    apply = jax.jit(DiTTransformer(TINY).apply)
    params = {"params": random_params(TINY)}
    inputs = example(TINY, labels=(11, 10, -1, 9))  # 10 is the label for no class
    out = np.asarray(apply(params, **inputs))
    assert np.isnan(out[[0, 2]]).all()
    good = np.asarray(apply(params, **(inputs | {"labels": np.array([0, 10, 0, 9], np.int32)})))
    np.testing.assert_array_equal(out[[1, 3]], good[[1, 3]])
    assert np.isfinite(good).all()


@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (2, 3, 16, 16), (2, 4, 8, 8)])
def test_latents_of_another_size_are_refused(shape):
    inputs = example(TINY) | {"x": np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=r"this DiT needs \(3, 8, 8\)"):
        DiTTransformer(TINY).apply({"params": random_params(TINY)}, **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "hidden_size 80 is not a multiple of num_heads 7"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of 4"),
        ({"sample_size": 9}, "sample_size 9 is not a multiple of patch_size 2"),
        ({"depth": 0}, "depth 0: a DiT has at least one block"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def test_parameter_counts_are_those_of_diffusers(reference):
    """Theirs has the embedders in every block, 28 times; ours once, as facebook's code."""
    for config in (DIT_XL_2_256, DIT_XL_2_512):
        model = reference.meta_dit(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert diffusers_shapes(config) == shapes
        embedders = sum(p.numel() for p in model.transformer_blocks[0].norm1.emb.parameters())
        theirs = sum(p.numel() for p in model.parameters())
        assert count(config) == theirs - 27 * embedders
    # 675,129,632 as facebook's training program prints it, less the position table it counts
    assert count(DIT_XL_2_256) == 675_129_632 - 256 * 1152


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [("S", 2, 33), ("S", 8, 33), ("B", 2, 130), ("B", 4, 131), ("L", 2, 458), ("XL", 2, 675)],
)
def test_sizes_of_the_paper(size, patch, millions):
    """Table 4 of the paper, in millions (to the one that its rounding leaves open)."""
    assert count(dit(size, patch)) / 1e6 == pytest.approx(millions, abs=1)


def test_the_program_does_not_grow_with_depth():
    def length(depth):
        config = tiny(depth=depth)
        params = {"params": abstract_params(config, jnp.float32)}
        lowered = jax.jit(DiTTransformer(config).apply).lower(params, **example(config))
        return len(lowered.as_text())

    assert length(8) == pytest.approx(length(4), rel=0.02)


def test_remat_recomputes_the_blocks():
    def recomputed(remat):
        model = DiTTransformer(TINY, remat=remat)
        params = {"params": abstract_params(TINY, jnp.float32)}
        return str(jax.make_jaxpr(model.apply)(params, **example(TINY))).count("prevent_cse")

    assert (recomputed(False), recomputed(True)) == (0, 1)


def test_the_published_models_trace_to_the_shape_of_noise_and_variance():
    shape = jax.ShapeDtypeStruct
    for config, size in ((DIT_XL_2_256, 32), (DIT_XL_2_512, 64)):
        out = jax.eval_shape(
            DiTTransformer(config, jnp.bfloat16).apply,
            {"params": abstract_params(config)},
            shape((2, 4, size, size), jnp.float32),
            shape((2,), jnp.int32),
            shape((2,), jnp.int32),
        )
        assert (out.shape, out.dtype) == ((2, 8, size, size), jnp.bfloat16)
    assert DiTConfig() == DIT_XL_2_256
