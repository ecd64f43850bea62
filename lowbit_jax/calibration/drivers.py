"""`Run`s and `Sample`s of the pipelines: the same inputs, sampler and guidance as theirs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from lowbit_jax.calibration.collect import Run, Sample
from lowbit_jax.calibration.ranges import WHOLE, WHOLE_FLOW, TimestepRanges
from lowbit_jax.models.dit import DiTTransformer
from lowbit_jax.models.flux import FluxTransformer, image_ids, text_ids
from lowbit_jax.models.latte import LatteTransformer
from lowbit_jax.models.pixart import PixArtTransformer
from lowbit_jax.pipelines import captions
from lowbit_jax.pipelines.pixart import size_conditions
from lowbit_jax.pipelines.video import Shot, VideoTransformer, shot_conditions
from lowbit_jax.samplers import flow_euler, loop
from lowbit_jax.samplers.guidance import DIT_PUBLISHED, PIXART, Guidance


def flux_run(
    model: FluxTransformer,
    sigmas: Float32[np.ndarray, "steps+1"],
    ranges: TimestepRanges = WHOLE_FLOW,
    *,
    grid: tuple[int, int],
    grams: str | None = None,
) -> Run:
    """As `pipelines.flux.sample_tokens`; see there, and `Run`."""

    def denoise(apply, x, t, conditions):
        txt, pooled, guidance = conditions
        ids = image_ids(*grid), text_ids(txt.shape[1])
        return apply(x, txt, t, pooled, *ids, guidance=guidance)

    steps = flow_euler.euler_steps(sigmas)
    return Run(model=model, denoise=denoise, steps=steps, ranges=ranges, grams=grams)


def flux_sample(
    noise: Float[Array, "1 i c"],
    txt: Float[Array, "1 x context"],
    pooled: Float[Array, "1 vec"],
    guidance: Float[Array, "1"] | None = None,
) -> Sample:
    """One picture of `flux_run`."""
    return Sample(noise, (txt, pooled, guidance))


def dit_run(
    model: DiTTransformer | LatteTransformer,
    steps: loop.Steps,
    ranges: TimestepRanges = WHOLE,
    *,
    scale: float | None = None,
    guidance: Guidance = DIT_PUBLISHED,
    grams: str | None = None,
) -> Run:
    """As `pipelines.dit.sample_latents`; see there, and `Run`."""
    return Run(
        model=model,
        denoise=lambda apply, x, t, labels: apply(x, t, labels),
        steps=steps,
        ranges=ranges,
        guidance=None if scale is None else guidance,
        scale=scale,
        grams=grams,
    )


def dit_sample(
    run: Run, noise: Float[Array, "1 c ..."], label: Int[Array, "1"], key: Key[Array, ""] | None
) -> Sample:
    """One picture or video of `dit_run`, of a class."""
    label = jnp.asarray(label)
    if run.guidance is not None:
        none = jnp.full_like(label, run.model.config.num_classes)  # type: ignore[attr-defined]
        label = run.guidance.double(label, none)
    return Sample(noise, label, key)


def pixart_run(
    model: PixArtTransformer,
    steps: loop.Steps,
    ranges: TimestepRanges = WHOLE,
    *,
    scale: float | None = 4.5,
    grams: str | None = None,
) -> Run:
    """As `pipelines.pixart.sample_latents`; see there, and `Run`."""

    def denoise(apply, x, t, caption):
        side = x.shape[2:]
        return apply(x, t, *caption, *size_conditions(model, len(caption[0]), side))

    return Run(
        model=model,
        denoise=denoise,
        steps=steps,
        ranges=ranges,
        guidance=None if scale is None else PIXART,
        scale=scale,
        grams=grams,
    )


def video_run(
    model: VideoTransformer,
    steps: loop.Steps,
    ranges: TimestepRanges = WHOLE,
    *,
    guidance: Guidance,
    scale: float | None = 7.0,
    shot: Shot | None = None,
    grams: str | None = None,
) -> Run:
    """As `pipelines.video.sample_latents`; see there, and `Run`."""

    def denoise(apply, x, t, caption):
        return apply(x, t, *caption, **shot_conditions(model, len(caption[0]), shot))

    return Run(
        model=model,
        denoise=denoise,
        steps=steps,
        ranges=ranges,
        guidance=None if scale is None else guidance,
        scale=scale,
        grams=grams,
    )


def caption_sample(
    run: Run,
    params: Any,
    noise: Float[Array, "1 c ..."],
    caption: captions.Caption,
    negative: captions.Caption | None = None,
    key: Key[Array, ""] | None = None,
) -> Sample:
    """One picture of `pixart_run` or video of `video_run`; arguments as their pipelines have."""
    if run.guidance is not None:
        caption = captions.double(run.guidance, caption, negative, params)
    return Sample(noise, jax.tree.map(jnp.asarray, caption), key)
