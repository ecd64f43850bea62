"""Tables, pictures and plots of evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from rich import box
from rich.table import Table

from benchmarks.evidence import Outcome
from lowbit_jax.evaluation.metrics import Interval, difference_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = ("bits", "MB", "score %", "PSNR dB", "SSIM", "1000 LPIPS", "FD")
KEPT = ("score", "psnr", "ssim", "lpips")  # of `Outcome.values`: shown in the first table
MARGIN = 130  # pixels for names beside a grid


def cells(outcome: Outcome, reference: Outcome) -> list[str]:
    """What `COLUMNS` say of one outcome, intervals where there are captions to resample."""
    if outcome is reference:
        return [*_sizes(outcome), _percent(outcome.interval("score")), "-", "-", "-", "-"]
    distance = _distance(outcome, reference)
    return [
        *_sizes(outcome),
        _percent(outcome.interval("score")),
        _number(outcome.interval("psnr"), 1),
        f"{outcome.values['ssim'].mean():.3f}",
        _number(_times(1000, outcome.interval("lpips")), 2),
        distance,
    ]


def table(rows: Mapping[str, Outcome], title: str) -> Table:
    """For the terminal; the first row is the reference."""
    out = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("recipe", no_wrap=True)
    for column in COLUMNS:
        out.add_column(column, justify="right", no_wrap=True)
    reference = next(iter(rows.values()))
    for name, row in rows.items():
        out.add_row(name, *cells(row, reference))
    return out


def markdown(rows: Mapping[str, Outcome], title: str) -> str:
    """The same for a page."""
    reference = next(iter(rows.values()))
    lines = [f"**{title}**", "", f"| recipe | {' | '.join(COLUMNS)} |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    lines += [f"| {name} | {' | '.join(cells(row, reference))} |" for name, row in rows.items()]
    return "\n".join(lines)


def beats(a: Outcome, b: Outcome, name: str = "psnr") -> Interval:
    """By how much a is above b, caption by caption."""
    return difference_interval(a.values[name], b.values[name])


def differences(rows: Mapping[str, Outcome], pairs: Sequence[tuple[str, str]]) -> Table:
    """By how much the first of each pair is above the second, caption by caption, 95 %."""
    measures = {"PSNR dB": ("psnr", 1), "1000 LPIPS": ("lpips", 1000), "score %": ("score", 100)}
    out = Table(title="differences by caption", box=box.SIMPLE, pad_edge=False)
    for column in ("recipe", "less", *measures):
        out.add_column(column, no_wrap=True)
    for first, second in pairs:
        found = [_times(k, beats(rows[first], rows[second], n)) for n, k in measures.values()]
        out.add_row(first, second, *(f"{x.mean:+.2f} [{x.low:.2f}, {x.high:.2f}]" for x in found))
    return out


def judged(rows: Mapping[str, Outcome]) -> Table:
    """Means of all that the exact judge says."""
    names = [name for name in next(iter(rows.values())).values if name not in KEPT]
    out = Table(title="the judge's scores", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("recipe", no_wrap=True)
    for name in names:
        out.add_column(name.replace("_", " "), justify="right")
    for recipe, row in rows.items():
        out.add_row(recipe, *(f"{row.values[name].mean():.3f}" for name in names))
    return out


def save_grid(path: Path, rows: Mapping[str, Outcome], scale: int = 2) -> None:
    """A row per method: pictures, or of clips the first, a middle and the last frame."""
    tiles = {name: _tiles(row.shown) for name, row in rows.items()}
    count, side = next(iter(tiles.values())).shape[:2]
    step = side * scale + 2
    sheet = Image.new("RGB", (MARGIN + count * step, len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(tiles.items()):
        draw.text((4, y * step + step // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((side * scale,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile, (MARGIN + x * step, y * step))
    sheet.save(path, optimize=True)


def save_plot(path: Path, rows: Mapping[str, Outcome], title: str) -> None:
    """PSNR against stored bits, with intervals; a colour per method."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    methods = dict.fromkeys(name.split("-")[0] for name in list(rows)[1:])
    for number, method in enumerate(methods):
        found = [(n, row) for n, row in rows.items() if n.split("-")[0] == method]
        for name, row in found:
            psnr = row.interval("psnr")
            error = [[psnr.mean - psnr.low], [psnr.high - psnr.mean]]
            axes.errorbar(row.bits, psnr.mean, error, fmt="o", color=f"C{number}", capsize=3)
            label = name.split("-", 1)[-1]
            axes.annotate(label, (row.bits, psnr.mean), (4, 3), textcoords="offset points", size=7)
        axes.plot([], [], "o", color=f"C{number}", label=method)
    axes.set(xlabel="stored bits per parameter", ylabel="PSNR to the float model, dB", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tiles(shown: np.ndarray) -> np.ndarray:
    if shown.ndim == 4:
        return shown
    frames = shown[:4, [0, shown.shape[1] // 2, -1]]
    return frames.reshape(-1, *frames.shape[2:])


def _sizes(outcome: Outcome) -> list[str]:
    return [f"{outcome.bits:.2f}", f"{outcome.bytes / 1e6:.2f}"]


def _percent(interval: Interval) -> str:
    return _number(_times(100, interval), 1)


def _times(factor: float, interval: Interval) -> Interval:
    return Interval(*(factor * value for value in interval))


def _number(interval: Interval, digits: int) -> str:
    """Mean and the wider half of its interval."""
    half = max(interval.mean - interval.low, interval.high - interval.mean)
    return f"{interval.mean:.{digits}f} ±{half:.{digits}f}"


def _distance(outcome: Outcome, reference: Outcome) -> str:
    try:
        return f"{outcome.distance(reference):.3f}"
    except ValueError:  # too few pictures for a covariance
        return "-"
