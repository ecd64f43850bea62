"""Export a trained Nouns model as the shipped checkpoint: `python -m benchmarks.ship_nouns RUN`.

Writes `checkpoints/nouns-flux` or another folder: weights in diffusers' layout (bfloat16),
scheduler, held-out prompts, and the training log with its learning curve.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from benchmarks.demo import MODEL
from benchmarks.picture_model import SCHEDULER
from benchmarks.picture_worlds import WORLDS
from benchmarks.shipping import held_out_prompts, ship
from lowbit_jax.models.flux import FluxConfig


def main(run: tyro.conf.Positional[Path], folder: Path = MODEL) -> None:
    """Export the averaged weights of the newest checkpoint of a training run to a folder."""
    world = WORLDS["nouns-flux"]()
    prompts = held_out_prompts(world, world.attributes, world.max_len)
    ship(run, folder, "flux", FluxConfig, SCHEDULER, prompts)


if __name__ == "__main__":
    tyro.cli(main)
