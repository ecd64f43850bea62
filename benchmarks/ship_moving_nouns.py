"""Export a trained video model as the shipped checkpoint:
`python -m benchmarks.ship_moving_nouns RUN`.

Writes `checkpoints/moving-nouns-stdit`: weights in the layout of Open-Sora 1.0 (bfloat16),
scheduler, held-out prompts, and the training log with its learning curve.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from benchmarks.moving_nouns_model import MAX_LEN, SCHEDULER
from benchmarks.shipping import held_out_prompts, ship
from benchmarks.train_moving_nouns import MovingNouns
from benchmarks.video_samples import MODEL
from lowbit_jax.evaluation import moving_nouns
from lowbit_jax.models.stdit import STDiTConfig


def main(run: tyro.conf.Positional[Path]) -> None:
    """Export the averaged weights of the newest checkpoint of a training run."""
    scene = moving_nouns.load_scene()
    prompts = held_out_prompts(MovingNouns(scene), moving_nouns.KINDS, MAX_LEN)
    ship(run, MODEL, "stdit", STDiTConfig, SCHEDULER, prompts)


if __name__ == "__main__":
    tyro.cli(main)
