"""DDIM against diffusers' scheduler, step by step."""

import numpy as np
import pytest

from lowbit_jax.samplers.ddim import DDIMSchedule
from lowbit_jax.samplers.schedule import space_timesteps
from tests.references.samplers import diffusers_trajectory
from tests.samplers.trajectories import (
    SHAPE,
    assert_equal_steps,
    denoise_numpy,
    denoise_torch,
    noise,
    our_trajectory,
)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        pytest.param({}, 20, id="default"),
        pytest.param({"clip_sample": False}, 20, id="unclipped"),
        pytest.param({"clip_sample_range": 0.5}, 7, id="clip-range"),
        pytest.param({"set_alpha_to_one": False, "clip_sample": False}, 7, id="alpha-not-one"),
        pytest.param({"set_alpha_to_one": False, "steps_offset": 1}, 20, id="stable-diffusion"),
        pytest.param({"timestep_spacing": "trailing", "clip_sample": False}, 7, id="trailing"),
        pytest.param({"timestep_spacing": "linspace"}, 20, id="linspace"),
        pytest.param({"prediction_type": "v_prediction"}, 20, id="v"),
        pytest.param({"prediction_type": "sample", "clip_sample": False}, 7, id="sample"),
        pytest.param({"beta_schedule": "scaled_linear"}, 20, id="scaled-linear"),
        pytest.param({"beta_schedule": "squaredcos_cap_v2"}, 7, id="cosine"),
        pytest.param({"timestep_spacing": "trailing"}, 1, id="one-step"),
    ],
)
def test_every_step_equals_diffusers(settings, steps, eta):
    diffusers = pytest.importorskip("diffusers", reason="the reference is diffusers")
    scheduler = diffusers.DDIMScheduler(**settings)
    scheduler.set_timesteps(steps)
    step_noise = noise(5, (steps, *SHAPE)) if eta else None
    expected = diffusers_trajectory(scheduler, denoise_torch, noise(), step_noise, eta=eta)
    found = our_trajectory(DDIMSchedule(**settings).steps(steps, eta=eta), noise(), step_noise)
    # data out of noise alone are the difference of numbers near 1, times 157
    assert_equal_steps(found, expected, 1e-4 if steps == 1 else 1e-5)


@pytest.mark.parametrize("sections", ["ddim20", "11,9"])
def test_respaced_steps_equal_eq_12_in_float64(sections):
    """Each step goes to the next, the last to pure data."""
    timesteps = space_timesteps(1000, sections)
    bar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    x, expected = noise().astype(np.float64), []
    for now, then in zip(timesteps, np.append(timesteps[1:], -1), strict=True):
        a, b = bar[now], bar[then] if then >= 0 else 1.0
        eps = denoise_numpy(x, np.full(len(x), float(now)))
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
        expected.append(x)
    found = our_trajectory(DDIMSchedule(clip_sample=False).steps_at(timesteps), noise())
    assert_equal_steps(found, np.stack(expected))


def test_a_learned_variance_is_dropped():
    """As diffusers' DiT pipeline does before it calls the scheduler."""
    steps = DDIMSchedule().steps(7)
    found = our_trajectory(steps, noise(), variance="range")
    np.testing.assert_array_equal(found, our_trajectory(steps, noise()))


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range_is_named(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}; it is from 0"):
        DDIMSchedule().steps(7, eta=eta)
