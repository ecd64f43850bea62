"""Samplers as their publishers run them: diffusers' schedulers driven step by step, and formulas.

Shares nothing with `lowbit_jax.samplers`. `torch` is imported where it is used, so that the
formulas in plain NumPy need none.
"""

import math

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


def dit_trajectory(denoiser, timesteps, variance, clip, start, step_noise):
    """DiT's `p_sample_loop` in float64 from its formulas: a process of respaced betas.

    `denoiser` takes float64 arrays and gives prediction and variance; `timesteps` descend.
    """
    betas = np.linspace(0.0001, 0.02, 1000)
    kept = np.cumprod(1 - betas)[timesteps[::-1]]
    betas = 1 - kept / np.append(1.0, kept[:-1])
    bar = np.cumprod(1 - betas)
    bar_before = np.append(1.0, bar[:-1])
    posterior = betas * (1 - bar_before) / (1 - bar)
    clipped = np.append(posterior[1], posterior[1:])  # the first is zero, and has no logarithm
    x, found = start.astype(np.float64), []
    for i in range(len(betas))[::-1]:
        out = denoiser(x, np.full(len(x), float(timesteps[::-1][i])))
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


def opensora_times(steps, height, width, num_frames, *, discrete=False, transform=True):
    """OpenSORA 1.2's list of times and `timestep_transform`, worked through number by number."""
    times = []
    for i in range(steps):
        t = (1.0 - i / steps) * 1000
        t = int(round(t)) if discrete else t
        if transform:
            space = math.sqrt(height * width / (512 * 512))
            frames = 1 if num_frames == 1 else num_frames // 17 * 5
            ratio = space * math.sqrt(frames / 1)
            t = t / 1000
            t = ratio * t / (1 + (ratio - 1) * t) * 1000
        times.append(t)
    return times


def opensora_trajectory(denoiser, times, start):
    """OpenSORA 1.2's loop in float64: z += v dt / 1000, v = data - noise, down to time 0."""
    z, found = start.astype(np.float64), []
    for i, t in enumerate(times):
        v = denoiser(z, np.full(len(z), t))
        then = times[i + 1] if i + 1 < len(times) else 0.0
        z = z + v * (t - then) / 1000
        found.append(z)
    return np.stack(found)
