"""A whole sampling run by name: ours compiled, and as the publishers run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from lowbit_jax.samplers import flow_euler, loop
from lowbit_jax.samplers.ddim import DDIMSchedule
from lowbit_jax.samplers.ddpm import DIT_SCHEDULE
from lowbit_jax.samplers.dpm_solver import PIXART_SCHEDULE
from lowbit_jax.samplers.rectified_flow import OPENSORA_1_2_SCHEDULE
from tests.references.samplers import (
    diffusers_trajectory,
    generator_noise,
    opensora_times,
    opensora_trajectory,
)

STEPS = 20
SEED = 5  # of the noise that DDPM adds
SHIFT = 3.0  # of the flow
VIDEO = {"height": 240, "width": 426, "num_frames": 51}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One sampler, run for `STEPS` steps from noise to its last state.

    Attributes:
        ours: takes a traceable denoiser (x, timesteps) and noise.
        theirs: takes the reference's denoiser over NumPy arrays and noise.
    """

    ours: Callable[[Any, Any], Any]
    theirs: Callable[[Any, np.ndarray], np.ndarray]


def _scheduled(scheduler: Any, *, variance: bool = False, **options: Any) -> Callable:
    """A run of a diffusers scheduler, whose model's variance is dropped unless it uses it."""

    def run(denoise, noise):
        def denoiser(x, timestep):
            out = torch.tensor(denoise(x.numpy(), timestep.numpy())).float()
            return out if variance else out[:, : x.shape[1]]

        scheduler.set_timesteps(STEPS)
        return diffusers_trajectory(scheduler, denoiser, noise, **options)[-1]

    return run


def _flow(denoise, noise):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))

    def denoiser(x, timestep):
        return torch.tensor(denoise(x.numpy(), timestep.numpy() / 1000)).float()

    return diffusers_trajectory(scheduler, denoiser, noise)[-1]


def _rectified(denoise, noise):
    def denoiser(x, timestep):
        return denoise(x.astype(np.float32), timestep.astype(np.float32))[:, : x.shape[1]]

    times = opensora_times(STEPS, **VIDEO)
    return opensora_trajectory(denoiser, times, noise)[-1]


def _ddpm(denoiser, noise):
    step_noise = generator_noise(SEED, noise.shape, STEPS)
    return loop.sample(denoiser, noise, DIT_SCHEDULE.steps(STEPS), step_noise=step_noise)


def _deterministic(steps: loop.Steps) -> Callable:
    return lambda denoiser, noise: loop.sample(denoiser, noise, steps)


RUNS = {
    "flow-euler": Run(
        ours=lambda denoiser, noise: flow_euler.sample(
            denoiser, noise, flow_euler.FlowSchedule(shift=SHIFT).sigmas(STEPS, noise.shape[1])
        ),
        theirs=_flow,
    ),
    "ddpm": Run(
        ours=_ddpm,
        theirs=_scheduled(
            diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False),
            variance=True,
            seed=SEED,
        ),
    ),
    "ddim": Run(
        ours=_deterministic(DDIMSchedule(clip_sample=False).steps(STEPS)),
        theirs=_scheduled(diffusers.DDIMScheduler(clip_sample=False)),
    ),
    "dpm-solver++": Run(
        ours=_deterministic(PIXART_SCHEDULE.steps(STEPS)),
        theirs=_scheduled(diffusers.DPMSolverMultistepScheduler()),
    ),
    "rectified-flow": Run(
        ours=_deterministic(OPENSORA_1_2_SCHEDULE.steps(STEPS, **VIDEO)), theirs=_rectified
    ),
}
