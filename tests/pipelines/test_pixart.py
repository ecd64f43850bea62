"""PixArt sampling against diffusers' network and scheduler, and the original's way of guiding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.pixart import PixArtTransformer, abstract_params
from lowbit_jax.pipelines.pixart import sample_latents
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from lowbit_jax.samplers.dpm_solver import PIXART_SCHEDULE
from tests.references.pixart_files import TINY, original_shapes
from tests.references.samplers import diffusers_trajectory

ALPHA = TINY
SIGMA = dataclasses.replace(TINY, micro_conditions=False)
ORIGINAL = dataclasses.replace(SIGMA, null_caption_length=7, compressed_layers=(2,))
STEPS = 20
BATCH = 2


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side and the original's."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.pixart as reference

    return reference


def inputs(config, size=(8, 12)):
    """Noise of a rectangle, caption and negative caption, each with a mask of its own."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((BATCH, config.in_channels, *size), np.float32)
    shape = (BATCH, 7, config.caption_channels)
    caption, negative = (rng.standard_normal(shape, np.float32) for _ in range(2))
    masks = [np.arange(7) < np.array(lengths)[:, None] for lengths in ([7, 3], [1, 1])]
    return noise, (caption, masks[0].astype(np.int32)), (negative, masks[1].astype(np.int32))


def our_params(reference, theirs, config):
    state = reference.original_names(theirs.state_dict(), config)
    return jax.tree.map(jnp.asarray, reference.pixart_params(state, config))


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("config", [ALPHA, SIGMA], ids=["alpha", "sigma"])
def test_twenty_steps_equal_diffusers(reference, config):
    """diffusers' network under its scheduler, guided by two forwards. 2e-6 was measured."""
    import diffusers
    import torch

    theirs = reference.random_diffusers(config)
    noise, caption, negative = inputs(config)
    size = {}
    if config.micro_conditions:  # the whole picture, of 8 pixels to the latent
        size = {"resolution": np.float32([[64, 96]] * BATCH), "aspect_ratio": [64 / 96] * BATCH}
        size = {name: np.asarray(value, np.float32) for name, value in size.items()}

    def guided(x, timestep):
        given = {"x": x.numpy(), "timestep": timestep.numpy(), **size}
        towards, base = (
            torch.tensor(
                reference.run_diffusers(theirs, given | {"caption": states, "caption_mask": mask})
            )
            for states, mask in (caption, negative)
        )
        return (base + 4.5 * (towards - base))[:, : config.in_channels]

    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    expected = diffusers_trajectory(scheduler, guided, noise)[-1]
    found = sample_latents(
        PixArtTransformer(config),
        our_params(reference, theirs, config),
        noise,
        caption,
        PIXART_SCHEDULE.steps(STEPS),
        negative=negative,
    )
    assert found.dtype == jnp.float32
    assert relative_error(np.asarray(found), expected) < 5e-5
    assert np.abs(expected - noise).max() > 0.1


def test_the_stored_null_caption_guides_as_published(reference):
    """Two forwards of the original network; the null caption has the mask of the caption."""
    import diffusers
    import torch

    state = reference.random_original(original_shapes(ORIGINAL))
    noise, caption, _ = inputs(ORIGINAL)
    null = np.tile(state["y_embedder.y_embedding"].numpy(), (BATCH, 1, 1))

    def guided(x, timestep):
        given = {"x": x.numpy(), "timestep": timestep.numpy(), "caption_mask": caption[1]}
        towards, base = (
            torch.tensor(reference.run_original(state, ORIGINAL, given | {"caption": states}))
            for states in (caption[0], null)
        )
        return (base + 4.5 * (towards - base))[:, : ORIGINAL.in_channels].float()

    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    expected = diffusers_trajectory(scheduler, guided, noise)[-1]
    params = jax.tree.map(jnp.asarray, reference.pixart_params(state, ORIGINAL))
    model, steps = PixArtTransformer(ORIGINAL), PIXART_SCHEDULE.steps(STEPS)
    found = np.asarray(sample_latents(model, params, noise, caption, steps))
    assert relative_error(found, expected) < 5e-5
    alone = np.asarray(sample_latents(model, params, noise, caption, steps, scale=None))
    assert relative_error(alone, expected) > 0.01


def test_a_quantised_tree_takes_the_same_door(reference):
    """Random weights: eight bits leave a few per cent after 20 guided steps."""
    theirs = reference.random_diffusers(SIGMA)
    params = our_params(reference, theirs, SIGMA)
    noise, caption, negative = inputs(SIGMA)
    exact, coarse = (
        np.asarray(
            sample_latents(
                PixArtTransformer(SIGMA),
                tree,
                noise,
                caption,
                PIXART_SCHEDULE.steps(STEPS),
                negative=negative,
            )
        )
        for tree in (params, quantize(params, RECIPES["w8a8"]))
    )
    assert 0 < relative_error(coarse, exact) < 0.1


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (SIGMA, None, "guidance needs `negative`: this network stores no null caption"),
        (SIGMA, 6, r"negative caption has shape \(2, 6, 20\), the caption \(2, 7, 20\): pad both"),
        (dataclasses.replace(ORIGINAL, null_caption_length=9), None, r"\(2, 9, 20\), the caption"),
    ],
)
def test_a_negative_caption_that_is_missing_or_does_not_fit_is_named(config, tokens, message):
    noise, caption, (other, other_mask) = inputs(config)
    negative = None if tokens is None else (other[:, :tokens], other_mask[:, :tokens])
    model, steps = PixArtTransformer(config), PIXART_SCHEDULE.steps(2)
    call = lambda params: sample_latents(  # noqa: E731
        model, params, noise, caption, steps, negative=negative
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, abstract_params(config))
