"""How much every unit of the shipped image model minds being quantised, by what judges it.

    python -m benchmarks.nouns_sensitivity --out runs/nouns-scan.jsonl [--resume]

Quantises each unit (the attention of one stream of one block, and so on) alone, weights and
activations apart, FAKE quantisation in float32, and samples captions that nobody trained on: the
last of the shipped ones; `benchmarks.mixed_precision` judges by the first. Scores: `text`, how
clearly the asked-for sprites are the nearest of all candidates (`evaluation.nouns.margins`, mean of
the four kinds), and `quality`, dB to the exact picture. Then

    lowbit-jax allocate runs/nouns-scan.jsonl --mean-bits 4.5 --out recipe.json --heat-map map.png
"""

from __future__ import annotations

import sys

import tyro

from benchmarks import sensitivity


def main(argv: list[str] | None = None) -> int:
    """Run the scan and print how the measures agree."""
    options = tyro.cli(sensitivity.Options, args=argv, description=__doc__)
    return sensitivity.main("nouns_sensitivity", "flux", options)


if __name__ == "__main__":
    sys.exit(main())
