"""Ancestral sampling (Ho et al. 2020), with the variances of IDDPM (Nichol & Dhariwal 2021).

Equal to diffusers' `DDPMScheduler`, and on `space_timesteps` to the sampling of DiT's published
code. Run the steps with `lowbit_jax.samplers.loop.sample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from lowbit_jax.samplers.loop import Steps
from lowbit_jax.samplers.schedule import FIXED, IDLE, ClippedSchedule
from lowbit_jax.samplers.settings import read_settings, require

# diffusers' "fixed_large_log" takes the root of a logarithm, so that it is left out
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
LEAST_VARIANCE = 1e-20  # diffusers' clamp, before a logarithm


@dataclass(frozen=True, kw_only=True)
class DDPMSchedule(ClippedSchedule):
    """A diffusion sampled by its posterior.

    Attributes:
        variance_type: of the noise added: "fixed_small" (of the posterior; "fixed_small_log" is the
            same), "fixed_large" (beta), "learned_range" (the model's second half of channels, -1 to
            1, interpolates between the logarithms of the two; IDDPM eq. 15) or "learned" (that half
            is the variance itself).
    """

    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("variance_type", self.variance_type, VARIANCES)

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> DDPMSchedule:
        """The schedule of a diffusers `scheduler_config.json`.

        Raises:
            ValueError: another scheduler, an unknown setting or one that is not ported.
        """
        return read_settings(
            DDPMSchedule, config, scheduler="DDPMScheduler", fixed=FIXED, idle=IDLE
        )

    def steps(self, steps: int) -> Steps:
        """A run of `steps` steps at diffusers' `timestep_spacing`.

        Raises:
            ValueError: a number of steps that the process does not have.
        """
        return self.steps_at(self.timesteps(steps))

    def steps_at(self, timesteps: Int32[np.ndarray, "n"]) -> Steps:
        """A run over chosen training steps, descending, such as those of `space_timesteps`.

        Raises:
            ValueError: not descending, or not steps of the process.
        """
        timesteps = self.check_descending(timesteps)
        now = self.alphas_cumprod()[timesteps]
        then = np.append(now[1:], 1.0)
        alpha = now / then
        beta = 1 - alpha
        predict = self.predict(now)
        small = np.maximum(beta * (1 - then) / (1 - now), LEAST_VARIANCE)
        variance = {"fixed_large": beta, "learned": np.ones_like(beta)}
        noisy = timesteps > 0
        ratio = 0.5 * np.log(beta / small) * noisy
        return Steps.of(
            timesteps,
            keep=np.sqrt(alpha) * (1 - then) / (1 - now),
            pull=np.sqrt(then) * beta / (1 - now),
            data_x=predict.data_x,
            data_out=predict.data_out,
            std=np.sqrt(variance.get(self.variance_type, small)) * noisy,
            log_std_range=ratio if self.variance_type == "learned_range" else None,
            learned_variance=self.variance_type == "learned",
            clip=self.clip,
        )


# DiT as published: linear betas over 1000 steps, learned range, nothing clipped, and steps of
# `space_timesteps(1000, "250")`. Latte and OpenSORA 1.0 sample the same way.
DIT_SCHEDULE = DDPMSchedule(variance_type="learned_range", clip_sample=False)
