"""A training run on paper: a CSV log, its learning curves, a picture of samples."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import UInt8

FIELDS = ("step", "loss", "seconds")


class Log:
    """Rows of `FIELDS` and scores, one per step, in a CSV file; few rows have scores.

    Args:
        path: the file; an existing one is continued.
        step: number of finished steps; later rows (of a run that died after its last checkpoint)
            are dropped.
        accuracies: names of the scores that are shares of 1; the curves show them.
        scores: names of the other scores.
    """

    def __init__(self, path: Path, step: int, accuracies: tuple[str, ...], scores: tuple[str, ...]):
        self.path, self.accuracies = path, accuracies
        self.scores = (*accuracies, *scores)
        self.rows: list[dict] = []
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
        save_curves(self.path.with_suffix(".png"), self.rows, self.accuracies)

    def write(self) -> None:
        """Replace the file as a whole."""
        scratch = self.path.with_suffix(".tmp")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*FIELDS, *self.scores))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(scratch, self.path)

    def summary(self) -> str:
        """The last row in one line."""
        row = self.rows[-1]
        scores = " ".join(f"{name} {row[name]:.3f}" for name in self.scores if name in row)
        return f"loss {self.smooth_loss:.4f}, {row['seconds']:.0f} s, {scores}"


def save_curves(path: Path, rows: list[dict], accuracies: tuple[str, ...]) -> None:
    """Draw loss (log scale) and held-out accuracies over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, loss = np.array([[float(row["step"]), float(row["loss"])] for row in rows]).T
    width = max(1, min(50, len(loss) // 4))
    mean = np.convolve(loss, np.ones(width) / width, "valid")
    left.semilogy(steps, loss, color="0.85", linewidth=0.8)
    left.semilogy(steps[width - 1 :], mean, color="tab:blue")
    left.set(xlabel="step", ylabel="loss", title=f"training loss, mean of {width} steps")
    scored = [row for row in rows if row.get(accuracies[0]) not in (None, "")]
    for name in accuracies:
        values = [float(row[name]) for row in scored]
        right.plot([int(row["step"]) for row in scored], values, marker=".", label=name)
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title="held-out captions")
    right.legend(loc="lower right")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_picture(path: Path, picture: UInt8[np.ndarray, "h w 3"], scale: int = 3) -> None:
    """Write a picture, every pixel `scale` times enlarged."""
    plt.imsave(path, picture.repeat(scale, axis=0).repeat(scale, axis=1))
