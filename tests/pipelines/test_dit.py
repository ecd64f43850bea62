"""DiT sampling against diffusers' network under diffusers' schedulers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.dit import DiTTransformer
from lowbit_jax.pipelines.dit import sample_latents
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from lowbit_jax.samplers import ddim, ddpm
from lowbit_jax.samplers.guidance import DIT_DIFFUSERS, DIT_PUBLISHED
from tests.references.dit_files import TINY
from tests.references.samplers import diffusers_trajectory, generator_noise

CONFIG = dataclasses.replace(TINY, in_channels=4)  # one more than the published code guides
SHAPE = (2, 4, 8, 8)
STEPS = 20
LABELS = np.array([3, 7], np.int32)
NOISE = np.random.default_rng(2).standard_normal(SHAPE, np.float32)


@pytest.fixture(scope="module")
def network():
    """(diffusers' model, ours, our parameters), random."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    from tests.references.dit import diffusers_dit, dit_params

    theirs = diffusers_dit(CONFIG)
    params = jax.tree.map(jnp.asarray, dit_params(theirs.state_dict(), CONFIG))
    return theirs, DiTTransformer(CONFIG), params


def denoiser(model, scale, channels):
    """Their network guided by two separate forwards; variance and the rest of the first."""
    import torch

    def one(x, timestep, label):
        return model(x, timestep=timestep, class_labels=torch.tensor(label).long()).sample

    def guided(x, timestep):
        out = one(x, timestep, LABELS)
        if scale is not None:
            without = one(x, timestep, np.full_like(LABELS, CONFIG.num_classes))
            mixed = without + scale * (out - without)
            out = torch.cat([mixed[:, :channels], out[:, channels:]], 1)
        return out

    return guided


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("scale", "guidance", "channels"),
    [(4.0, DIT_PUBLISHED, 3), (4.0, DIT_DIFFUSERS, 4), (None, DIT_PUBLISHED, 4)],
    ids=["three-channels", "all-channels", "unguided"],
)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_twenty_steps_equal_diffusers(network, sampler, scale, guidance, channels):
    """8e-6 of the largest latent was measured; a forward has 8e-6 (see tests/models/test_dit)."""
    import diffusers

    theirs, model, params = network
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        run = denoiser(theirs, scale, channels)
        run = lambda x, t, full=run: full(x, t)[:, :4]  # noqa: E731  (it takes no variance)
        steps, options, step_noise = ddim.DIT_SCHEDULE.steps(STEPS), {}, None
    else:
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
        run = denoiser(theirs, scale, channels)
        steps, options = ddpm.DIT_SCHEDULE.steps(STEPS), {"seed": 5}
        step_noise = generator_noise(5, SHAPE, STEPS)
    scheduler.set_timesteps(STEPS)
    expected = diffusers_trajectory(scheduler, run, NOISE, **options)[-1]
    found = sample_latents(
        model, params, NOISE, LABELS, steps, scale=scale, guidance=guidance, step_noise=step_noise
    )
    assert found.shape == SHAPE and found.dtype == jnp.float32
    assert relative_error(np.asarray(found), expected) < 5e-5
    assert np.abs(expected - NOISE).max() > 0.1


def test_a_quantised_tree_takes_the_same_door(network):
    """Random weights: eight bits left 0.8 % after 20 steps."""
    _, model, params = network
    steps = ddim.DIT_SCHEDULE.steps(STEPS)
    low = quantize(params, RECIPES["w8a8"])
    exact, coarse = (
        np.asarray(sample_latents(model, p, NOISE, LABELS, steps, scale=1.5)) for p in (params, low)
    )
    assert 0 < relative_error(coarse, exact) < 0.03


def test_a_key_is_used(network):
    _, model, params = network
    steps = ddpm.DIT_SCHEDULE.steps(4)
    run = lambda seed: sample_latents(  # noqa: E731
        model, params, NOISE, LABELS, steps, key=jax.random.key(seed)
    )
    first, again, other = (np.asarray(run(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
