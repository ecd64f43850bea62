"""The diffusion process that DDPM, DDIM and DPM-Solver share: noise levels and the steps taken.

All of it is computed on the host in float64, once per run: only the coefficients of the steps reach
the compiled loop (`lowbit_jax.samplers.loop`), as float32.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32

from lowbit_jax.samplers.settings import require

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
MAX_BETA = 0.999  # of the cosine schedule, whose last beta would be 1

# Settings of diffusers' schedulers of which only one value is ported, and those idle beside it.
FIXED = {"trained_betas": None, "thresholding": False, "rescale_betas_zero_snr": False}
IDLE = ("dynamic_thresholding_ratio", "sample_max_value")


class Prediction(NamedTuple):
    """Data and noise as sums of the state x and the model's output: `data_x * x + data_out * out`.

    Each a float64 array, one entry per step.
    """

    data_x: Float64[np.ndarray, "n"]
    data_out: Float64[np.ndarray, "n"]
    noise_x: Float64[np.ndarray, "n"]
    noise_out: Float64[np.ndarray, "n"]


@dataclass(frozen=True, kw_only=True)
class DiffusionSchedule:
    """A variance-preserving diffusion, x_t = sqrt(a_t) data + sqrt(1 - a_t) noise (Ho et al. 2020).

    a_t, here "alphas_cumprod", is the product of 1 - beta up to step t. Fields are named as in
    diffusers' `scheduler_config.json`.

    Attributes:
        num_train_timesteps: number of steps of the process the model was trained on.
        beta_start: first beta of the linear schedules.
        beta_end: last beta of the linear schedules.
        beta_schedule: "linear" in beta, "scaled_linear" in sqrt(beta), or "squaredcos_cap_v2".
        prediction_type: what the model gives: "epsilon" (noise), "sample" (data) or "v_prediction"
            (sqrt(a) noise - sqrt(1 - a) data).
        timestep_spacing: which steps a shorter run takes, see `timesteps`.
        steps_offset: added to the steps of "leading" spacing.

    Raises:
        ValueError: a value that is none of the above.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        require("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        require("prediction_type", self.prediction_type, PREDICTIONS)
        require("timestep_spacing", self.timestep_spacing, SPACINGS)
        for name, value, least in (
            ("num_train_timesteps", self.num_train_timesteps, 1),
            ("steps_offset", self.steps_offset, 0),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, not an integer from {least}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} are not 0 < start <= "
                "end < 1"
            )

    def betas(self) -> Float64[np.ndarray, "train"]:
        """Variance that each training step adds."""
        count = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), count) ** 2
        # Nichol & Dhariwal 2021, eq. 17
        left = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - left[1:] / left[:-1], MAX_BETA)

    def alphas_cumprod(self) -> Float64[np.ndarray, "train"]:
        """Share a_t of the data's variance that is left after each training step."""
        return np.cumprod(1 - self.betas())

    def timesteps(self, steps: int) -> Int32[np.ndarray, "n"]:
        """The training steps that a run of `steps` steps takes, descending.

        "leading": multiples of T // steps from 0 (plus `steps_offset`); "trailing": multiples of
        T / steps down from T - 1; "linspace": from 0 to T - 1, both included. Lin et al. 2023,
        table 2.

        Raises:
            ValueError: a number of steps that the process does not have.
        """
        return self._spaced(steps, steps)

    def _spaced(self, steps: int, grid: int) -> Int32[np.ndarray, "n"]:
        """The last `steps` of `grid` spaced steps, descending."""
        total = self.num_train_timesteps
        self.check_steps(steps)
        if self.timestep_spacing == "trailing":
            # rounded as diffusers does; where float noise gives it one step more, -1, it is cut off
            found = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
        elif self.timestep_spacing == "linspace":
            found = np.linspace(0, total - 1, grid).round()[::-1][:steps]
        else:
            found = (np.arange(grid) * (total // grid))[::-1][:steps] + self.steps_offset
        if found[0] >= total:
            raise ValueError(
                f"steps_offset {self.steps_offset} takes the first of {steps} steps to "
                f"{found[0]:.0f}, the last of the process is {total - 1}"
            )
        if not (np.diff(found) < 0).all():
            raise ValueError(f"steps is {steps}: too many, some of the {total} would come twice")
        return found.astype(np.int32)

    def check_steps(self, steps: int) -> None:
        """Check a number of steps.

        Raises:
            ValueError: fewer than one, or more than the process has.
            TypeError: not a whole number.
        """
        steps = operator.index(steps)
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"steps is {steps}; the process has 1 to {self.num_train_timesteps}")

    def predict(self, alphas_cumprod: Float64[np.ndarray, "n"]) -> Prediction:
        """Data and noise from state and output where the data's share is `alphas_cumprod`."""
        a, b = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
        zero, one = np.zeros_like(a), np.ones_like(a)
        if self.prediction_type == "epsilon":
            return Prediction(1 / a, -b / a, zero, one)
        if self.prediction_type == "sample":
            return Prediction(zero, one, 1 / b, -a / b)
        return Prediction(a, -b, b, a)

    def check_descending(self, timesteps: Int32[np.ndarray, "n"]) -> np.ndarray:
        """Steps that a caller chose, as an array.

        Raises:
            ValueError: not descending, or not steps of the process.
        """
        found, last = np.asarray(timesteps), self.num_train_timesteps - 1
        inside = found.ndim == 1 and found.size and found[0] <= last and found[-1] >= 0
        if not inside or not (np.diff(found) < 0).all():
            raise ValueError(f"timesteps {found.tolist()} do not descend inside 0..{last}")
        return found.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class ClippedSchedule(DiffusionSchedule):
    """A diffusion whose predicted data may be clipped, for models of pixels.

    Attributes:
        clip_sample: whether.
        clip_sample_range: largest magnitude then.
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range is {self.clip_sample_range}, not above 0")

    @property
    def clip(self) -> float | None:
        """Largest magnitude of the predicted data; None where it is not clipped."""
        return self.clip_sample_range if self.clip_sample else None


def space_timesteps(total: int, sections: str) -> Int32[np.ndarray, "n"]:
    """The steps of an IDDPM run, descending (Nichol & Dhariwal 2021; DiT, Latte, OpenSORA 1.0).

    Args:
        total: number of training steps.
        sections: how many steps to take from each of equal sections of the process: "250" from the
            whole, "10,20" from the earlier (less noisy) and later half, first and last step of a
            section included. "ddim50": 50 steps at the smallest whole stride that gives 50.

    Raises:
        ValueError: sections that the process cannot be divided into.
    """
    if sections.startswith("ddim"):
        count = _count(sections.removeprefix("ddim"), sections)
        for whole in range(1, total):
            if len(range(0, total, whole)) == count:
                return np.arange(0, total, whole, dtype=np.int32)[::-1]
        raise ValueError(f"'{sections}': no whole stride takes {count} of {total} steps")
    counts = [_count(word, sections) for word in sections.split(",")]
    size, longer = divmod(total, len(counts))
    found: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        length = size + (index < longer)
        if count > length:
            raise ValueError(f"'{sections}': a section of {length} steps has no {count}")
        stride = (length - 1) / max(count - 1, 1)
        # added up, as published: multiples would round to other steps for 278 of 1000 counts
        positions = np.cumsum([0.0] + [stride] * (count - 1))
        found += [start + round(position) for position in positions.tolist()]
        start += length
    return np.array(found[::-1], np.int32)


def _count(word: str, sections: str) -> int:
    if not word.strip().isdecimal() or int(word) < 1:
        raise ValueError(f"'{sections}' is neither numbers of steps from 1 nor 'ddim' and a number")
    return int(word)
