"""Denoising diffusion implicit models (Song et al. 2021), eq. 12 and 16.

Equal to diffusers' `DDIMScheduler`. Run the steps with `lowbit_jax.samplers.loop.sample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32

from lowbit_jax.samplers.loop import Steps
from lowbit_jax.samplers.schedule import FIXED, IDLE, ClippedSchedule
from lowbit_jax.samplers.settings import read_settings


@dataclass(frozen=True, kw_only=True)
class DDIMSchedule(ClippedSchedule):
    """A diffusion sampled by DDIM; as in diffusers, the noise stays that of the unclipped data.

    Attributes:
        set_alpha_to_one: the last step goes to pure data; otherwise to the first training step.
    """

    set_alpha_to_one: bool = True

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> DDIMSchedule:
        """The schedule of a diffusers `scheduler_config.json`.

        Raises:
            ValueError: another scheduler, an unknown setting or one that is not ported.
        """
        return read_settings(
            DDIMSchedule, config, scheduler="DDIMScheduler", fixed=FIXED, idle=IDLE
        )

    def steps(self, steps: int, *, eta: float = 0.0) -> Steps:
        """A run of `steps` steps at diffusers' `timestep_spacing`.

        As in diffusers a step goes T // steps back, which with "trailing" or "linspace" spacing is
        not quite where the next one starts.

        Args:
            steps: how many.
            eta: 0 is deterministic, 1 adds the noise of DDPM.

        Raises:
            ValueError: a number of steps that the process does not have, or eta outside 0..1.
        """
        timesteps = self.timesteps(steps)
        return self._steps(timesteps, timesteps - self.num_train_timesteps // steps, eta)

    def steps_at(self, timesteps: Int32[np.ndarray, "n"], *, eta: float = 0.0) -> Steps:
        """A run over chosen training steps, descending, each to the next; see `steps`.

        Raises:
            ValueError: not descending, not steps of the process, or eta outside 0..1.
        """
        timesteps = self.check_descending(timesteps)
        return self._steps(timesteps, np.append(timesteps[1:], -1), eta)

    def _steps(self, timesteps: np.ndarray, before: np.ndarray, eta: float) -> Steps:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it is from 0 (deterministic) to 1 (DDPM)")
        levels = self.alphas_cumprod()
        last = 1.0 if self.set_alpha_to_one else levels[0]
        now, then = levels[timesteps], np.where(before >= 0, levels[before], last)
        std = eta * _deviation(now, then)
        predict = self.predict(now)
        direction = np.sqrt(1 - then - std**2)
        return Steps.of(
            timesteps,
            keep=direction * predict.noise_x,
            push=direction * predict.noise_out,
            pull=np.sqrt(then),
            data_x=predict.data_x,
            data_out=predict.data_out,
            std=std if eta else None,
            clip=self.clip,
        )


def _deviation(
    now: Float64[np.ndarray, "n"], then: Float64[np.ndarray, "n"]
) -> Float64[np.ndarray, "n"]:
    """Standard deviation of DDPM's posterior, eq. 16 with eta = 1."""
    return np.sqrt((1 - then) / (1 - now) * (1 - now / then))


# DiT as diffusers publishes it
DIT_SCHEDULE = DDIMSchedule(clip_sample=False)
