"""What zero points of activations gain: `python -m benchmarks.asymmetric`.

The shipped FLUX with int8 weights per channel in all blocks and activations per token, symmetric
and asymmetric, plain and rotated; modulations in groups of 128 with floating inputs. The same
held-out captions and noise, float32 but for what is quantised, real integers. Decibels are PSNR to
the float model's pictures; the difference is taken caption by caption.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tyro
from rich.console import Console

from benchmarks.evidence_subjects import Amount, nouns_subject
from lowbit_jax.evaluation.metrics import mean_interval, psnr
from lowbit_jax.quant.recipe import RECIPES, Recipe
from lowbit_jax.quant.transform import quantize

BITS = (8, 6, 4)


def recipe_of(bits: int, rotated: bool, symmetric: bool) -> Recipe:
    """Int8 weights per channel, activations of `bits` per token."""
    base = RECIPES["quarot-w8a8"]
    *head, rest = base.rules
    changed = dataclasses.replace(
        rest, act_bits=bits, rotation=rest.rotation if rotated else None, act_symmetric=symmetric
    )
    return dataclasses.replace(base, name=f"a{bits}", rules=(*head, changed))


def main(captions: int = 16) -> None:
    """Measure and print a line for each.

    Args:
        captions: held-out ones that are sampled.
    """
    console = Console()
    subject = nouns_subject(Amount(captions=captions))
    exact = subject.sample(subject.params)
    for rotated in (False, True):
        for bits in BITS:
            both = [
                psnr(subject.sample(quantize(subject.params, recipe)), exact)
                for recipe in (recipe_of(bits, rotated, kind) for kind in (True, False))
            ]
            symmetric, asymmetric = (np.asarray(values) for values in both)
            gain = mean_interval(asymmetric - symmetric)
            console.print(
                f"A{bits}{' rotated' if rotated else ''}: symmetric {symmetric.mean():.2f} dB, "
                f"asymmetric {asymmetric.mean():.2f} dB, {gain.mean:+.2f} "
                f"[{gain.low:.2f}, {gain.high:.2f}]",
                soft_wrap=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
