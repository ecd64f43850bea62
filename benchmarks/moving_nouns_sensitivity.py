"""How much every unit of the shipped video model minds being quantised, by what judges it.

    python -m benchmarks.moving_nouns_sensitivity --out runs/clips-scan.jsonl [--resume]

As `benchmarks.nouns_sensitivity`; here attention over a frame, over time and to the caption are
units of their own. Scores, all continuous (`evaluation.clip_scores`): `text` judges
cross-attention, how clearly the asked-for parts are the nearest of all candidates; `time` judges
temporal attention, dB of the clip to its own mean steady frame moving as asked, so that what it
shows does not matter; `quality` judges the rest, dB of that frame to the exact picture. No dB are
more than 60. Beside them `motion`, how clearly it moves as asked, and `exact`, dB to the exact
frames, are kept. Then

    lowbit-jax allocate runs/clips-scan.jsonl --mean-bits 4.5 --out recipe.json --heat-map map.png
    python -m benchmarks.mixed_precision runs/clips-scan.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from benchmarks import sensitivity


@dataclass(frozen=True, kw_only=True)
class Options(sensitivity.Options):
    """Scan the shipped video model."""

    pictures: int = 16
    """Clips, of the last of the shipped captions; a multiple of `batch`."""
    batch: int = 8
    """Clips at a time."""
    acts: tuple[int, ...] = ()
    """Levels of the activations."""


def main(argv: list[str] | None = None) -> int:
    """Run the scan and print how the measures agree."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    return sensitivity.main("moving_nouns_sensitivity", "stdit", options)


if __name__ == "__main__":
    sys.exit(main())
