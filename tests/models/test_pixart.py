"""PixArt against diffusers' model and the original network in plain torch; its exact sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.pixart import (
    PIXART_ALPHA_512,
    PIXART_ALPHA_1024_MS,
    PIXART_SIGMA_2K_MS,
    PIXART_SIGMA_1024_MS,
    PixArtTransformer,
    abstract_params,
)
from tests.references.pixart_files import PUBLISHED_ORIGINALS, TINY, TINY_ORIGINAL, original_shapes


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side and the original's."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.pixart as reference

    return reference


def relative_error(out, expected):
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


def run(config, params, inputs, dtype=jnp.float32):
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(jax.jit(PixArtTransformer(config, dtype).apply)({"params": params}, **inputs))


# Sums in float32 in another order, and at steps up to 999 and sizes up to 1344 an embedding whose
# frequencies are rounded to float32 by other means.
TOLERANCE = 5e-5


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        pytest.param({}, None, id="alpha-ms"),
        pytest.param({}, (3, 5), id="alpha-ms-rectangle"),
        pytest.param({"micro_conditions": False}, None, id="alpha"),
        pytest.param({"micro_conditions": False, "interpolation": 0.5}, (7, 2), id="sigma-256"),
        pytest.param({"interpolation": 4.0, "learn_sigma": False}, (1, 6), id="fixed-variance"),
        pytest.param({"patch_size": 4, "num_heads": 8, "in_channels": 4}, (2, 3), id="patch-4"),
    ],
)
def test_float32_output_equals_diffusers(reference, changes, grid):
    config = tiny(**changes)
    theirs = reference.random_diffusers(config)
    params = reference.pixart_params(reference.original_names(theirs.state_dict(), config), config)
    inputs = reference.pixart_inputs(config, grid=grid)
    expected = reference.run_diffusers(theirs, inputs)
    assert relative_error(run(config, params, inputs), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        pytest.param({}, None, id="own-size"),
        pytest.param({}, (4, 6), id="rectangle"),
        pytest.param({}, (5, 3), id="rows-and-columns-left-out"),
        pytest.param({"compression": 3, "micro_conditions": True}, (7, 6), id="cells-of-9"),
        pytest.param({"compressed_layers": (0, 2)}, (2, 2), id="one-cell"),
        pytest.param({"compressed_layers": ()}, (6, 4), id="none"),
    ],
)
def test_float32_output_equals_the_original_network(reference, changes, grid):
    config = dataclasses.replace(TINY_ORIGINAL, **changes)
    state = reference.random_original(original_shapes(config))
    inputs = reference.pixart_inputs(config, grid=grid)
    expected = reference.run_original(state, config, inputs)
    out = run(config, reference.pixart_params(state, config), inputs)
    assert relative_error(out, expected) < TOLERANCE


def test_both_references_agree(reference):
    """diffusers' network is the original's: the tests above have one truth."""
    theirs = reference.random_diffusers(TINY)
    state = reference.original_names(theirs.state_dict(), TINY)
    inputs = reference.pixart_inputs(TINY, grid=(5, 3))
    expected = reference.run_original(state, TINY, inputs)
    assert relative_error(reference.run_diffusers(theirs, inputs), expected) < 1e-5


@pytest.mark.slow
def test_full_width_blocks_equal_diffusers(reference):
    """Two blocks at the published width, heads and caption; a picture of 256 x 192 pixels."""
    config = dataclasses.replace(PIXART_ALPHA_1024_MS, depth=2)
    theirs = reference.random_diffusers(config)
    params = reference.pixart_params(reference.original_names(theirs.state_dict(), config), config)
    inputs = reference.pixart_inputs(config, batch=2, grid=(16, 12), tokens=120)
    expected = reference.run_diffusers(theirs, inputs)
    assert relative_error(run(config, params, inputs), expected) < TOLERANCE


@pytest.mark.slow
def test_full_width_compressed_block_equals_the_original_network(reference):
    config = dataclasses.replace(
        PIXART_SIGMA_2K_MS, depth=1, compressed_layers=(0,), null_caption_length=300
    )
    state = reference.random_original(original_shapes(config))
    inputs = reference.pixart_inputs(config, batch=2, grid=(12, 16), tokens=300)
    expected = reference.run_original(state, config, inputs)
    out = run(config, reference.pixart_params(state, config), inputs)
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize("config", [TINY, TINY_ORIGINAL], ids=["micro", "compressed"])
def test_bfloat16_is_near_float32(reference, config):
    """8 bits, and the roundings of 3 blocks: about 1 %."""
    params = random_params(config, jnp.bfloat16)
    inputs = reference.pixart_inputs(config, grid=(4, 6))
    out = run(config, params, inputs, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    exact = run(config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), inputs)
    error = np.asarray(out, np.float32) - exact
    assert 0 < np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(exact**2))


def test_bfloat16_is_as_close_to_float32_as_diffusers_bfloat16(reference):
    import torch

    theirs = reference.random_diffusers(TINY).to(torch.bfloat16).float()  # exact in bfloat16
    inputs = reference.pixart_inputs(TINY)
    for name in ("x", "caption"):
        inputs[name] = np.asarray(inputs[name].astype(jnp.bfloat16), np.float32)
    exact = reference.run_diffusers(theirs, inputs)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    params = reference.pixart_params(reference.original_names(state, TINY), TINY)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    out = np.asarray(run(TINY, params, inputs, jnp.bfloat16), np.float32)
    coarse = reference.run_diffusers(theirs.to(torch.bfloat16), inputs)
    ours, diffusers = (np.sqrt(np.mean((x - exact) ** 2)) for x in (out, coarse))
    assert ours < 1.5 * diffusers


def random_params(config, dtype=jnp.float32, seed=0):
    """A tree of our own with nothing at zero, for checks that need no reference."""
    leaves, tree = jax.tree.flatten(abstract_params(config, dtype))
    rng = np.random.default_rng(seed)
    draw = [0.15 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return tree.unflatten([jnp.asarray(leaf, dtype) for leaf in draw])


def example(config=TINY, batch=2, tokens=6):
    rng = np.random.default_rng(1)
    size = (batch, config.in_channels, config.sample_size, config.sample_size)
    inputs = {
        "x": rng.standard_normal(size, np.float32),
        "timestep": np.linspace(10, 900, batch, dtype=np.float32),
        "caption": rng.standard_normal((batch, tokens, config.caption_channels), np.float32),
        "caption_mask": np.ones((batch, tokens), bool),
    }
    if config.micro_conditions:
        inputs |= {"resolution": np.full((batch, 2), 64.0), "aspect_ratio": np.ones(batch)}
    return inputs


def test_padding_has_no_influence_whatever_it_holds():
    """To the bit: other numbers, huge ones, NaN. What is no padding does have influence."""
    params = random_params(TINY)
    inputs = example()
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]])
    inputs["caption_mask"] = mask
    out = run(TINY, params, inputs)
    for filling in (0.0, -3.0, 1e30, np.inf, np.nan):
        caption = np.where(mask[..., None] == 1, inputs["caption"], np.float32(filling))
        other = run(TINY, params, inputs | {"caption": caption, "caption_mask": mask == 1})
        np.testing.assert_array_equal(other, out)
    changed = inputs["caption"].copy()
    changed[1, 4] += 1
    other = run(TINY, params, inputs | {"caption": changed})
    np.testing.assert_array_equal(other[0], out[0])
    assert np.abs(other[1] - out[1]).max() > 1e-3


def test_a_caption_of_padding_alone_is_visible_and_touches_no_other_picture():
    params, inputs = random_params(TINY), example()
    good = run(TINY, params, inputs)
    inputs["caption_mask"] = np.array([[True] * 6, [False] * 6])
    out = run(TINY, params, inputs)
    np.testing.assert_array_equal(out[0], good[0])
    assert np.isnan(out[1]).all()


MICRO = {"resolution": np.ones((2, 2)), "aspect_ratio": np.ones(2)}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            TINY,
            {"x": np.zeros((2, 3, 8, 9))},
            r"shape \(3, 8, 9\); .* 3 channels .* multiples of 2",
        ),
        (TINY, {"x": np.zeros((2, 4, 8, 8))}, r"shape \(4, 8, 8\); this PixArt needs 3 channels"),
        (TINY, {"x": np.zeros((2, 3, 0, 8))}, r"shape \(3, 0, 8\)"),
        (TINY, {"caption": np.zeros((2, 6, 21))}, r"\(2, 6, 21\), .* needs \(2, tokens, 20\)"),
        (TINY, {"caption": np.zeros((1, 6, 20))}, r"\(1, 6, 20\), .* needs \(2, tokens, 20\)"),
        (TINY, {"caption_mask": np.ones((2, 5), bool)}, r"its mask \(2, 5\)"),
        (TINY, {"aspect_ratio": None}, r"\(2, 2\) and None; this PixArt needs \(2, 2\) and \(2,\)"),
        (TINY, {"resolution": np.ones(2)}, r"shapes \(2,\) and \(2,\); .* needs \(2, 2\)"),
        (tiny(micro_conditions=False), MICRO, "this PixArt needs None and None"),
        (TINY_ORIGINAL, {"x": np.zeros((2, 3, 2, 8))}, r"\(1, 4\) patches has no cell of 2"),
    ],
)
def test_inputs_that_do_not_fit_are_named(config, changes, message):
    inputs = example(config) | changes
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            PixArtTransformer(config).apply, {"params": abstract_params(config)}, **inputs
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "hidden_size 120 is not a multiple of num_heads 7"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of 4"),
        ({"hidden_size": 64}, "hidden_size 64 is not a multiple of 3, as micro_conditions need"),
        ({"sample_size": 9}, "sample_size 9 is not a multiple of patch_size 2"),
        ({"depth": 0}, "depth 0: a PixArt has at least one block"),
        ({"compressed_layers": (1, 3)}, r"compressed_layers \(1, 3\) .* layers 0 to 2"),
        ({"compressed_layers": (2, 1)}, r"compressed_layers \(2, 1\) .* in order"),
        ({"compressed_layers": (1, 1)}, r"compressed_layers \(1, 1\) "),
        ({"compressed_layers": (1,), "compression": 1}, "compression 1 of layers .* is not from 2"),
        ({"interpolation": 0.0}, "interpolation 0.0 is not above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def test_parameter_counts_are_those_of_diffusers(reference):
    import torch

    for config in (PIXART_ALPHA_512, PIXART_ALPHA_1024_MS, PIXART_SIGMA_1024_MS):
        with torch.device("meta"):
            theirs = reference.diffusers_model(config)
        assert count(config) == sum(p.numel() for p in theirs.parameters())
    # the published float32 file of PixArt-Sigma has 2,443,492,488 bytes, its header some 68,000
    assert count(PIXART_SIGMA_1024_MS) == 610_856_096 == (2_443_492_488 - 68_104) // 4
    assert count(PIXART_ALPHA_1024_MS) == 611_349_152


def test_the_program_does_not_grow_with_depth():
    def length(depth, compressed=()):
        config = tiny(depth=depth, compressed_layers=compressed)
        params = {"params": abstract_params(config, jnp.float32)}
        lowered = jax.jit(PixArtTransformer(config).apply).lower(params, **example(config))
        return len(lowered.as_text())

    assert length(8) == pytest.approx(length(4), rel=0.02)
    assert length(8, (4, 5, 6, 7)) == pytest.approx(length(4, (2, 3)), rel=0.02)


def test_remat_recomputes_the_blocks():
    def recomputed(remat):
        model = PixArtTransformer(TINY_ORIGINAL, remat=remat)
        params = {"params": abstract_params(TINY_ORIGINAL, jnp.float32)}
        return str(jax.make_jaxpr(model.apply)(params, **example(TINY_ORIGINAL))).count(
            "prevent_cse"
        )

    assert (recomputed(False), recomputed(True)) == (0, 2)  # of two segments


def test_the_published_models_trace_to_the_shape_of_noise_and_variance():
    shape = jax.ShapeDtypeStruct
    compressed = PUBLISHED_ORIGINALS["sigma-1024-compressed"]
    for config in (PIXART_ALPHA_512, PIXART_ALPHA_1024_MS, PIXART_SIGMA_2K_MS, compressed):
        inputs = [
            shape((2, 4, 64, 96), jnp.float32),
            shape((2,), jnp.int32),
            shape((2, 300, 4096), jnp.bfloat16),
            shape((2, 300), jnp.int32),
        ]
        if config.micro_conditions:
            inputs += [shape((2, 2), jnp.float32), shape((2,), jnp.float32)]
        model = PixArtTransformer(config, jnp.bfloat16)
        out = jax.eval_shape(model.apply, {"params": abstract_params(config)}, *inputs)
        assert (out.shape, out.dtype) == ((2, 8, 64, 96), jnp.bfloat16)
