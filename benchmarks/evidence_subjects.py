"""The shipped models as subjects of evidence: pictures of nouns, clips of moving nouns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.evidence import Subject
from benchmarks.moving_nouns_model import (
    ACCURACIES,
    GUIDANCE_SCALE,
    SAMPLE_STEPS,
    SCHEDULE,
    caption_mask,
    make_noise,
    sample_clips,
)
from benchmarks.picture_worlds import WORLDS
from convert.minilm import load_minilm
from convert.port import port
from lowbit_jax.calibration.collect import collect
from lowbit_jax.calibration.drivers import caption_sample, flux_run, flux_sample, video_run
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.evaluation import clip_scores, moving_nouns, nouns
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.samplers.flow_euler import FlowSchedule
from lowbit_jax.samplers.guidance import OPENSORA_1_2

ROOT = Path(__file__).parent.parent / "checkpoints"
STEPS = 20
IN_BLOCKS = r"[a-z_]*blocks/.*"  # linears whose X^T X error feedback needs
GRID = (8, 8)  # latent patches of a 32x32 picture
HALVES = (0.0, 0.5, 1.0)  # ViDiT-Q v1's ranges, of FLUX's time
CLIPS = 16  # sampled at a time
CALIBRATION_SEED = 7  # of its captions and noise; captions are of the training part of the split


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is run.

    Attributes:
        captions: held-out captions that are judged.
        calibration: captions of the training part that activations are watched on.
        seed: of the noise that is judged.
    """

    captions: int = 128
    calibration: int = 16
    seed: int = 0


def picture_subject(
    name: str, amount: Amount, console: Console | None = None, folder: Path | None = None
) -> Subject:
    """A FLUX that draws pictures of 32x32 pixels, the shipped one or that in `folder`.

    `name` is one of `WORLDS`. Computed in float32, so that what differs is quantisation alone.
    """
    folder, world = folder or ROOT / name, WORLDS[name]()
    saved = port(folder, dtype=jnp.float32)
    model = build(saved.model, saved.config, jnp.float32)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(STEPS, GRID[0] * GRID[1])
    data = json.loads((folder / "prompts.json").read_text())
    items = data["prompts"][: amount.captions]
    attrs = np.array([item["attrs"] for item in items])
    encode = load_minilm()
    states, pooled = map(np.asarray, encode([i["text"] for i in items], data["max_tokens"]))
    shape = (GRID[0] * GRID[1], model.config.in_channels)
    noise = jax.random.normal(jax.random.key(amount.seed), (len(items), *shape))

    def sample(params: Any) -> np.ndarray:
        tokens = sample_tokens(model, params, noise, states, pooled, sigmas, grid=GRID)
        return np.clip(np.asarray(nouns.from_latent(tokens)) / 2 + 0.5, 0, 1)

    def calibrate():
        rng = np.random.default_rng(CALIBRATION_SEED)
        drawn = world.sample_attrs(rng, amount.calibration, held_out=False)
        txt, vectors = map(np.asarray, encode(world.caption(drawn), data["max_tokens"]))
        start = jax.random.normal(jax.random.key(CALIBRATION_SEED), (len(drawn), *shape))
        run = flux_run(model, sigmas, TimestepRanges(HALVES), grid=GRID, grams=IN_BLOCKS)
        one = [
            flux_sample(start[i : i + 1], txt[i : i + 1], vectors[i : i + 1])
            for i in range(len(drawn))
        ]
        return collect(run, saved.params, one, console=console)

    return Subject(
        name=name,
        params=saved.params,
        sample=sample,
        judge=lambda pictures: world.judge(255 * pictures, attrs),
        accuracies=world.scored,
        calibrate=calibrate,
        settings=_settings(folder, amount),
        categories=lambda found: world.categories(found, attrs),
    )


def moving_nouns_subject(amount: Amount, console: Console | None = None) -> Subject:
    """The STDiT: clips of 8 frames of 32x32 pixels, with classifier-free guidance; in float32."""
    folder = ROOT / "moving-nouns-stdit"
    saved = port(folder, dtype=jnp.float32)
    model: Any = build(saved.model, saved.config, jnp.float32)
    data = json.loads((folder / "prompts.json").read_text())
    items = data["prompts"][: amount.captions]
    attrs = np.array([item["attrs"] for item in items])
    encode, scene = load_minilm(), moving_nouns.load_scene()
    states = np.asarray(encode([i["text"] for i in items], data["max_tokens"])[0])
    noise = make_noise(model.config, len(items), amount.seed)

    def sample(params: Any) -> np.ndarray:
        parts = [
            sample_clips(model, params, noise[at : at + CLIPS], states[at : at + CLIPS])
            for at in range(0, len(noise), CLIPS)
        ]
        return np.concatenate(parts) / 255

    def calibrate():
        rng = np.random.default_rng(CALIBRATION_SEED)
        drawn = moving_nouns.sample_attrs(rng, amount.calibration, scene)
        texts = moving_nouns.caption(scene, drawn)
        txt = jnp.asarray(encode(texts, data["max_tokens"])[0], jnp.float32)
        mask = caption_mask(txt)
        start = make_noise(model.config, len(drawn), CALIBRATION_SEED)
        run = video_run(
            model,
            SCHEDULE.steps(SAMPLE_STEPS),
            TimestepRanges(tuple(1000 * edge for edge in HALVES)),
            guidance=OPENSORA_1_2,
            scale=GUIDANCE_SCALE,
            grams=IN_BLOCKS,
        )
        one = [
            caption_sample(run, saved.params, start[i : i + 1], (txt[i : i + 1], mask[i : i + 1]))
            for i in range(len(drawn))
        ]
        return collect(run, saved.params, one, console=console)

    return Subject(
        name="moving-nouns-stdit",
        params=saved.params,
        sample=sample,
        judge=lambda clips: clip_scores.scores(scene, 255 * clips, attrs),
        accuracies=ACCURACIES,
        calibrate=calibrate,
        settings=_settings(folder, amount),
    )


def _settings(folder: Path, amount: Amount) -> dict[str, Any]:
    weights = sorted(folder.rglob("*.safetensors"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    return {"amount": vars(amount), "steps": STEPS, "weights": digests}


SUBJECTS: dict[str, Callable[[Amount, Console | None], Subject]] = {
    **{name: partial(picture_subject, name) for name in WORLDS},
    "moving-nouns-stdit": moving_nouns_subject,
}
