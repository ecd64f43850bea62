"""DDPM against diffusers' scheduler, and against the formulas of DiT's published sampling."""

from functools import partial

import numpy as np
import pytest

from lowbit_jax.samplers.ddpm import DIT_SCHEDULE, DDPMSchedule
from lowbit_jax.samplers.schedule import DiffusionSchedule, space_timesteps
from tests.references.samplers import diffusers_trajectory, dit_trajectory, generator_noise
from tests.samplers.trajectories import (
    SHAPE,
    assert_equal_steps,
    denoise_numpy,
    denoise_torch,
    noise,
    our_trajectory,
)

VARIANCES = {"learned": "itself", "learned_range": "range"}  # what the denoiser gives for each


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        pytest.param({}, 20, id="fixed-small"),
        pytest.param({"clip_sample": False}, 20, id="unclipped"),
        pytest.param({"clip_sample_range": 0.5}, 7, id="clip-range"),
        pytest.param({"variance_type": "fixed_small_log"}, 20, id="fixed-small-log"),
        pytest.param({"variance_type": "fixed_large", "clip_sample": False}, 20, id="fixed-large"),
        pytest.param(
            {"variance_type": "learned_range", "clip_sample": False}, 20, id="learned-range"
        ),
        pytest.param({"variance_type": "learned"}, 7, id="learned"),
        pytest.param({"timestep_spacing": "trailing"}, 7, id="trailing"),
        pytest.param({"timestep_spacing": "linspace", "clip_sample": False}, 20, id="linspace"),
        pytest.param({"steps_offset": 1, "variance_type": "fixed_large"}, 7, id="offset"),
        pytest.param({"prediction_type": "sample"}, 7, id="sample"),
        pytest.param({"prediction_type": "v_prediction"}, 20, id="v"),
        pytest.param({"beta_schedule": "squaredcos_cap_v2"}, 7, id="cosine"),
        pytest.param({"beta_schedule": "scaled_linear"}, 7, id="scaled-linear"),
        pytest.param({}, 1, id="one-step"),
    ],
)
def test_every_step_equals_diffusers(settings, steps):
    diffusers = pytest.importorskip("diffusers", reason="the reference is diffusers")
    scheduler = diffusers.DDPMScheduler(**settings)
    scheduler.set_timesteps(steps)
    kind = VARIANCES.get(settings.get("variance_type"))
    denoiser = partial(denoise_torch, variance=kind)
    expected = diffusers_trajectory(scheduler, denoiser, noise(), seed=3)
    step_noise = generator_noise(3, SHAPE, steps)
    schedule = DDPMSchedule(**settings)
    found = our_trajectory(schedule.steps(steps), noise(), step_noise, kind)
    assert_equal_steps(found, expected)


@pytest.mark.parametrize("sections", ["20", "ddim20", "4,9,7"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_every_step_equals_the_published_formulas(variance, clip, sections):
    timesteps = space_timesteps(1000, sections)
    step_noise = noise(5, (20, *SHAPE))
    schedule = DDPMSchedule(variance_type=variance, clip_sample=clip)
    denoiser = partial(denoise_numpy, variance="range")
    expected = dit_trajectory(denoiser, timesteps, variance, clip, noise(), step_noise)
    found = our_trajectory(schedule.steps_at(timesteps), noise(), step_noise, "range")
    assert_equal_steps(found, expected)


def test_what_dit_is_published_with():
    assert DIT_SCHEDULE.variance_type == "learned_range" and not DIT_SCHEDULE.clip_sample
    levels = DIT_SCHEDULE.alphas_cumprod()
    np.testing.assert_array_equal(levels, DiffusionSchedule().alphas_cumprod())


def test_a_variance_that_is_not_known_is_refused():
    """diffusers' "fixed_large_log" takes the root of a negative number."""
    with pytest.raises(ValueError, match="variance_type is 'fixed_large_log', none of"):
        DDPMSchedule(variance_type="fixed_large_log")
