"""OpenSORA's rectified flow against its published formulas, in float64."""

import math

import jax
import numpy as np
import pytest

from lowbit_jax.samplers.loop import sample
from lowbit_jax.samplers.rectified_flow import OPENSORA_1_2_SCHEDULE, RectifiedFlowSchedule
from lowbit_jax.samplers.registry import read_schedule
from tests.references.samplers import opensora_times, opensora_trajectory
from tests.samplers.trajectories import (
    assert_equal_steps,
    denoise_numpy,
    noise,
    our_trajectory,
)

SIZES = [(512, 512, 1), (240, 426, 51), (720, 1280, 102), (144, 144, 17), (512, 512, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_times_equal_the_published_formula(steps, transform, discrete, size):
    schedule = RectifiedFlowSchedule(
        use_discrete_timesteps=discrete, use_timestep_transform=transform
    )
    height, width, frames = size
    found = schedule.timesteps(steps, height=height, width=width, num_frames=frames)
    expected = opensora_times(steps, *size, discrete=discrete, transform=transform)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == pytest.approx(1000) and (np.diff(found) < 0).all()


def test_golden_times():
    """Half way, a ratio r moves 1/2 to r / (r + 1): 20 latent frames at the base size."""
    times = OPENSORA_1_2_SCHEDULE.timesteps(2, height=512, width=512, num_frames=68)
    np.testing.assert_allclose(times, [1000, 1000 * math.sqrt(20) / (1 + math.sqrt(20))])
    times = OPENSORA_1_2_SCHEDULE.timesteps(2, height=256, width=256, num_frames=1)
    np.testing.assert_allclose(times, [1000, 1000 / 3])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [1, 30])
def test_every_step_equals_the_published_loop(steps, size):
    height, width, frames = size
    shape = (2, 4, 3, 2, 5)  # b c frames rows columns
    times = opensora_times(steps, *size)
    expected = opensora_trajectory(denoise_numpy, times, noise(0, shape))
    schedule = OPENSORA_1_2_SCHEDULE.steps(steps, height=height, width=width, num_frames=frames)
    found = our_trajectory(schedule, noise(0, shape), variance="range")  # dropped, as published
    assert_equal_steps(found, expected)


def test_the_velocity_points_to_the_data():
    """With the exact velocity of a straight path, any number of steps arrives."""
    data, start = noise(1), noise(2)
    steps = OPENSORA_1_2_SCHEDULE.steps(3, height=720, width=1280, num_frames=102)
    found = jax.jit(lambda x: sample(lambda x, t: data - start, x, steps))(start)
    np.testing.assert_allclose(found, data, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 12])
def test_a_model_of_the_data_is_one_of_its_velocity(steps):
    """The published loop on (data - x) / t."""
    size = (240, 426, 51)
    times = opensora_times(steps, *size)

    def velocity(x, t):
        return (denoise_numpy(x, t) - x) / (t.reshape(-1, 1, 1, 1) / 1000)

    expected = opensora_trajectory(velocity, times, noise(0))
    schedule = RectifiedFlowSchedule(prediction_type="sample")
    height, width, frames = size
    found = schedule.steps(steps, height=height, width=width, num_frames=frames)
    assert_equal_steps(our_trajectory(found, noise(0)), expected)
    assert found.keep[-1] == 0 and found.push[-1] == 1  # ends at what the model says


def test_a_ratio_of_its_own_stands_for_the_size():
    """4 t / (1 + 3 t), and nobody has to say how large the video is."""
    schedule = RectifiedFlowSchedule(ratio=4.0)
    u = np.arange(5, 0, -1) / 5
    np.testing.assert_allclose(schedule.timesteps(5), 1000 * 4 * u / (1 + 3 * u), rtol=1e-12)
    sized = RectifiedFlowSchedule(base_resolution=64)
    size = {"height": 32, "width": 32, "num_frames": 1}
    np.testing.assert_allclose(sized.timesteps(5, **size), schedule.timesteps(5), rtol=1e-12)
    plain = RectifiedFlowSchedule(use_timestep_transform=False)
    np.testing.assert_allclose(plain.timesteps(5), 1000 * u, rtol=1e-12)
    assert sized.takes_size and not (schedule.takes_size or plain.takes_size)


def test_open_soras_settings_are_read():
    """As in its configs; what only training or the run itself needs is passed over."""
    config = {"_class_name": "RFLOW", "use_timestep_transform": True, "num_sampling_steps": 30}
    assert read_schedule(config | {"cfg_scale": 7.0}) == OPENSORA_1_2_SCHEDULE
    with pytest.raises(ValueError, match="transform_scale is 2.0, only 1.0 is ported"):
        read_schedule(config | {"transform_scale": 2.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type is 'noise'"),
        ({"ratio": 0}, "ratio is 0, no number above 0"),
        ({"ratio": "4"}, "ratio is '4', no number above 0"),
        ({"ratio": float("nan")}, "ratio is nan"),
    ],
)
def test_unusable_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowSchedule(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 16}, "num_frames is 16; the time transform takes 1, or a video of at"),
        ({"num_frames": 0}, "a video of 0 frames of 240 x 426 pixels"),
        ({"height": 0}, "a video of 51 frames of 0 x 426 pixels"),
        ({"steps": 0}, "steps is 0; a sampler takes at least 1"),
    ],
)
def test_impossible_videos_are_named(changes, message):
    """Sixteen frames would make every published time zero, and sampling return its noise."""
    arguments = {"steps": 5, "height": 240, "width": 426, "num_frames": 51} | changes
    with pytest.raises(ValueError, match=message):
        OPENSORA_1_2_SCHEDULE.timesteps(**arguments)
