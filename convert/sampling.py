"""What calibration runs, from a checkpoint and a file of prompts: every network as it is published.

| network | file | guidance | size |
|---|---|---|---|
| FLUX | prompts, pooled | distilled, 3.5 where it is told one | --grid, 64 x 64 patches |
| DiT, Latte | class labels | 4; 7 | of the config |
| PixArt | prompts | 4.5 | --grid, that of the config |
| Latte-1, STDiT, STDiT3 | prompts | 7.5; 7; 7 | --frames and --grid, those of the config |

Steps are those of `scheduler/scheduler_config.json` beside the weights, else of the schedule that
the network is published with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from convert.flux_prompts import read_flux_prompts
from convert.job import Job
from convert.prompts import MINILM_TOKENS, Prompts, minilm, read_labels, read_prompts
from lowbit_jax.calibration import drivers
from lowbit_jax.calibration.collect import Run, Sample
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.models.flux import FluxConfig, FluxTransformer
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.pipelines.pixart import PIXELS
from lowbit_jax.pipelines.video import Shot
from lowbit_jax.samplers import ddim, ddpm, loop
from lowbit_jax.samplers.dpm_solver import PIXART_SCHEDULE
from lowbit_jax.samplers.flow_euler import FLUX_DEV_GUIDANCE, FLUX_DEV_SCHEDULE
from lowbit_jax.samplers.guidance import (
    DIT_DIFFUSERS,
    DIT_PUBLISHED,
    LATTE,
    LATTE_1,
    OPENSORA_1_0,
    OPENSORA_1_2,
    Guidance,
)
from lowbit_jax.samplers.rectified_flow import (
    CLIP,
    LATENT_CLIP,
    OPENSORA_1_2_SCHEDULE,
    RectifiedFlowSchedule,
)
from lowbit_jax.samplers.registry import SAMPLERS, read_schedule
from lowbit_jax.samplers.schedule import space_timesteps

FLUX_GRID, STDIT3_SHAPE = (64, 64), (15, 32, 32)  # of networks whose config names no size
SCHEDULES = {
    "flux": FLUX_DEV_SCHEDULE,
    "dit": ddpm.DIT_SCHEDULE,
    "latte": ddpm.DIT_SCHEDULE,
    "pixart": PIXART_SCHEDULE,
    "latte-t2v": ddim.DIT_SCHEDULE,
    "stdit": ddpm.DIT_SCHEDULE,
    "stdit3": OPENSORA_1_2_SCHEDULE,
}
SCALES = {"dit": 4.0, "latte": 7.0, "pixart": 4.5, "latte-t2v": 7.5, "stdit": 7.0, "stdit3": 7.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How samples are made.

    Attributes:
        steps: of the sampler.
        ranges: timestep ranges of equal length.
        grams: linears whose X^T X is wanted, see `observe`.
        grid: rows and columns of patches; None for the network's own.
        frames: latent frames of a video; None for the network's own.
        fps: of a video, for networks that are told it.
        guidance: scale; None for the published one.
        seed: of the noise.
        dtype: of the computation.
    """

    steps: int = 16
    ranges: int = 1
    grams: str | None = None
    grid: tuple[int, int] | None = None
    frames: int | None = None
    fps: float = 24.0
    guidance: float | None = None
    seed: int = 0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("ranges", self.ranges)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it is at least 1")
        if min(*(self.grid or (1, 1)), self.frames or 1) < 1 or self.frames == 0:
            raise ValueError(f"--grid {self.grid}, --frames {self.frames}: sizes start at 1")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is run, and on what; no sample is made before it is asked for.

    Attributes:
        run: see there.
        count: number of samples.
        sample: `(params, i) -> Sample`.
        about: of the sampler, for people.
    """

    run: Run
    count: int
    sample: Callable[[Any, int], Sample]
    about: str

    def samples(self, params: Any) -> Samples:
        """All of them, one after the other."""
        return Samples(self.count, partial(self.sample, params))


@dataclass(frozen=True)
class Samples:
    """A number of samples, each made when its turn comes."""

    count: int
    make: Callable[[int], Sample]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return map(self.make, range(self.count))


def make_subject(job: Job, prompts: Path, settings: Settings) -> Subject:
    """Run and samples of a checkpoint's network.

    Args:
        job: the planned conversion: network, config, where the checkpoint is.
        prompts: see `convert.prompts`; class labels for DiT and Latte.
        settings: how.

    Raises:
        ValueError: a model that denoises nothing, a schedule or a size that is not the network's,
            prompts that cannot be used, timestep ranges without a step.
    """
    if job.model not in NETWORKS:
        raise ValueError(
            f"{job.checkpoint.source}: {job.model} is no network that denoises, and calibration "
            f"runs a sampler; it takes {', '.join(NETWORKS)}"
        )
    if settings.frames is not None and job.model not in ("latte-t2v", "stdit", "stdit3"):
        raise ValueError(f"--frames {settings.frames}: the frames of {job.model} are not chosen")
    builder = {"flux": _flux, "dit": _classes, "latte": _classes}.get(job.model, _captions)
    return builder(job, prompts, settings)


def find_schedule(job: Job) -> Any:
    """Of the scheduler's config beside the weights; the published one where there is none.

    Raises:
        ValueError: one that its publishers do not sample the network with, or that is not ported.
    """
    source = Path(job.checkpoint.source)
    for folder in (source, source.parent, source.parent.parent):
        file = folder / "scheduler" / "scheduler_config.json"
        if file.is_file():
            schedule = read_schedule(json.loads(file.read_text()))
            known = NETWORKS[job.model].samplers
            if type(schedule) not in [SAMPLERS[name].schedule for name in known]:
                raise ValueError(
                    f"{file}: a {type(schedule).__name__}; {job.model} is sampled with "
                    f"{' or '.join(known)}"
                )
            return schedule
    return SCHEDULES[job.model]


def flux_sample(
    config: FluxConfig,
    prompts: Prompts,
    i: int,
    *,
    tokens: int,
    seed: int = 0,
    guidance: float = FLUX_DEV_GUIDANCE,
) -> Sample:
    """Noise for a prompt; `guidance` where the model is told one.

    Args:
        config: of the model.
        prompts: with `pooled`.
        i: which of them.
        tokens: latent patches of the picture.
        seed: of the noise, with `i`.
        guidance: distilled scale.
    """
    assert prompts.pooled is not None
    told = jnp.full(1, guidance) if config.guidance_embed else None
    noise = jax.random.normal(_key(seed, i), (1, tokens, config.in_channels))
    states, vector = jnp.asarray(prompts.txt[i : i + 1]), jnp.asarray(prompts.pooled[i : i + 1])
    return drivers.flux_sample(noise, states, vector, told)


def _flux(job: Job, path: Path, settings: Settings) -> Subject:
    config, schedule = job.config, find_schedule(job)
    if settings.guidance is not None and not config.guidance_embed:
        raise ValueError(f"--guidance {settings.guidance:g}: this FLUX is told no guidance")
    prompts = read_flux_prompts(job, path)
    grid = settings.grid or FLUX_GRID
    tokens = grid[0] * grid[1]
    run = drivers.flux_run(
        FluxTransformer(config, settings.dtype),
        schedule.sigmas(settings.steps, tokens),
        _ranges(1, settings),
        grid=grid,
        grams=settings.grams,
    )
    scale = FLUX_DEV_GUIDANCE if settings.guidance is None else settings.guidance
    options = {"tokens": tokens, "seed": settings.seed, "guidance": scale}
    return Subject(
        run=run,
        count=len(prompts),
        sample=lambda params, i: flux_sample(config, prompts, i, **options),  # type: ignore[arg-type]
        about=_about(schedule, scale if config.guidance_embed else None),
    )


def _classes(job: Job, path: Path, settings: Settings) -> Subject:
    config, schedule = job.config, find_schedule(job)
    side = config.sample_size
    own = (side // config.patch_size,) * 2
    if settings.grid not in (None, own):
        raise ValueError(
            f"--grid {settings.grid[0]} {settings.grid[1]}: this {job.model} is for "
            f"{own[0]} {own[1]} alone"
        )
    labels = read_labels(path, config.num_classes)
    shape = (config.num_frames, side, side) if job.model == "latte" else (side, side)
    scale = _scale(job, settings) if config.num_classes else None
    model: Any = NETWORKS[job.model].module(config, settings.dtype)
    published = DIT_DIFFUSERS if job.layout.name == "diffusers" else DIT_PUBLISHED
    run = drivers.dit_run(
        model,
        _steps(job, schedule, settings, shape),
        _ranges(1000, settings),
        scale=scale,
        guidance=LATTE if job.model == "latte" else published,
        grams=settings.grams,
    )

    def sample(params: Any, i: int) -> Sample:
        return drivers.dit_sample(run, *_noise(run, settings, i, shape, labels[i : i + 1]))

    return Subject(run=run, count=len(labels), sample=sample, about=_about(schedule, scale))


def _captions(job: Job, path: Path, settings: Settings) -> Subject:
    config, schedule = job.config, find_schedule(job)
    stored = getattr(config, "null_caption_length", 0)
    encoder = minilm(stored or MINILM_TOKENS)
    prompts = read_prompts(path, context=config.caption_channels, encoder=encoder)
    negative: Any = None if stored else prompts.negative
    if not stored and negative is None:
        raise ValueError(
            f"{path}: this {job.model} stores no null caption, and guidance leads away from one; "
            'add `negative` [t, k] and `negative_mask` [t], the text encoder\'s states of ""'
        )
    shape, scale = _latents(job, settings), _scale(job, settings)
    model: Any = NETWORKS[job.model].module(config, settings.dtype)
    steps, ranges = _steps(job, schedule, settings, shape), _ranges(1000, settings)
    grams = settings.grams
    if job.model == "pixart":
        run = drivers.pixart_run(model, steps, ranges, scale=scale, grams=grams)
    else:
        told = Shot(settings.fps, PIXELS * shape[-2], PIXELS * shape[-1])
        run = drivers.video_run(
            model,
            steps,
            ranges,
            guidance=_video_guidance(job, schedule),
            scale=scale,
            shot=told if job.model == "stdit3" else None,
            grams=grams,
        )

    def sample(params: Any, i: int) -> Sample:
        caption = prompts.txt[i : i + 1], prompts.mask[i : i + 1]
        noise, caption, key = _noise(run, settings, i, shape, caption)
        return drivers.caption_sample(run, params, noise, caption, negative, key)

    return Subject(run=run, count=len(prompts), sample=sample, about=_about(schedule, scale))


def _latents(job: Job, settings: Settings) -> tuple[int, ...]:
    """Frames, rows and columns of a sample's latents; no frames of a picture."""
    config = job.config
    patch = np.broadcast_to(config.patch_size, 3)[1:]
    own = {
        "pixart": lambda: (config.sample_size,) * 2,
        "latte-t2v": lambda: (config.num_frames, *(config.sample_size,) * 2),
        "stdit": lambda: config.input_size,
        "stdit3": lambda: STDIT3_SHAPE,
    }[job.model]()
    sides = own[-2:] if settings.grid is None else tuple(map(int, patch * settings.grid))
    if job.model == "pixart":
        return sides
    return own[0] if settings.frames is None else settings.frames, *sides


def _steps(job: Job, schedule: Any, settings: Settings, shape: tuple[int, ...]) -> loop.Steps:
    learned = getattr(schedule, "variance_type", None) in ("learned", "learned_range")
    if isinstance(schedule, ddpm.DDPMSchedule):
        if learned and not job.config.learn_sigma:
            raise ValueError(
                f"{job.checkpoint.source}: this {job.model} gives no variance, which the published "
                "sampler needs; put the scheduler/scheduler_config.json that it was trained for "
                "beside it, or give its own steps to lowbit_jax.calibration.collect.collect"
            )
        count = str(settings.steps)
        return schedule.steps_at(space_timesteps(schedule.num_train_timesteps, count))
    if isinstance(schedule, RectifiedFlowSchedule) and schedule.takes_size:
        frames, rows, columns = shape
        if frames > 1 and frames % LATENT_CLIP:
            raise ValueError(f"--frames {frames}: 1, or whole clips of {LATENT_CLIP} latent frames")
        return schedule.steps(
            settings.steps,
            height=PIXELS * rows,
            width=PIXELS * columns,
            num_frames=1 if frames == 1 else frames // LATENT_CLIP * CLIP,
        )
    return schedule.steps(settings.steps)


def _video_guidance(job: Job, schedule: Any) -> Guidance:
    if isinstance(schedule, RectifiedFlowSchedule):
        return OPENSORA_1_2
    return LATTE_1 if job.model == "latte-t2v" else OPENSORA_1_0


def _ranges(end: int, settings: Settings) -> TimestepRanges:
    return TimestepRanges(tuple(end * i / settings.ranges for i in range(settings.ranges + 1)))


def _scale(job: Job, settings: Settings) -> float:
    return SCALES[job.model] if settings.guidance is None else settings.guidance


def _key(seed: int, i: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), i)


def _noise(
    run: Run, settings: Settings, i: int, shape: tuple[int, ...], condition: Any
) -> tuple[Float[Array, "1 c ..."], Any, Any]:
    """Noise of a sample, its condition, and the key of its steps' noise where they add any."""
    key = _key(settings.seed, i)
    noise = jax.random.normal(key, (1, run.model.config.in_channels, *shape))  # type: ignore[attr-defined]
    return noise, condition, None if run.steps.std is None else jax.random.fold_in(key, 1)


def _about(schedule: Any, scale: float | None) -> str:
    name = next(s.title for s in SAMPLERS.values() if s.schedule is type(schedule))
    return name if scale is None else f"{name}, guidance {scale:g}"
