"""The loop itself: randomness, dtypes, channels, one trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.samplers.ddim import DDIMSchedule
from lowbit_jax.samplers.ddpm import DDPMSchedule
from lowbit_jax.samplers.dpm_solver import DPMSolverSchedule
from lowbit_jax.samplers.loop import Steps, sample
from lowbit_jax.samplers.rectified_flow import RectifiedFlowSchedule
from tests.samplers.trajectories import denoise_jax, noise

RUNS = {
    "ddpm": lambda n: DDPMSchedule().steps(n),
    "ddpm-learned": lambda n: DDPMSchedule(variance_type="learned_range").steps(n),
    "ddim": lambda n: DDIMSchedule().steps(n),
    "ddim-eta": lambda n: DDIMSchedule().steps(n, eta=0.5),
    "dpm-solver++": lambda n: DPMSolverSchedule().steps(n),
    "rectified-flow": lambda n: RectifiedFlowSchedule().steps(
        n, height=512, width=512, num_frames=1
    ),
}


def randomness(steps):
    return {} if steps.std is None else {"key": jax.random.key(0)}


@pytest.mark.parametrize("name", RUNS)
def test_the_denoiser_is_traced_once_whatever_the_number_of_steps(name):
    def traces(count):
        calls = []
        steps = RUNS[name](count)

        def counted(x, t):
            calls.append((t.shape, x.dtype, t.dtype))
            return denoise_jax(x, t, variance="range")

        program = jax.jit(lambda x, s: sample(counted, x, s, **randomness(s)))
        text = program.lower(noise(), steps).as_text()
        assert calls == [((2,), jnp.float32, steps.timestep.dtype)]
        return text.count("stablehlo.sine"), text.count("stablehlo.while")

    assert traces(3) == traces(50)
    assert traces(3)[0] == 2  # of the denoiser
    times = RUNS[name](3).timestep
    assert times.dtype == (np.float32 if name == "rectified-flow" else np.int32)


@pytest.mark.parametrize(
    "steps",
    [DDPMSchedule(clip_sample=False).steps(5), DDIMSchedule(clip_sample=False).steps(5, eta=0.5)],
    ids=["ddpm", "ddim"],
)
def test_a_key_gives_fresh_standard_normal_noise_in_every_step(steps):
    """The steps' own sums show it: a denoiser of zeros leaves a linear recursion of the noise."""
    zeros = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    start = np.zeros((4, 2, 64, 64), np.float32)

    @jax.jit
    def run(key, steps):
        return sample(zeros, start, steps, key=key)

    out = np.asarray(run(jax.random.key(1), steps))
    factor = np.asarray(steps.keep + steps.pull * steps.data_x, np.float64)
    rest = np.append(np.cumprod(factor[::-1])[::-1][1:], 1)
    expected = np.sqrt(np.sum((rest * steps.std) ** 2))  # independent in every step
    assert out.std() == pytest.approx(expected, rel=0.02)
    assert out.mean() == pytest.approx(0, abs=0.02 * expected)
    again, other = run(jax.random.key(1), steps), run(jax.random.key(2), steps)
    np.testing.assert_array_equal(again, out)
    assert np.abs(np.asarray(other) - out).max() > 0.1


def test_a_key_is_split_into_the_noise_of_the_steps():
    steps, key = DDPMSchedule().steps(5), jax.random.key(3)
    drawn = [jax.random.normal(k, noise().shape) for k in jax.random.split(key, 5)]
    run = jax.jit(lambda **random: sample(denoise_jax, noise(), steps, **random))
    given = run(step_noise=np.stack(drawn))
    np.testing.assert_allclose(run(key=key), given, rtol=0, atol=2e-6)  # fused in another order


@pytest.mark.parametrize("random", [{}, {"key": 0, "step_noise": np.zeros((5, 2, 3, 4, 5))}])
def test_steps_with_noise_need_one_source_of_it(random):
    with pytest.raises(ValueError, match="give either `key` or `step_noise`"):
        sample(denoise_jax, noise(), DDPMSchedule().steps(5), **random)


def test_steps_without_noise_refuse_a_source_of_it():
    with pytest.raises(ValueError, match="add no noise: give neither"):
        sample(denoise_jax, noise(), DDIMSchedule().steps(5), key=jax.random.key(0))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 2, 3, 4, 5\), not \(5, 2, 3, 4, 5\)"):
        sample(denoise_jax, noise(), DDPMSchedule().steps(5), step_noise=noise(0, (4, 2, 3, 4, 5)))


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="gives 4 channels; 3 channels of state need 3, or 6"):
        sample(lambda x, t: jnp.zeros((2, 4, 4, 5)), noise(), DDIMSchedule().steps(5))


def test_a_learned_variance_that_is_missing_is_refused():
    steps = DDPMSchedule(variance_type="learned_range").steps(5)
    with pytest.raises(ValueError, match="learned variance, and the denoiser gives none"):
        sample(denoise_jax, noise(), steps, key=jax.random.key(0))


def test_the_state_stays_float32():
    def model(x, t):
        assert x.dtype == jnp.float32
        return denoise_jax(x, t).astype(jnp.bfloat16)

    out = sample(model, jnp.asarray(noise(), jnp.bfloat16), DDIMSchedule().steps(3))
    assert out.dtype == jnp.float32


def test_the_formula_term_by_term():
    """One entry by hand: x = 2, out = 3, no data before; then x = 80.75, out = 3, data 1 before."""
    one = lambda *values: np.array(values, np.float32)  # noqa: E731
    steps = Steps(
        timestep=one(5, 6),
        keep=one(10, 1),
        push=one(20, 2),
        data_x=one(0.5, 0),
        data_out=one(1, 1),
        pull=one(0.25, 4),
        pull_before=one(100, -1),
        std=one(0.5, 0),
        clip=1.0,
    )
    start, extra = np.full((1, 1), 2, np.float32), one(1, 1).reshape(2, 1, 1)
    out = sample(lambda x, t: jnp.full_like(x, 3), start, steps, step_noise=extra)
    first = 10 * 2 + 20 * 3 + 0.25 * 1 + 0.5
    assert float(out[0, 0]) == first + 2 * 3 + 4 * 1 - 1
