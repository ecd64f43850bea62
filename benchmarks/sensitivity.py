"""What the scans of the shipped models share: options, the run, and how the measures agree."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.console import wide_console
from benchmarks.sensitivity_subjects import ALL_PROMPTS, SUBJECTS, Draw
from lowbit_jax.precision.menu import level_name, short_name
from lowbit_jax.precision.records import MSE
from lowbit_jax.precision.report import shown_level
from lowbit_jax.precision.scan import Scan, scan
from lowbit_jax.precision.sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class Options:
    """Scan a shipped model."""

    out: Path
    """File of the scan: grows a line with each candidate."""
    resume: bool = False
    """Go on with a scan that was cut."""
    pictures: int = 16
    """Captions, the last of the shipped ones; a multiple of `batch`."""
    batch: int = 16
    """Pictures at a time."""
    steps: int = 8
    """Of the sampler."""
    acts: tuple[int, ...] = (4,)
    """Levels of the activations."""
    seed: int = 1
    """Of the noise."""


def main(name: str, network: str, options: Options) -> int:
    """Run a scan, or the rest of it, and print how the measures agree: an exit code.

    Args:
        name: of the program, for errors.
        network: whose model, see `SUBJECTS`.
        options: what was asked for.
    """
    console = wide_console()
    try:
        found = run_scan(network, options, console)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    console.print("rank correlation over units, each quantised alone", agreement_table(found))
    for v in sorted({0, shown_level(found.header)}):
        level = short_name(level_name(found.header.menu[v]))
        title = f"mean harm of a unit at {level} bits, % of the worst kind by the same measure"
        console.print(title, kinds_table(found, v))
    return 0


def run_scan(network: str, options: Options, console: Console | None) -> Sensitivity:
    """The scan, or the rest of it.

    Raises:
        ScanError: see `precision.scan.scan`. RuntimeError: the sprites cannot be fetched.
        ValueError: captions that do not come out even.
    """
    captions = range(ALL_PROMPTS - options.pictures, ALL_PROMPTS)
    draw = Draw(captions=captions, batch=options.batch, steps=options.steps, seed=options.seed)
    subject = SUBJECTS[network](draw)
    spec = Scan(
        run=subject.run,
        scorer=lambda finals, _: subject.scores(finals),
        scorer_name=subject.scorer_name,
        act_bits=options.acts,
    )
    return scan(
        spec,
        subject.saved.params,
        subject.samples,
        options.out,
        resume=options.resume,
        console=console,
    )


def agreement_table(found: Sensitivity) -> Table:
    """Rank correlation (Spearman) of every two measures, by level: over all units, then of MSE and
    each metric over the units that it judges.

    Near 1: the two do not decouple; with MSE: it ranks the units as the other does.
    """
    table = Table(box=box.SIMPLE)
    table.add_column("measures")
    columns, units = _levels(found), found.header.units
    for name, _, _ in columns:
        table.add_column(name, justify="right")

    def add(title: str, a: str, b: str, rows: list[bool]) -> None:
        pairs = [(harms[a][rows, v], harms[b][rows, v]) for _, harms, v in columns]
        table.add_row(title, *(f"{rank_correlation(*pair):.2f}" for pair in pairs))

    for a, b in combinations((MSE, *found.header.reference), 2):
        add(f"{a} - {b}", a, b, [True] * len(units))
    table.add_section()
    for metric in dict.fromkeys(unit.metric for unit in units):
        rows = [unit.metric == metric for unit in units]
        add(f"{MSE} - {metric}, its {sum(rows)} units", MSE, metric, rows)
    return table


def kinds_table(found: Sensitivity, v: int) -> Table:
    """Mean harm of each kind of unit at level `v` of the weights, by every measure.

    As a share of the largest in its column: where metrics decouple, each kind that a metric judges
    is the worst by that metric.
    """
    units = found.header.units
    table = Table(box=box.SIMPLE)
    measures = (MSE, *found.header.reference)
    kinds = list(dict.fromkeys((unit.kind, unit.metric) for unit in units))
    for name in ("units", "judged by", *measures):
        table.add_column(name, justify="right" if name in measures else "left")
    means = np.array(
        [
            [found.weights[m][[u.kind == kind for u in units], v].mean() for m in measures]
            for kind, _ in kinds
        ]
    )
    means /= np.maximum(means.max(axis=0), np.finfo(float).tiny)
    for (kind, metric), row in zip(kinds, means, strict=True):
        table.add_row(kind, metric, *(f"{100 * value:.0f}" for value in row))
    return table


def _levels(found: Sensitivity) -> list[tuple[str, dict[str, np.ndarray], int]]:
    """(what is quantised, harms by measure, their column) of every level."""
    names = [f"weights {short_name(level_name(spec))}" for spec in found.header.menu]
    rows = [(name, found.weights, v) for v, name in enumerate(names)]
    acts = [(f"acts {bits}", found.acts, v) for v, bits in enumerate(found.header.act_bits)]
    return rows + acts


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])
