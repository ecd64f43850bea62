"""The Nouns run on paper: a CSV log, its learning curves, a sheet of samples."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Num

from benchmarks.nouns_pool import Pool
from lowbit_jax.evaluation import nouns

SCORES = (*nouns.KINDS, "mean", "psnr")
FIELDS = ("step", "loss", "seconds", *SCORES)


class Log:
    """Rows of `FIELDS`, one per step, kept in a CSV file; scores stand in the rows that have any.

    Args:
        path: the file; an existing one is continued.
        step: number of finished steps; later rows (of a run that died after its last checkpoint)
            are dropped.
    """

    def __init__(self, path: Path, step: int):
        self.path, self.rows = path, []
        if step and path.exists():
            with path.open() as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.step = step
        self.smooth_loss = float(self.rows[-1]["loss"]) if self.rows else float("nan")
        before = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        self._start = time.monotonic() - before

    def add(self, loss: float) -> None:
        """Count one more step."""
        self.step += 1
        smooth = loss if np.isnan(self.smooth_loss) else 0.98 * self.smooth_loss + 0.02 * loss
        self.smooth_loss = smooth
        seconds = round(time.monotonic() - self._start, 3)
        self.rows.append({"step": self.step, "loss": round(loss, 6), "seconds": seconds})

    def add_scores(self, scores: dict[str, float]) -> None:
        """Put held-out scores beside the last step, write the file and draw the curves."""
        self.rows[-1] |= {name: round(value, 4) for name, value in scores.items()}
        self.write()
        save_curves(self.path.with_suffix(".png"), self.rows)

    def write(self) -> None:
        """Replace the file as a whole."""
        scratch = self.path.with_suffix(".tmp")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(scratch, self.path)

    def summary(self) -> str:
        """The last row in one line."""
        row = self.rows[-1]
        scores = " ".join(f"{name} {row[name]:.3f}" for name in SCORES if name in row)
        return f"loss {self.smooth_loss:.4f}, {row['seconds']:.0f} s, {scores}"


def save_curves(path: Path, rows: list[dict]) -> None:
    """Draw loss (log scale) and held-out accuracies over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, loss = np.array([[float(row["step"]), float(row["loss"])] for row in rows]).T
    width = max(1, min(50, len(loss) // 4))
    mean = np.convolve(loss, np.ones(width) / width, "valid")
    left.semilogy(steps, loss, color="0.85", linewidth=0.8)
    left.semilogy(steps[width - 1 :], mean, color="tab:blue")
    left.set(xlabel="step", ylabel="loss", title=f"training loss, mean of {width} steps")
    scored = [row for row in rows if row.get("mean") not in (None, "")]
    for name in nouns.KINDS:
        values = [float(row[name]) for row in scored]
        right.plot([int(row["step"]) for row in scored], values, marker=".", label=name)
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title="held-out captions")
    right.legend(loc="lower right")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_samples(path: Path, pool: Pool, pictures: Num[np.ndarray, "b 32 32 3"]) -> None:
    """Rows of up to 16 nouns, the target above what was generated, three times enlarged."""
    n = min(64, len(pictures) // 16 * 16) or len(pictures)
    target = nouns.compose(pool.sprites, pool.attrs[:n])
    both = np.stack([target, pictures[:n].round()]).astype(np.uint8)
    across = min(16, n)
    grid = both.reshape(2, n // across, across, 32, 32, 3).transpose(1, 0, 3, 2, 4, 5)
    grid = grid.reshape(n // across * 2 * 32, across * 32, 3)
    plt.imsave(path, grid.repeat(3, axis=0).repeat(3, axis=1))
