"""Rectified flow as OpenSORA 1.2 samples it: STDiT3's sampler ("rflow" in its configs).

Times run from 1000 (noise) to 0 (data), x = t/1000 noise + (1 - t/1000) data, and the model gives
dx in the direction of the data, v = data - noise: its sign is opposite to FLUX's
(`lowbit_jax.samplers.flow_euler`). Run the steps with `lowbit_jax.samplers.loop.sample`, which
drops the second half of STDiT3's channels, as OpenSORA does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lowbit_jax.samplers.loop import Steps
from lowbit_jax.samplers.settings import require

# Latent frames per clip of pixel frames in OpenSORA's VAE, hard-coded in its time transform.
CLIP, LATENT_CLIP = 17, 5
PREDICTIONS = ("velocity", "sample")


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowSchedule:
    """Times of OpenSORA's `RFLOW`; fields as there.

    Attributes:
        num_timesteps: time of pure noise.
        use_discrete_timesteps: round times to whole numbers, before the transform.
        use_timestep_transform: shift times towards noise for larger and longer videos.
        base_resolution: pixels of a picture whose times are not shifted.
        base_num_frames: latent frames of a video whose times are not shifted.
        prediction_type: what the model gives: "velocity" (as OpenSORA) or "sample" (the data, from
            which the velocity follows: data - noise = (data - x) / t at t in [0, 1]).

    Raises:
        ValueError: another prediction type.
    """

    num_timesteps: int = 1000
    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = True
    base_resolution: int = 512 * 512
    base_num_frames: int = 1
    prediction_type: str = "velocity"

    def __post_init__(self) -> None:
        require("prediction_type", self.prediction_type, PREDICTIONS)

    def timesteps(
        self, steps: int, *, height: int, width: int, num_frames: int
    ) -> Float64[np.ndarray, "n"]:
        """The `steps` times from `num_timesteps` down, t' = r t / (1 + (r - 1) t) at t in [0, 1].

        r is sqrt(pixels / `base_resolution`) times sqrt(latent frames / `base_num_frames`).

        Args:
            steps: how many.
            height: pixels.
            width: pixels.
            num_frames: 1 for a picture, or a video's frames; whole clips of 17 count.

        Raises:
            ValueError: fewer than one step, an empty size, or a video of less than one clip.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; a sampler takes at least 1")
        if min(height, width, num_frames) < 1:
            raise ValueError(f"a video of {num_frames} frames of {height} x {width} pixels")
        times = np.arange(steps, 0, -1) / steps
        if self.use_discrete_timesteps:
            times = np.round(times * self.num_timesteps) / self.num_timesteps
        if self.use_timestep_transform:
            frames = 1 if num_frames == 1 else num_frames // CLIP * LATENT_CLIP
            if not frames:
                raise ValueError(
                    f"num_frames is {num_frames}; the time transform takes 1, or a video of at "
                    f"least one clip of {CLIP}"
                )
            ratio = math.sqrt(height * width / self.base_resolution)
            ratio *= math.sqrt(frames / self.base_num_frames)
            times = ratio * times / (1 + (ratio - 1) * times)
        return times * self.num_timesteps

    def steps(self, steps: int, *, height: int, width: int, num_frames: int) -> Steps:
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
