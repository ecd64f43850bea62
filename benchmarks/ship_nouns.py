"""Export a trained Nouns model as the shipped checkpoint: `python -m benchmarks.ship_nouns RUN`.

Writes `checkpoints/nouns-flux`: weights in diffusers' layout (bfloat16), held-out prompts, and the
training log with its learning curve.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from benchmarks.demo import MODEL
from benchmarks.nouns_model import MAX_LEN
from benchmarks.shipping import held_out_prompts, ship
from benchmarks.train_nouns import Nouns
from lowbit_jax.evaluation import nouns
from lowbit_jax.models.flux import FluxConfig


def main(run: tyro.conf.Positional[Path]) -> None:
    """Export the averaged weights of the newest checkpoint of a training run."""
    prompts = held_out_prompts(Nouns(nouns.load_sprites()), nouns.KINDS, MAX_LEN)
    ship(run, MODEL, "flux", FluxConfig, prompts)


if __name__ == "__main__":
    tyro.cli(main)
