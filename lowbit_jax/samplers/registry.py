"""Samplers by name, and the schedule of a published `scheduler_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit_jax.samplers.ddim import DDIMSchedule
from lowbit_jax.samplers.ddpm import DDPMSchedule
from lowbit_jax.samplers.dpm_solver import DPMSolverSchedule
from lowbit_jax.samplers.flow_euler import FlowSchedule
from lowbit_jax.samplers.rectified_flow import RectifiedFlowSchedule


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampler.

    Attributes:
        schedule: its class of settings.
        published_as: the class whose `scheduler_config.json` the schedule reads: diffusers', or
            OpenSORA's `RFLOW`, which diffusers has not.
        title: what people call it.
    """

    schedule: Any
    published_as: str
    title: str


SAMPLERS = {
    "flow-euler": Sampler(
        schedule=FlowSchedule,
        published_as="FlowMatchEulerDiscreteScheduler",
        title="flow-matching Euler",
    ),
    "ddpm": Sampler(schedule=DDPMSchedule, published_as="DDPMScheduler", title="DDPM / IDDPM"),
    "ddim": Sampler(schedule=DDIMSchedule, published_as="DDIMScheduler", title="DDIM"),
    "dpm-solver++": Sampler(
        schedule=DPMSolverSchedule,
        published_as="DPMSolverMultistepScheduler",
        title="DPM-Solver++ 2M",
    ),
    "rectified-flow": Sampler(
        schedule=RectifiedFlowSchedule, published_as="RFLOW", title="OpenSORA's rectified flow"
    ),
}


def read_schedule(config: Mapping[str, Any]) -> Any:
    """The schedule of a parsed `scheduler_config.json`, of the class that its scheduler needs.

    Raises:
        ValueError: a scheduler that is not ported, or settings of it that are not.
    """
    known = {s.published_as: s.schedule for s in SAMPLERS.values()}
    kind = config.get("_class_name")
    if kind not in known:
        raise ValueError(f"scheduler {kind!r} is none of: {', '.join(known)}")
    return known[kind].from_json(config)
