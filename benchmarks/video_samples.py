"""The shipped video model under recipes, same noise: `python -m benchmarks.video_samples`.

Writes OUT/sheet.png (rows: exact clip, then recipes; columns: frames) and OUT/scores.json (every
score of every clip), and prints means and half of their 95 % bootstrap intervals over the clips.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table

from benchmarks.demo import save_grid
from benchmarks.moving_nouns_model import (
    GUIDANCE_SCALE,
    SAMPLE_STEPS,
    make_noise,
    sample_clips,
)
from convert.minilm import load_minilm
from convert.port import port
from lowbit_jax.evaluation import clip_scores, moving_nouns
from lowbit_jax.evaluation.metrics import mean_interval, psnr
from lowbit_jax.models.registry import build

MODEL = Path(__file__).parent.parent / "checkpoints" / "moving-nouns-stdit"
BATCH = 16  # clips sampled at a time
TO_FLOAT = "psnr_to_float"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare recipes on the shipped video model."""

    out: Path = Path("out/video")
    """Folder of sheet.png and scores.json."""
    recipes: tuple[str, ...] = ("float", "w8a8", "w4a8")
    clips: int = 64
    """Held-out prompts to sample, at most 128."""
    shown: int = 3
    """Clips on the sheet."""
    steps: int = SAMPLE_STEPS
    scale: float = GUIDANCE_SCALE
    """Of classifier-free guidance."""
    seed: int = 0
    """Of the noise; the same for every recipe."""


class Prompts(NamedTuple):
    """Held-out captions, what they ask for, and their encoded tokens (b, s, c)."""

    texts: list[str]
    attrs: Int[np.ndarray, "b 6"]
    states: Float[np.ndarray, "b s c"]


def load_prompts(count: int, folder: Path = MODEL) -> Prompts:
    """The first `count` of the shipped prompts, encoded with MiniLM."""
    data = json.loads((folder / "prompts.json").read_text())
    texts = [item["text"] for item in data["prompts"][:count]]
    attrs = np.array([item["attrs"] for item in data["prompts"][:count]])
    states, _ = load_minilm()(texts, data["max_tokens"])
    return Prompts(texts, attrs, states)


def sample_recipe(recipe: str, prompts: Prompts, options: Options) -> np.ndarray:
    """Clips float [b, f, 32, 32, 3] in [0, 255] of the shipped model under a recipe.

    Computed in float32, so that what differs between recipes is quantisation alone.
    """
    saved = port(MODEL, recipe, dtype=jnp.float32)
    model: Any = build(saved.model, saved.config, jnp.float32)
    noise = make_noise(model.config, len(prompts.texts), options.seed)
    parts = [
        sample_clips(
            model,
            saved.params,
            noise[at : at + BATCH],
            prompts.states[at : at + BATCH],
            steps=options.steps,
            scale=options.scale,
        )
        for at in range(0, len(noise), BATCH)
    ]
    return np.concatenate(parts)


def main(options: Options) -> dict[str, dict[str, np.ndarray]]:
    """Run the comparison; writes into `options.out` and returns the scores per recipe."""
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    prompts, scene = load_prompts(options.clips), moving_nouns.load_scene()
    exact = moving_nouns.clips(scene, prompts.attrs)
    clips = {"asked for": exact.astype(np.float64)}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for recipe in options.recipes:
        with console.status(f"{recipe}: {len(exact)} clips, {options.steps} steps"):
            clips[recipe] = sample_recipe(recipe, prompts, options)
        scores[recipe] = clip_scores.scores(scene, clips[recipe], prompts.attrs)
        if recipe != "float" and "float" in clips:
            scores[recipe][TO_FLOAT] = psnr(clips[recipe] / 255, clips["float"] / 255)
    rows = {
        f"{i + 1}  {name}": found[i] / 255
        for i in range(min(options.shown, len(exact)))
        for name, found in clips.items()
    }
    save_grid(options.out / "sheet.png", rows)
    document = {
        recipe: {name: values.astype(float).tolist() for name, values in found.items()}
        for recipe, found in scores.items()
    }
    (options.out / "scores.json").write_text(json.dumps(document) + "\n")
    console.print(_table(scores))
    for i, text in enumerate(prompts.texts[: options.shown]):
        console.print(f"{i + 1}  {text}")
    return scores


def _table(scores: dict[str, dict[str, np.ndarray]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("of", "score", *scores):
        table.add_column(heading)
    groups = {name: metric.group for name, metric in clip_scores.METRICS.items()}
    for name, group in (groups | {TO_FLOAT: "quality"}).items():
        found = (values.get(name) for values in scores.values())
        table.add_row(group, name, *("-" if x is None else _mean(x) for x in found))
    return table


def _mean(values: np.ndarray) -> str:
    mean, low, high = mean_interval(values.astype(float))
    return f"{mean:.2f} ±{(high - low) / 2:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
