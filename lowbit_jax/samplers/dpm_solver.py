"""DPM-Solver++ (Lu et al. 2022), multistep, first and second order (2M): PixArt's sampler.

Equal to diffusers' `DPMSolverMultistepScheduler`. Run the steps with
`lowbit_jax.samplers.loop.sample`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32

from lowbit_jax.samplers.loop import Steps
from lowbit_jax.samplers.schedule import FIXED, IDLE, DiffusionSchedule
from lowbit_jax.samplers.settings import read_settings, require

RHO = 7.0  # of Karras et al. 2022, eq. 5
SHORT_RUN = 15  # `lower_order_final` acts on runs of fewer steps

_FIXED = FIXED | {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": -math.inf,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}
_IDLE = (*IDLE, "flow_shift", "time_shift_type")


@dataclass(frozen=True, kw_only=True)
class DPMSolverSchedule(DiffusionSchedule):
    """A diffusion sampled by DPM-Solver++ with midpoint steps.

    Attributes:
        solver_order: 1 (which is DDIM) or 2.
        lower_order_final: the last of fewer than 15 steps is of first order.
        euler_at_final: the last step is of first order.
        final_sigmas_type: where the last step ends: "zero" (which makes it one of first order) or
            "sigma_min", the noise of the first training step.
        use_karras_sigmas: noise levels of Karras et al. instead of `timestep_spacing`.
        variance_type: "learned" or "learned_range" for models that give a variance; it is dropped
            (diffusers then keeps the first three channels, whatever their number).
    """

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    use_karras_sigmas: bool = False
    variance_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require("solver_order", self.solver_order, (1, 2))
        require("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        require("variance_type", self.variance_type, (None, "learned", "learned_range"))

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> DPMSolverSchedule:
        """The schedule of a diffusers `scheduler_config.json`.

        Raises:
            ValueError: another scheduler, an unknown setting or one that is not ported.
        """
        return read_settings(
            DPMSolverSchedule,
            config,
            scheduler="DPMSolverMultistepScheduler",
            fixed=_FIXED,
            idle=_IDLE,
        )

    def timesteps(self, steps: int) -> Int32[np.ndarray, "n"]:
        """The training steps of a run: those of one step more, without its last.

        Raises:
            ValueError: a number of steps that the process does not have.
        """
        return self._spaced(steps, steps + 1)

    def noise_levels(self, steps: int) -> tuple[Int32[np.ndarray, "n"], Float64[np.ndarray, "n+1"]]:
        """Timesteps and sigmas = sqrt((1 - a) / a), with the one the run ends at.

        Raises:
            ValueError: a number of steps that the process does not have.
        """
        levels = self.alphas_cumprod()
        sigmas = np.sqrt((1 - levels) / levels)
        last = sigmas[0] if self.final_sigmas_type == "sigma_min" else 0.0
        if not self.use_karras_sigmas:
            timesteps = self.timesteps(steps)
            return timesteps, np.append(sigmas[timesteps], last)
        self.check_steps(steps)
        ends = sigmas[-1] ** (1 / RHO), sigmas[0] ** (1 / RHO)
        found = np.linspace(*ends, steps) ** RHO
        positions = np.interp(np.log(found), np.log(sigmas), np.arange(len(sigmas)))
        if self.beta_schedule != "squaredcos_cap_v2":  # diffusers cuts those off instead
            positions = positions.round()
        return positions.astype(np.int32), np.append(found, last)

    def steps(self, steps: int) -> Steps:
        """A run of `steps` steps; deterministic.

        Raises:
            ValueError: a number of steps that the process does not have.
        """
        timesteps, sigmas = self.noise_levels(steps)
        now, then = sigmas[:-1], sigmas[1:]
        noise = sigmas / np.sqrt(sigmas**2 + 1)  # share of the noise, sqrt(1 - a)
        gain = (1 - then / now) / np.sqrt(then**2 + 1)  # alpha (1 - e^-h), as e^-lambda is sigma
        # D1 / 2 = (data - data_before) / (2 r), with r = h_before / h
        half = np.zeros(steps)
        second = range(1, steps - self._first_order_final(steps))
        if self.solver_order == 2:
            h = np.log(now[: second.stop] / then[: second.stop])
            half[second] = 0.5 * h[1:] / h[:-1]
        predict = self.predict(1 / (now**2 + 1))
        return Steps.of(
            timesteps,
            keep=noise[1:] / noise[:-1],
            pull=gain * (1 + half),
            pull_before=-gain * half if self.solver_order == 2 else None,
            data_x=predict.data_x,
            data_out=predict.data_out,
        )

    def _first_order_final(self, steps: int) -> bool:
        return (
            self.euler_at_final
            or (self.lower_order_final and steps < SHORT_RUN)
            or self.final_sigmas_type == "zero"
        )


# PixArt-alpha and PixArt-sigma as diffusers publishes them: every setting at its default
PIXART_SCHEDULE = DPMSolverSchedule()
