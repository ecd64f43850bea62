"""The Euler sampler against diffusers' scheduler, driven as its FLUX pipeline drives it."""

import ast
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.samplers.flow_euler import (
    FLUX_DEV_SCHEDULE,
    FLUX_SCHNELL_SCHEDULE,
    FlowSchedule,
    sample,
)

STATIC = FlowSchedule(shift=3.0)
SCHEDULES = {"dev": FLUX_DEV_SCHEDULE, "schnell": FLUX_SCHNELL_SCHEDULE, "static": STATIC}


def diffusers_scheduler(schedule, steps, tokens):
    """diffusers' scheduler after the two calls its FLUX pipeline makes."""
    diffusers = pytest.importorskip("diffusers", reason="the reference is diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**dataclasses.asdict(schedule))
    config = scheduler.config
    mu = calculate_shift(diffusers)(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def calculate_shift(diffusers):
    """That function of diffusers' FLUX pipeline, whose module only imports with `transformers`."""
    file = Path(diffusers.__file__).parent / "pipelines" / "flux" / "pipeline_flux.py"
    (function,) = (
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "calculate_shift"
    )
    names = {}
    exec(compile(ast.Module([function], []), file.name, "exec"), names)
    return names["calculate_shift"]


@pytest.mark.parametrize("tokens", (256, 1024, 4096))
@pytest.mark.parametrize("steps", (1, 4, 28, 50))
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_equal_diffusers(name, steps, tokens):
    """1e-6: diffusers shifts in float32, we in float64."""
    expected = diffusers_scheduler(SCHEDULES[name], steps, tokens).sigmas.numpy()
    sigmas = SCHEDULES[name].sigmas(steps, tokens)
    assert (sigmas.dtype, sigmas.shape) == (np.float32, (steps + 1,))
    np.testing.assert_allclose(sigmas, expected, rtol=0, atol=1e-6)
    assert (sigmas[0], sigmas[-1]) == (1, 0)


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [
        (4, (1.0, 0.90453, 0.75951, 0.51284), 0.51284),
        (28, (1.0, 0.98841, 0.97622, 0.96339), 0.10472),
        (50, (1.0, 0.99358, 0.98698, 0.98019), 0.06055),
    ],
)
def test_golden_sigmas_of_a_1024_pixel_picture(steps, first, last):
    """Worked out by hand for mu = 1.15, to the five digits given."""
    sigmas = FLUX_DEV_SCHEDULE.sigmas(steps, 4096)
    np.testing.assert_allclose(sigmas[:4], first, rtol=0, atol=5.1e-6)
    assert sigmas[-2] == pytest.approx(last, abs=5.1e-6)


@pytest.mark.parametrize(
    ("tokens", "mu"), [(256, 0.5), (1024, 0.63), (2304, 0.84667), (4096, 1.15)]
)
def test_golden_shifts(tokens, mu):
    """The middle of two steps is sigma = 1/2, which the shift s takes to s / (1 + s)."""
    shift = math.exp(mu)
    middle = FLUX_DEV_SCHEDULE.sigmas(2, tokens)[1]
    assert middle == pytest.approx(shift / (1 + shift), abs=2e-6)


def test_schnell_is_not_shifted():
    np.testing.assert_array_equal(FLUX_SCHNELL_SCHEDULE.sigmas(4, 4096), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("steps", (0, -1))
def test_fewer_than_one_step_raises(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; a sampler takes at least 1"):
        FLUX_DEV_SCHEDULE.sigmas(steps, 256)


def velocity(x, t, sin):
    """Depends on the state and the time of each entry; smooth, so that roundings do not grow."""
    return sin(3 * x + 2 * t[:, None, None]) - 0.5 * x * t[:, None, None]


@pytest.mark.parametrize(
    ("name", "steps"), [("dev", 28), ("schnell", 4), ("static", 11), ("dev", 1)]
)
def test_trajectory_equals_diffusers_step_by_step(name, steps):
    """1e-5 after up to 28 steps of float32 on numbers up to 4; 1e-6 after one."""
    scheduler = diffusers_scheduler(SCHEDULES[name], steps, 1024)
    import torch

    noise = np.random.default_rng(0).standard_normal((2, 5, 3), np.float32)
    sigmas = SCHEDULES[name].sigmas(steps, 1024)
    x = torch.tensor(noise)
    for i, timestep in enumerate(scheduler.timesteps):
        v = velocity(x, timestep.expand(2) / 1000, torch.sin)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        ours = run(noise, sigmas[: i + 2])
        np.testing.assert_allclose(ours, x, rtol=0, atol=1e-6 if i == 0 else 1e-5, err_msg=f"{i}")
    assert np.abs(ours - noise).max() > 0.1


@jax.jit
def run(noise, sigmas):
    return sample(lambda x, t: velocity(x, t, jnp.sin), noise, sigmas)


def test_each_entry_of_the_batch_gets_the_time_and_the_state_stays_float32():
    def constant(x, t):
        assert (t.shape, t.dtype) == ((3,), jnp.float32)
        assert x.dtype == jnp.float32
        return jnp.broadcast_to(t[:, None], x.shape).astype(jnp.bfloat16)

    sigmas = np.array([1, 0.5, 0], np.float32)
    out = sample(constant, jnp.ones((3, 4), jnp.bfloat16), sigmas)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.full((3, 4), 1 - 0.5 * 1 - 0.5 * 0.5))


def test_the_denoiser_is_traced_once_whatever_the_number_of_steps():
    def traces(steps):
        calls = []

        def counted(x, t):
            calls.append(None)
            return velocity(x, t, jnp.sin)

        program = jax.jit(lambda x, s: sample(counted, x, s))
        text = program.lower(
            np.ones((2, 5, 3), np.float32), np.ones(steps + 1, np.float32)
        ).as_text()
        return len(calls), text.count("sine")

    assert traces(2) == traces(50) == (1, 1)
