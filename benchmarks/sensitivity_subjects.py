"""The shipped models as subjects of sensitivity scans and of allocations made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import demo, moving_nouns_model, video_samples
from convert.port import port
from lowbit_jax.calibration.collect import Run, Sample
from lowbit_jax.calibration.drivers import caption_sample, flux_run, flux_sample, video_run
from lowbit_jax.checkpoint import SavedModel
from lowbit_jax.evaluation import clip_scores, moving_nouns, nouns
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.samplers.flow_euler import FlowSchedule
from lowbit_jax.samplers.guidance import OPENSORA_1_2

ALL_PROMPTS = 128  # that are shipped with each model: nobody trained on them
CEILING = 60.0  # dB: an exact picture has infinitely many


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What is sampled.

    Attributes:
        captions: which of the shipped ones.
        batch: how many at a time; divides their number.
        steps: of the sampler.
        seed: of the noise.
    """

    captions: range
    batch: int
    steps: int
    seed: int

    def parts(self) -> list[slice]:
        """The batches.

        Raises:
            ValueError: batches that do not come out even; captions that are not there.
        """
        count = len(self.captions)
        if not count or count % self.batch or self.captions[-1] >= ALL_PROMPTS:
            raise ValueError(
                f"captions {self.captions} of {ALL_PROMPTS}, {self.batch} at a time: their number "
                "must be a multiple of the batch"
            )
        return [slice(at, at + self.batch) for at in range(0, count, self.batch)]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model, in float32 so that what differs is quantisation alone, and its judge.

    Attributes:
        name: what tables call it.
        saved: the floating model.
        run: its sampler, for scans.
        samples: what scans sample, in the order of the captions.
        sample: parameters to last states of the same samples, by the pipeline.
        decode: last states to pictures or clips in [0, 1].
        scores: last states to scores, one number for each caption; more is better.
        scorer_name: what these are.
        right: last states to the share of attributes that are right.
    """

    name: str
    saved: SavedModel
    run: Run
    samples: list[Sample]
    sample: Callable[[Any], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    scores: Callable[[np.ndarray], dict[str, np.ndarray]]
    scorer_name: str
    right: Callable[[np.ndarray], float]


def nouns_subject(draw: Draw) -> Subject:
    """The FLUX of 9.2 M parameters. `text` is how clearly the asked-for sprites are the nearest
    (`nouns.margins`, mean of four kinds), `quality` dB to the exact picture.

    Raises:
        RuntimeError: the sprites cannot be fetched. ValueError: see `Draw.parts`.
    """
    parts = draw.parts()
    sprites, folder = nouns.load_sprites(), demo.MODEL
    saved = port(folder, dtype=jnp.float32)
    model: Any = build(saved.model, saved.config, jnp.float32)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    tokens = demo.GRID[0] * demo.GRID[1]
    sigmas = FlowSchedule.from_json(schedule).sigmas(draw.steps, tokens)
    prompts = demo.load_prompts(draw.captions[-1] + 1)
    states, pooled, attrs = (
        x[draw.captions] for x in (prompts.states, prompts.pooled, prompts.attrs)
    )
    shape = (len(attrs), tokens, model.config.in_channels)
    noise = np.asarray(jax.random.normal(jax.random.key(draw.seed), shape))

    def sample(params: Any) -> np.ndarray:
        each = [
            sample_tokens(model, params, noise[p], states[p], pooled[p], sigmas, grid=demo.GRID)
            for p in parts
        ]
        return np.concatenate(each)

    def decode(finals: np.ndarray) -> np.ndarray:
        return np.clip(np.asarray(nouns.from_latent(finals)) / 2 + 0.5, 0, 1)

    def scores(finals: np.ndarray) -> dict[str, np.ndarray]:
        pictures = 255 * decode(finals)
        text = np.mean(list(nouns.margins(sprites, pictures, attrs).values()), axis=0)
        return {"text": text, "quality": nouns.psnr(pictures, nouns.compose(sprites, attrs))}

    def right(finals: np.ndarray) -> float:
        found = nouns.score(sprites, 255 * decode(finals), attrs)
        return float(np.mean(list(found.values())))

    return Subject(
        name="nouns-flux",
        saved=saved,
        run=flux_run(model, sigmas, grid=demo.GRID),
        samples=[flux_sample(noise[p], states[p], pooled[p]) for p in parts],
        sample=sample,
        decode=decode,
        scores=scores,
        scorer_name="nouns: margins, dB to the exact picture",
        right=right,
    )


def moving_nouns_subject(draw: Draw) -> Subject:
    """The STDiT of 6.1 M parameters, with guidance; scores by `clip_scores`.

    `text` is how clearly the asked-for parts are the nearest (`margins`, mean of four), `quality`
    dB of the mean steady frame to the exact picture, `time` dB of the clip to that frame moving as
    asked, blind to what it shows (`motion_psnr`). Beside them, to be looked at: `motion`, how
    clearly it moves as asked (`margins`), and `exact`, dB to the exact frames. No dB are more than
    `CEILING`.

    Raises:
        RuntimeError: the sprites cannot be fetched. ValueError: see `Draw.parts`.
    """
    parts = draw.parts()
    scene, folder = moving_nouns.load_scene(), video_samples.MODEL
    saved = port(folder, dtype=jnp.float32)
    model: Any = build(saved.model, saved.config, jnp.float32)
    prompts = video_samples.load_prompts(draw.captions[-1] + 1)
    attrs, states = prompts.attrs[draw.captions], prompts.states[draw.captions]
    states = jnp.asarray(states, jnp.float32)
    mask = moving_nouns_model.caption_mask(states)
    noise = moving_nouns_model.make_noise(model.config, len(attrs), draw.seed)
    run = video_run(
        model,
        moving_nouns_model.SCHEDULE.steps(draw.steps),
        guidance=OPENSORA_1_2,
        scale=moving_nouns_model.GUIDANCE_SCALE,
    )

    def sample(params: Any) -> np.ndarray:
        each = [
            moving_nouns_model.sample_states(model, params, noise[p], states[p], steps=draw.steps)
            for p in parts
        ]
        return np.concatenate(each)

    def decode(finals: np.ndarray) -> np.ndarray:
        return moving_nouns_model.to_clips(model.config, finals) / 255

    def scores(finals: np.ndarray) -> dict[str, np.ndarray]:
        clips = 255 * decode(finals)
        margins = clip_scores.margins(scene, clips, attrs)
        found = clip_scores.scores(scene, clips, attrs)
        return {
            "text": np.mean([margins[part] for part in moving_nouns.PARTS], axis=0),
            "quality": np.minimum(found["picture_psnr"], CEILING),
            "time": np.minimum(clip_scores.motion_psnr(scene, clips, attrs), CEILING),
            "motion": margins["motion"],
            "exact": np.minimum(found["frame_psnr"], CEILING),
        }

    def right(finals: np.ndarray) -> float:
        found = clip_scores.scores(scene, 255 * decode(finals), attrs)
        return float(np.mean([found[name] for name in moving_nouns_model.ACCURACIES]))

    return Subject(
        name="moving-nouns-stdit",
        saved=saved,
        run=run,
        samples=[caption_sample(run, saved.params, noise[p], (states[p], mask[p])) for p in parts],
        sample=sample,
        decode=decode,
        scores=scores,
        scorer_name="moving nouns: margins of parts, dB to the exact picture, dB of the motion",
        right=right,
    )


SUBJECTS: dict[str, Callable[[Draw], Subject]] = {
    "flux": nouns_subject,
    "stdit": moving_nouns_subject,
}
"""By the network's name in `lowbit_jax.models.registry`."""
