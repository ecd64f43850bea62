"""DDPM against diffusers' scheduler, and against the formulas of DiT's published sampling."""

from functools import partial

import numpy as np
import pytest

from lowbit_jax.samplers.ddpm import DIT_SCHEDULE, DDPMSchedule
from lowbit_jax.samplers.schedule import DiffusionSchedule, space_timesteps
from tests.references.samplers import diffusers_trajectory, generator_noise
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


def published_trajectory(timesteps, variance, clip, start, step_noise):
    """DiT's `p_sample_loop` in float64 from its formulas: a process of respaced betas."""
    betas = np.linspace(0.0001, 0.02, 1000)
    kept = np.cumprod(1 - betas)[timesteps[::-1]]
    betas = 1 - kept / np.append(1.0, kept[:-1])
    bar = np.cumprod(1 - betas)
    bar_before = np.append(1.0, bar[:-1])
    posterior = betas * (1 - bar_before) / (1 - bar)
    clipped = np.append(posterior[1], posterior[1:])  # the first is zero, and has no logarithm
    x, found = start.astype(np.float64), []
    for i in range(len(betas))[::-1]:
        t = np.full(len(x), float(timesteps[::-1][i]))
        out = denoise_numpy(x, t, variance="range")
        eps, values = out[:, : x.shape[1]], out[:, x.shape[1] :]
        log_variance = {
            "fixed_small": np.log(clipped[i]),
            "fixed_large": np.log(betas[i] if i else posterior[1]),
            "learned_range": (values + 1) / 2 * np.log(betas[i])
            + (1 - values) / 2 * np.log(clipped[i]),
        }[variance]
        data = np.sqrt(1 / bar[i]) * x - np.sqrt(1 / bar[i] - 1) * eps
        data = np.clip(data, -1, 1) if clip else data
        mean = betas[i] * np.sqrt(bar_before[i]) / (1 - bar[i]) * data
        mean += (1 - bar_before[i]) * np.sqrt(1 - betas[i]) / (1 - bar[i]) * x
        x = mean + (i > 0) * np.exp(0.5 * log_variance) * step_noise[len(found)]
        found.append(x)
    return np.stack(found)


@pytest.mark.parametrize("sections", ["20", "ddim20", "4,9,7"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_every_step_equals_the_published_formulas(variance, clip, sections):
    timesteps = space_timesteps(1000, sections)
    step_noise = noise(5, (20, *SHAPE))
    schedule = DDPMSchedule(variance_type=variance, clip_sample=clip)
    expected = published_trajectory(timesteps, variance, clip, noise(), step_noise)
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
