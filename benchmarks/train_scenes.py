"""Train a small FLUX on scenes: `python -m benchmarks.train_scenes --out runs/scenes`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console

from benchmarks.picture_task import PictureOptions, make_task
from benchmarks.training import train
from lowbit_jax.evaluation import scenes

MAX_LEN = 16  # captions have up to 15 tokens


@dataclass(frozen=True, kw_only=True)
class Options(PictureOptions):
    """What to train and for how long."""

    eval_captions: int = 250


@dataclass(frozen=True)
class Scenes:
    """Scenes as a `picture_task.PictureWorld`."""

    things: scenes.Things
    name: str = "scenes"
    max_len: int = MAX_LEN
    accuracies: tuple[str, ...] = (*scenes.GROUPS, "right")
    scores: tuple[str, ...] = (*scenes.SCORES[1:], "clarity")

    def sample_attrs(self, rng: np.random.Generator, n: int, held_out: bool) -> np.ndarray:
        """See `scenes.sample_attrs`."""
        return scenes.sample_attrs(rng, n, self.things.counts, held_out)

    def caption(self, attrs: np.ndarray) -> list[str]:
        """See `scenes.caption`."""
        return scenes.caption(self.things, attrs)

    def pictures(self, attrs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `scenes.compose`; `rng` chooses the cells."""
        return scenes.compose(self.things, scenes.place(self.things, attrs, rng))

    def judge(self, pictures: np.ndarray, attrs: np.ndarray) -> dict[str, float]:
        """Share of right pictures by kind of caption; shares of every question; clarity in dB."""
        found = scenes.score(self.things, pictures, attrs)
        groups = scenes.by_group(found["right"], attrs)
        shares = {name: float(np.mean(right)) for name, right in (groups | found).items()}
        return shares | {"clarity": float(scenes.clarity(self.things, pictures).mean())}


def main(options: Options) -> dict[str, float]:
    """Train; returns the last held-out scores."""
    console = Console()
    return train(options, make_task(options, Scenes(scenes.load_things()), console), console)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
