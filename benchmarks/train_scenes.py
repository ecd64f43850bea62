"""Train a small FLUX on scenes: `python -m benchmarks.train_scenes --out runs/scenes`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from benchmarks.picture_task import PictureOptions, train_pictures


@dataclass(frozen=True, kw_only=True)
class Options(PictureOptions):
    """What to train and for how long."""

    eval_captions: int = 250


def main(options: Options) -> dict[str, float]:
    """Train; returns the last held-out scores."""
    return train_pictures(options, "scenes-flux")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
