"""The shipped models as subjects of evidence: pictures of nouns, clips of moving nouns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.evidence import Subject
from convert.minilm import load_minilm
from convert.port import port
from lowbit_jax.calibration.collect import collect
from lowbit_jax.calibration.drivers import flux_run, flux_sample
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.evaluation import nouns
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.samplers.flow_euler import FlowSchedule

ROOT = Path(__file__).parent.parent / "checkpoints"
STEPS = 20
GRID = (8, 8)  # latent patches of a 32x32 picture
RANGES = TimestepRanges((0.0, 0.25, 0.5, 0.75, 1.0))  # ViDiT-Q's four
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


def nouns_subject(amount: Amount, console: Console | None = None) -> Subject:
    """The FLUX of 9.2 M parameters: pictures of 32x32 pixels, four parts each.

    Computed in float32, so that what differs is quantisation alone.
    """
    folder = ROOT / "nouns-flux"
    saved = port(folder, dtype=jnp.float32)
    model = build(saved.model, saved.config, jnp.float32)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(STEPS, GRID[0] * GRID[1])
    data = json.loads((folder / "prompts.json").read_text())
    items = data["prompts"][: amount.captions]
    attrs = np.array([item["attrs"] for item in items])
    encode, sprites = load_minilm(), nouns.load_sprites()
    states, pooled = map(np.asarray, encode([i["text"] for i in items], data["max_tokens"]))
    shape = (GRID[0] * GRID[1], model.config.in_channels)
    noise = jax.random.normal(jax.random.key(amount.seed), (len(items), *shape))

    def sample(params: Any) -> np.ndarray:
        tokens = sample_tokens(model, params, noise, states, pooled, sigmas, grid=GRID)
        return np.clip(np.asarray(nouns.from_latent(tokens)) / 2 + 0.5, 0, 1)

    def calibrate():
        rng = np.random.default_rng(CALIBRATION_SEED)
        drawn = nouns.sample_attrs(rng, amount.calibration, sprites.counts)
        txt, vectors = map(np.asarray, encode(nouns.caption(sprites, drawn), data["max_tokens"]))
        start = jax.random.normal(jax.random.key(CALIBRATION_SEED), (len(drawn), *shape))
        run = flux_run(model, sigmas, RANGES, grid=GRID)
        one = [
            flux_sample(start[i : i + 1], txt[i : i + 1], vectors[i : i + 1])
            for i in range(len(drawn))
        ]
        return collect(run, saved.params, one, console=console)

    return Subject(
        name="nouns-flux",
        params=saved.params,
        sample=sample,
        judge=lambda pictures: nouns.score(sprites, 255 * pictures, attrs),
        accuracies=nouns.KINDS,
        calibrate=calibrate,
        settings=_settings(folder, amount),
    )


def _settings(folder: Path, amount: Amount) -> dict[str, Any]:
    weights = sorted(folder.rglob("*.safetensors"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    return {"amount": vars(amount), "steps": STEPS, "weights": digests}


SUBJECTS: dict[str, Callable[[Amount, Console | None], Subject]] = {"nouns-flux": nouns_subject}
