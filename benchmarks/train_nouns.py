"""Train a small FLUX on Nouns: `python -m benchmarks.train_nouns --out runs/nouns`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

import tyro

from benchmarks.picture_task import PictureOptions, train_pictures


def main(options: PictureOptions) -> dict[str, float]:
    """Train; returns the last held-out scores."""
    return train_pictures(options, "nouns-flux")


if __name__ == "__main__":
    main(tyro.cli(PictureOptions, description=__doc__))
