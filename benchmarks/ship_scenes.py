"""Export a trained scenes model as the shipped checkpoint: `python -m benchmarks.ship_scenes RUN`.

Writes `checkpoints/scenes-flux`: weights in diffusers' layout (bfloat16), scheduler, held-out
prompts, and the training log with its learning curve. Then samples every prompt with the shipped
weights and prints the shares of right answers, for the folder's README.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Bool, Int
from rich.console import Console
from rich.table import Table

from benchmarks import demo
from benchmarks.picture_model import SCHEDULER
from benchmarks.picture_worlds import Scenes
from benchmarks.shipping import held_out_prompts, ship
from convert.port import port
from lowbit_jax.evaluation import scenes
from lowbit_jax.models.flux import FluxConfig

MODEL = demo.MODEL.parent / "scenes-flux"
PROMPTS = 256


def score_table(found: dict[str, Bool[np.ndarray, "b"]], attrs: Int[np.ndarray, "b 6"]) -> Table:
    """Shares of right answers in percent: a row for each kind of caption, a column per question."""
    table = Table(box=None, pad_edge=False)
    table.add_column("captions")
    for heading in ("number of them", *scenes.SCORES):
        table.add_column(heading, justify="right")
    groups = {name: scenes.by_group(right, attrs) for name, right in found.items()}
    for name in scenes.GROUPS:
        answers = [groups[question][name] for question in scenes.SCORES]
        shares = [f"{100 * right.mean():.1f}" for right in answers]
        table.add_row(name, str(len(answers[0])), *shares)
    shares = [f"{100 * found[question].mean():.1f}" for question in scenes.SCORES]
    table.add_row("all", str(len(attrs)), *shares)
    return table


def main(run: tyro.conf.Positional[Path]) -> None:
    """Export the averaged weights of the newest checkpoint of a training run, and judge them."""
    things, console = scenes.load_things(), Console()
    world = Scenes(things)
    prompts = held_out_prompts(world, world.attributes, world.max_len, PROMPTS)
    ship(run, MODEL, "flux", FluxConfig, SCHEDULER, prompts)
    shipped = demo.load_prompts(PROMPTS, MODEL)
    pictures, _ = demo.sample(port(MODEL, dtype=jnp.float32), shipped, seed=0)
    found = scenes.score(things, 255 * pictures, shipped.attrs)
    console.print(score_table(found, shipped.attrs))
    shares = scenes.categories(found, shipped.attrs)
    line = ", ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
    console.print(f"GenEval's tasks: {line}", soft_wrap=True)
    console.print(f"clarity: {scenes.clarity(things, 255 * pictures).mean():.1f} dB")


if __name__ == "__main__":
    tyro.cli(main)
