"""Noise levels against diffusers, respaced steps against the published formulas."""

import numpy as np
import pytest

from lowbit_jax.samplers.ddpm import DDPMSchedule
from lowbit_jax.samplers.schedule import DiffusionSchedule, space_timesteps

SCHEDULES = {
    "linear": {},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 300, "beta_end": 0.05},
}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="the reference is diffusers")


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_levels_equal_diffusers(diffusers, name):
    """1e-5 relative: diffusers multiplies up to 1000 numbers in float32. The cosine's last levels,
    1e-6 and less, hang on betas near one, which its float32 betas have to 1e-6 or so."""
    expected = diffusers.DDPMScheduler(**SCHEDULES[name]).alphas_cumprod.double().numpy()
    found = DiffusionSchedule(**SCHEDULES[name]).alphas_cumprod()
    assert found.dtype == np.float64
    cut = len(found) - 5 * (name == "cosine")
    np.testing.assert_allclose(found[:cut], expected[:cut], rtol=1e-5)
    np.testing.assert_allclose(found[cut:], expected[cut:], rtol=1e-3)


def test_golden_noise_levels():
    """The published numbers of Ho et al.'s linear schedule."""
    levels = DiffusionSchedule().alphas_cumprod()
    assert levels[0] == pytest.approx(0.9999, abs=1e-12)
    assert levels[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert DiffusionSchedule(beta_schedule="squaredcos_cap_v2").betas()[-1] == 0.999


@pytest.mark.parametrize("total", [1000, 300])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_equal_diffusers(diffusers, spacing, offset, total):
    """All numbers of steps, even those where "trailing" is one step too long in diffusers."""
    settings = {
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "num_train_timesteps": total,
    }
    theirs, ours = diffusers.DDPMScheduler(**settings), DiffusionSchedule(**settings)
    for steps in range(1, total - 1):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy()[:steps]
        if expected[0] >= total:  # where diffusers would read past its table
            with pytest.raises(ValueError, match="steps_offset 1 takes the first"):
                ours.timesteps(steps)
            continue
        np.testing.assert_array_equal(ours.timesteps(steps), expected, err_msg=f"{steps}")


def published_spacing(total, sections):
    """The rule of IDDPM in its own terms: add a stride up, round, a section after the other."""
    size, extra = divmod(total, len(sections))
    start, taken = 0, []
    for index, count in enumerate(sections):
        length = size + 1 if index < extra else size
        stride = 1 if count <= 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            taken.append(start + round(position))
            position += stride
        start += length
    return sorted(taken, reverse=True)


@pytest.mark.parametrize("sections", ["250", "10,10", "10,15,20", "1,1,7,1", "1000", "3"])
@pytest.mark.parametrize("total", [1000, 1003])
def test_sections_equal_the_published_rule(sections, total):
    counts = [int(count) for count in sections.split(",")]
    found = space_timesteps(total, sections)
    assert found.tolist() == published_spacing(total, counts)
    assert found.dtype == np.int32


def test_every_number_of_steps_equals_the_published_rule():
    for steps in range(1, 1001):
        assert space_timesteps(1000, str(steps)).tolist() == published_spacing(1000, [steps])


def test_golden_sections():
    assert space_timesteps(1000, "5").tolist() == [999, 749, 500, 250, 0]  # 499.5 and 749.25
    assert space_timesteps(300, "2,3").tolist() == [299, 224, 150, 149, 0]
    assert space_timesteps(1000, "ddim4").tolist() == [750, 500, 250, 0]
    # the smallest whole stride that takes exactly 7 of 1000 steps is 143
    assert space_timesteps(1000, "ddim7").tolist() == list(range(858, -1, -143))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("1001", "a section of 1000 steps has no 1001"),
        ("10,501", "a section of 500 steps has no 501"),
        ("ddim999", "no whole stride takes 999 of 1000 steps"),
        ("ddim1", "no whole stride takes 1 of 1000"),
        ("0,10", "neither numbers of steps from 1"),
        ("ten", "neither numbers of steps"),
        ("", "neither numbers of steps"),
        ("ddim", "neither numbers of steps"),
        ("-5", "neither numbers of steps"),
    ],
)
def test_impossible_sections_are_named(sections, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(1000, sections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', none of: 'linear'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow', none of: 'epsilon'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even', none of: 'leading'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, not an integer from 1"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps is 10.5, not an integer"),
        ({"steps_offset": -1}, "steps_offset is -1, not an integer from 0"),
        ({"beta_start": 0.1}, "beta_start 0.1 and beta_end 0.02 are not"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSchedule(**changes)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_named(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; the process has 1 to 1000"):
        DiffusionSchedule().timesteps(steps)


def test_half_a_step_is_refused():
    with pytest.raises(TypeError):
        DiffusionSchedule().timesteps(7.5)


@pytest.mark.parametrize("timesteps", [[], [1, 2], [3, 3], [1000, 0], [5, -1], [[5], [3]]])
def test_steps_that_do_not_descend_are_refused(timesteps):
    with pytest.raises(ValueError, match="do not descend inside 0..999"):
        DDPMSchedule().steps_at(np.array(timesteps, np.int32))
