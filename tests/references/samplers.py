"""Samplers as their publishers run them: diffusers' schedulers driven step by step.

Shares nothing with `lowbit_jax.samplers`. `torch` is imported where it is used, so that the
formulas in plain NumPy of the other tests need none.
"""

import numpy as np


def diffusers_trajectory(scheduler, denoiser, noise, step_noise=None, seed=None, **step_options):
    """The state after each step, as arrays.

    Args:
        scheduler: one of diffusers, after `set_timesteps`.
        denoiser: takes a float32 tensor and a tensor of one timestep per entry.
        noise: start, an array.
        step_noise: noise of each step, for schedulers that take it.
        seed: of the generator from which a scheduler draws its noise otherwise.
        step_options: of the scheduler's `step`, such as eta.
    """
    import torch

    x = torch.tensor(noise)
    if seed is not None:
        step_options["generator"] = torch.Generator().manual_seed(seed)
    found = []
    for i, timestep in enumerate(scheduler.timesteps):
        if step_noise is not None:
            step_options["variance_noise"] = torch.tensor(step_noise[i])
        with torch.no_grad():
            out = denoiser(x, timestep.expand(len(x)))
            x = scheduler.step(out, timestep, x, **step_options).prev_sample
        found.append(x.numpy())
    return np.stack(found)


def generator_noise(seed, shape, steps):
    """The noise that a scheduler draws, step by step, from a torch generator of this seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return np.stack([torch.randn(shape, generator=generator).numpy() for _ in range(steps)])
