"""DPM-Solver++ against diffusers' scheduler, step by step."""

import itertools
import math
from functools import partial

import numpy as np
import pytest

from lowbit_jax.samplers.dpm_solver import PIXART_SCHEDULE, DPMSolverSchedule
from tests.references.samplers import diffusers_trajectory
from tests.samplers.trajectories import assert_equal_steps, denoise_torch, noise, our_trajectory

CASES = [
    pytest.param({}, 20, id="pixart"),
    pytest.param({}, 14, id="short"),  # the last step of first order, twice over
    pytest.param({}, 2, id="two-steps"),
    pytest.param({}, 1, id="one-step"),
    pytest.param({"final_sigmas_type": "sigma_min"}, 20, id="sigma-min"),  # second order to the end
    pytest.param({"final_sigmas_type": "sigma_min"}, 14, id="sigma-min-short"),
    pytest.param(
        {"final_sigmas_type": "sigma_min", "lower_order_final": False}, 14, id="second-order-short"
    ),
    pytest.param(
        {"final_sigmas_type": "sigma_min", "euler_at_final": True}, 20, id="euler-at-final"
    ),
    pytest.param({"lower_order_final": False}, 7, id="no-lower-order"),
    pytest.param({"solver_order": 1}, 7, id="first-order"),
    pytest.param({"use_karras_sigmas": True}, 7, id="karras"),
    pytest.param(
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 20, id="karras-min"
    ),
    pytest.param(
        {
            "use_karras_sigmas": True,
            "beta_schedule": "squaredcos_cap_v2",  # which noise alone does not survive as epsilon
            "prediction_type": "v_prediction",
        },
        7,
        id="karras-cosine",
    ),
    pytest.param({"timestep_spacing": "leading", "steps_offset": 1}, 20, id="leading"),
    pytest.param({"timestep_spacing": "trailing"}, 20, id="trailing"),
    pytest.param({"prediction_type": "v_prediction"}, 20, id="v"),
    pytest.param({"prediction_type": "sample"}, 7, id="sample"),
    pytest.param({"beta_schedule": "scaled_linear"}, 20, id="scaled-linear"),
    pytest.param({"beta_schedule": "squaredcos_cap_v2"}, 7, id="cosine"),
    pytest.param({"variance_type": "learned_range"}, 20, id="learned-range"),
]


def reference(settings, steps, *, exact=True):
    """diffusers' scheduler; `exact` gives it noise levels in float64.

    In float32 it loses four digits of the share of noise in the first training step, and more of
    the share of data in the last ones of the cosine.
    """
    diffusers = pytest.importorskip("diffusers", reason="the reference is diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings)
    if exact:
        import torch

        scheduler.alphas_cumprod = torch.tensor(exact_levels(settings.get("beta_schedule")))
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # not by looking the first timestep up, which may be there twice
    return scheduler


def exact_levels(kind):
    """Products of 1 - beta in float64, each schedule by its formula."""
    if kind == "squaredcos_cap_v2":
        bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        return np.cumprod([max(b / a, 0.001) for a, b in itertools.pairwise(bar)])
    root = 2 if kind == "scaled_linear" else 1
    return np.cumprod(1 - np.linspace(0.0001 ** (1 / root), 0.02 ** (1 / root), 1000) ** root)


def trajectories(settings, steps, scheduler):
    """Ours and diffusers'."""
    kind = "range" if "variance_type" in settings else None
    ours = our_trajectory(DPMSolverSchedule(**settings).steps(steps), noise(), variance=kind)
    return ours, diffusers_trajectory(scheduler, partial(denoise_torch, variance=kind), noise())


@pytest.mark.parametrize(("settings", "steps"), CASES)
def test_every_step_equals_diffusers(settings, steps):
    found, expected = trajectories(settings, steps, reference(settings, steps))
    # data out of noise alone are the difference of numbers near 1, times 157
    assert_equal_steps(found, expected, 1e-4 if steps == 1 else 1e-5)


@pytest.mark.parametrize("steps", [14, 20])
def test_every_step_of_pixart_equals_diffusers_as_it_is(steps):
    assert_equal_steps(*trajectories({}, steps, reference({}, steps, exact=False)))


@pytest.mark.parametrize(("settings", "steps"), CASES)
def test_noise_levels_equal_diffusers(settings, steps):
    """It has them in float32."""
    scheduler = reference(settings, steps)
    timesteps, sigmas = DPMSolverSchedule(**settings).noise_levels(steps)
    np.testing.assert_array_equal(timesteps, scheduler.timesteps)
    np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=1e-6)


def test_every_number_of_steps_has_the_timesteps_of_diffusers():
    for spacing in ("linspace", "leading", "trailing"):
        scheduler = reference({"timestep_spacing": spacing}, 5)
        schedule = DPMSolverSchedule(timestep_spacing=spacing)
        for steps in range(1, 500):
            scheduler.set_timesteps(steps)
            np.testing.assert_array_equal(
                schedule.timesteps(steps), scheduler.timesteps[:steps], err_msg=f"{steps}"
            )


def test_pixart_is_published_with_the_defaults():
    assert DPMSolverSchedule() == PIXART_SCHEDULE
    steps = PIXART_SCHEDULE.steps(20)
    assert steps.std is None and steps.pull_before is not None
    assert steps.pull_before[0] == 0 == steps.pull_before[-1]
    assert (steps.pull_before[1:-1] < 0).all()


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_steps_that_would_come_twice_are_refused(spacing):
    """diffusers divides by the step between them, which is zero."""
    with pytest.raises(ValueError, match="steps is 1000: too many, some of the 1000 would come"):
        DPMSolverSchedule(timestep_spacing=spacing).steps(1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver_order": 3}, "solver_order is 3, none of: 1, 2"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type is 'one', none of: 'zero'"),
        ({"variance_type": "fixed"}, "variance_type is 'fixed', none of"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverSchedule(**changes)


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("karras", [False, True])
def test_impossible_numbers_of_steps_are_named(steps, karras):
    with pytest.raises(ValueError, match=f"steps is {steps}; the process has 1 to 1000"):
        DPMSolverSchedule(use_karras_sigmas=karras).steps(steps)
