"""Train a small FLUX on Nouns: `python -m benchmarks.train_nouns --out runs/nouns`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console

from benchmarks.nouns_model import MAX_LEN
from benchmarks.picture_task import PictureOptions, make_task
from benchmarks.training import train
from lowbit_jax.evaluation import nouns


@dataclass(frozen=True)
class Nouns:
    """Nouns as a `picture_task.PictureWorld`."""

    sprites: nouns.Sprites
    name: str = "nouns"
    max_len: int = MAX_LEN
    accuracies: tuple[str, ...] = nouns.KINDS
    scores: tuple[str, ...] = ("mean", "psnr")

    def sample_attrs(self, rng: np.random.Generator, n: int, held_out: bool) -> np.ndarray:
        """See `nouns.sample_attrs`."""
        return nouns.sample_attrs(rng, n, self.sprites.counts, held_out)

    def caption(self, attrs: np.ndarray) -> list[str]:
        """See `nouns.caption`."""
        return nouns.caption(self.sprites, attrs)

    def pictures(self, attrs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `nouns.compose`; captions leave nothing free."""
        return nouns.compose(self.sprites, attrs)

    def judge(self, pictures: np.ndarray, attrs: np.ndarray) -> dict[str, float]:
        """Accuracy of each attribute, their mean, and PSNR to the exact picture."""
        found = nouns.score(self.sprites, pictures, attrs)
        scores = {kind: float(right.mean()) for kind, right in found.items()}
        scores["mean"] = float(np.mean(list(scores.values())))
        target = nouns.compose(self.sprites, attrs)
        return scores | {"psnr": float(nouns.psnr(pictures, target).mean())}


def main(options: PictureOptions) -> dict[str, float]:
    """Train; returns the last held-out scores."""
    console = Console()
    return train(options, make_task(options, Nouns(nouns.load_sprites()), console), console)


if __name__ == "__main__":
    main(tyro.cli(PictureOptions, description=__doc__))
