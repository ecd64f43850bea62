"""Rectified flow as OpenSORA 1.2 samples it: STDiT3's sampler ("rflow" in its configs).

Times run from 1000 (noise) to 0 (data), x = t/1000 noise + (1 - t/1000) data, and the model gives
dx in the direction of the data, v = data - noise: its sign is opposite to FLUX's
(`lowbit_jax.samplers.flow_euler`). Run the steps with `lowbit_jax.samplers.loop.sample`, which
drops the second half of STDiT3's channels, as OpenSORA does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from lowbit_jax.samplers.loop import Steps
from lowbit_jax.samplers.settings import read_settings, require

# Latent frames per clip of pixel frames in OpenSORA's VAE, hard-coded in its time transform.
CLIP, LATENT_CLIP = 17, 5
PREDICTIONS = ("velocity", "sample")
SCHEDULER = "RFLOW"  # OpenSORA's class
# settings of it that its sampler ignores (how training draws times), or that a run is told
_IDLE = ("sample_method", "loc", "scale", "num_sampling_steps", "cfg_scale")


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowSchedule:
    """Times of OpenSORA's `RFLOW`; fields as there, but for the last two.

    Attributes:
        num_timesteps: time of pure noise.
        use_discrete_timesteps: round times to whole numbers, before the transform.
        use_timestep_transform: shift times towards noise for larger and longer videos.
        base_resolution: pixels of a picture whose times are not shifted.
        base_num_frames: latent frames of a video whose times are not shifted.
        prediction_type: what the model gives: "velocity" (as OpenSORA) or "sample" (the data, from
            which the velocity follows: data - noise = (data - x) / t at t in [0, 1]).
        ratio: r of the transform whatever the size, for models of one size; None: by the size.

    Raises:
        ValueError: another prediction type, or a ratio that is no number above 0.
    """

    num_timesteps: int = 1000
    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = True
    base_resolution: int = 512 * 512
    base_num_frames: int = 1
    prediction_type: str = "velocity"
    ratio: float | None = None

    def __post_init__(self) -> None:
        require("prediction_type", self.prediction_type, PREDICTIONS)
        is_number = type(self.ratio) in (int, float)
        if self.ratio is not None and not (is_number and 0 < self.ratio < math.inf):
            raise ValueError(f"ratio is {self.ratio!r}, no number above 0")

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> RectifiedFlowSchedule:
        """The schedule of a `scheduler_config.json` with the settings of OpenSORA's `RFLOW`.

        OpenSORA keeps them in its configs and diffusers has no such class, so the file's form is
        diffusers' and its names are OpenSORA's and this class's.

        Raises:
            ValueError: another scheduler, an unknown setting or one that is not ported.
        """
        return read_settings(
            RectifiedFlowSchedule,
            config,
            scheduler=SCHEDULER,
            fixed={"transform_scale": 1.0},
            idle=_IDLE,
        )

    @property
    def takes_size(self) -> bool:
        """Whether times depend on the size of a video."""
        return self.use_timestep_transform and self.ratio is None

    def timesteps(
        self, steps: int, *, height: int = 0, width: int = 0, num_frames: int = 0
    ) -> Float64[np.ndarray, "n"]:
        """The `steps` times from `num_timesteps` down, t' = r t / (1 + (r - 1) t) at t in [0, 1].

        r is `ratio`, or sqrt(pixels / `base_resolution`) times sqrt(latent frames /
        `base_num_frames`).

        Args:
            steps: how many.
            height: pixels; the size is not needed unless the schedule `takes_size`.
            width: pixels.
            num_frames: 1 for a picture, or a video's frames; whole clips of 17 count.

        Raises:
            ValueError: fewer than one step, an empty size, or a video of less than one clip.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; a sampler takes at least 1")
        times = np.arange(steps, 0, -1) / steps
        if self.use_discrete_timesteps:
            times = np.round(times * self.num_timesteps) / self.num_timesteps
        if self.use_timestep_transform:
            ratio = self.ratio or self._ratio_of(height, width, num_frames)
            times = ratio * times / (1 + (ratio - 1) * times)
        return times * self.num_timesteps

    def _ratio_of(self, height: int, width: int, num_frames: int) -> float:
        if min(height, width, num_frames) < 1:
            raise ValueError(f"a video of {num_frames} frames of {height} x {width} pixels")
        frames = 1 if num_frames == 1 else num_frames // CLIP * LATENT_CLIP
        if not frames:
            raise ValueError(
                f"num_frames is {num_frames}; the time transform takes 1, or a video of at "
                f"least one clip of {CLIP}"
            )
        space = math.sqrt(height * width / self.base_resolution)
        return space * math.sqrt(frames / self.base_num_frames)

    def steps(self, steps: int, *, height: int = 0, width: int = 0, num_frames: int = 0) -> Steps:
        """Euler steps of a run, the last one to time 0; arguments as for `timesteps`.

        Raises:
            ValueError: see `timesteps`.
        """
        times = self.timesteps(steps, height=height, width=width, num_frames=num_frames)
        after = np.append(times[1:], 0.0)
        told = times.astype(np.float32)
        if self.prediction_type == "sample":
            return Steps.of(told, keep=after / times, push=1 - after / times)
        return Steps.of(told, keep=np.ones(steps), push=(times - after) / self.num_timesteps)


OPENSORA_1_2_SCHEDULE = RectifiedFlowSchedule()  # run with 30 steps at guidance 7 as published
