"""What the tests of the samplers share: a denoiser for every array library, and our states."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.samplers.loop import sample

SHAPE = (2, 3, 4, 5)


def noise(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def denoise(x, t, variance, sin, join):
    """Depends on the state and the time of each entry; smooth, so that roundings do not grow.

    With a variance, twice the channels: from -0.9 to 0.9 ("range") or near 0.02 ("itself").
    """
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    out = 0.8 * x + 0.3 * sin(2 * x + t / 200)
    if variance is None:
        return out
    wave = sin(5 * x + t / 100)
    return join([out, 0.9 * wave if variance == "range" else 0.02 + 0.01 * wave], 1)


def denoise_jax(x, t, *, variance=None):
    return denoise(x, t.astype(jnp.float32), variance, jnp.sin, jnp.concatenate)


def denoise_torch(x, t, *, variance=None):
    import torch

    return denoise(x, t.float(), variance, torch.sin, torch.cat)


def denoise_numpy(x, t, *, variance=None):
    return denoise(x, t, variance, np.sin, np.concatenate)


def stopped(steps, count):
    """The same steps, which after the first `count` leave the state alone: nothing to compile."""

    def cut(name, array):
        after = np.arange(len(steps)) >= count
        return np.where(after, np.float32(name == "keep"), array)

    arrays = {
        name: cut(name, value)
        for name, value in vars(steps).items()
        if isinstance(value, np.ndarray) and name not in ("timestep", "data_x", "data_out")
    }
    return dataclasses.replace(steps, **arrays)


@partial(jax.jit, static_argnames=("variance",))
def run(start, steps, step_noise, variance=None):
    denoiser = partial(denoise_jax, variance=variance)
    return sample(denoiser, start, steps, step_noise=step_noise)


def our_trajectory(steps, start, step_noise=None, variance=None):
    """The state after each step."""
    states = [run(start, stopped(steps, i + 1), step_noise, variance) for i in range(len(steps))]
    return np.stack(states)


def assert_equal_steps(found, expected, tolerance=1e-5):
    """Every state within `tolerance` of the largest number of that state, and something moved."""
    assert found.shape == expected.shape
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), f"step {i}"
    assert len(expected) == 1 or np.abs(np.diff(expected, axis=0)).max() > 0.01
