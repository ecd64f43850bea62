"""Euler integration of a rectified flow, with FLUX's shifted schedules.

Time runs from sigma 1 (noise) to 0 (picture); the model gives the velocity dx/dsigma. Equal to
diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from lowbit_jax.samplers import loop
from lowbit_jax.samplers.settings import read_settings

_FIXED = {
    "num_train_timesteps": 1000,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Noise levels of a sampler, fields as in a diffusers `scheduler_config.json`.

    Attributes:
        shift: static shift s, sigma' = s sigma / (1 + (s - 1) sigma); ignored when dynamic.
        use_dynamic_shifting: shift by e^mu, mu linear in the number of image tokens (FLUX.1-dev).
        base_shift: mu at `base_image_seq_len` tokens.
        max_shift: mu at `max_image_seq_len` tokens.
        base_image_seq_len: see `base_shift`.
        max_image_seq_len: see `max_shift`.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> FlowSchedule:
        """The schedule of a diffusers `scheduler_config.json`.

        Raises:
            ValueError: another scheduler, an unknown setting or one that is not ported.
        """
        return read_settings(
            FlowSchedule, config, scheduler="FlowMatchEulerDiscreteScheduler", fixed=_FIXED
        )

    def sigmas(self, steps: int, image_tokens: int) -> Float32[np.ndarray, "steps+1"]:
        """The `steps + 1` noise levels from 1 down to exactly 0, computed in float64.

        Raises:
            ValueError: fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; a sampler takes at least 1")
        sigma = np.linspace(1.0, 1.0 / steps, steps)
        shift = math.exp(self._mu(image_tokens)) if self.use_dynamic_shifting else self.shift
        sigma = shift * sigma / (1.0 + (shift - 1.0) * sigma)
        return np.append(sigma, 0.0).astype(np.float32)

    def _mu(self, image_tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return self.base_shift + slope * (image_tokens - self.base_image_seq_len)


FLUX_DEV_SCHEDULE = FlowSchedule(shift=3.0, use_dynamic_shifting=True)
FLUX_SCHNELL_SCHEDULE = FlowSchedule()
FLUX_DEV_GUIDANCE = 3.5  # the usual distilled guidance scale


def sample(
    velocity: Callable[[Float[Array, "b ..."], Float32[Array, "b"]], Float[Array, "b ..."]],
    noise: Float[Array, "b ..."],
    sigmas: Float32[Array, "steps+1"],
) -> Float32[Array, "b ..."]:
    """Integrate from `noise` to a picture: `x += (sigma[i+1] - sigma[i]) * velocity(x, sigma[i])`.

    One `lax.scan`, so a jitted call compiles the denoiser once whatever the number of steps. The
    state is kept in float32.

    Args:
        velocity: the denoiser; takes the state and one time per batch entry, in [0, 1].
        noise: standard normal start.
        sigmas: noise levels, see `FlowSchedule.sigmas`.
    """

    return loop.sample(velocity, noise, euler_steps(sigmas))


def euler_steps(sigmas: Float32[Array, "steps+1"] | Float32[np.ndarray, "steps+1"]) -> loop.Steps:
    """The same as steps of `lowbit_jax.samplers.loop`."""
    levels = jnp.asarray(sigmas, jnp.float32)
    ones = jnp.ones(len(levels) - 1, jnp.float32)
    return loop.Steps(timestep=levels[:-1], keep=ones, push=levels[1:] - levels[:-1])
