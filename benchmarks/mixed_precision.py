"""Mixed precision on a shipped model: bits by metrics against bits by MSE, real integers.

    python -m benchmarks.mixed_precision runs/nouns-scan.jsonl [--budgets 3.4 4.15 4.9]
    python -m benchmarks.mixed_precision runs/clips-scan.jsonl

Takes the file of `benchmarks.nouns_sensitivity` or `benchmarks.moving_nouns_sensitivity`, allocates
the same stored bits by both schemes, and samples the first of the shipped captions (the scan's are
the last) at equal noise with models whose kernels are integer codes and whose activations are int8.
Models with one level everywhere stand beside them. Intervals are 95 % bootstrap intervals over
captions, of the difference caption by caption. PSNR is to the float model; the other measures are
the scan's.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.console import wide_console
from benchmarks.sensitivity_subjects import SUBJECTS, Draw, Subject
from lowbit_jax.checkpoint import SavedModel, assemble, iter_parts
from lowbit_jax.evaluation import metrics
from lowbit_jax.precision.allocate import Allocation, allocate, uniform
from lowbit_jax.precision.menu import FLOAT, level_name, short_name
from lowbit_jax.precision.problem import Request, Scheme, stacks_of
from lowbit_jax.precision.sensitivity import Sensitivity, load_sensitivity, restricted
from lowbit_jax.quant.qtensor import is_qtensor
from lowbit_jax.quant.recipe import BLOCK_LINEARS, Recipe, Rule
from lowbit_jax.quant.transform import quantize

SCHEMES: tuple[Scheme, ...] = ("mse", "metric")
BUDGETS = {"flux": (3.4, 4.15, 4.9), "stdit": (4.7, 5.3, 5.73, 6.2, 7.46)}  # by network
PSNR = "PSNR"  # dB to the float model


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the schemes."""

    scan: tyro.conf.Positional[Path]
    """File of a finished scan of a shipped model."""
    budgets: tuple[float, ...] = ()
    """Bits per parameter over everything stored; none: those that tell the model's levels apart."""
    formats: tuple[str, ...] = ()
    """Weight formats to choose from; none: all that were scanned."""
    pictures: int = 32
    """Captions, the first of the shipped ones; a multiple of `batch`."""
    batch: int = 16
    """Pictures or clips at a time."""
    steps: int = 10
    """Of the sampler."""
    seed: int = 0
    """Of the noise, the same for every model."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's figures: a number for each picture, by measure; `accuracy` is one in all."""

    name: str
    bits: float
    segments: int
    values: dict[str, np.ndarray]
    accuracy: float


class Levels:
    """The whole model in every level, quantised once; mixed models are put together of them."""

    def __init__(self, saved: SavedModel, sensitivity: Sensitivity):
        self._params = saved.params
        self._specs = {level_name(spec): spec for spec in sensitivity.header.menu}
        self._parts = {FLOAT: dict(iter_parts(saved.params))}

    def _level(self, name: str) -> dict[str, Any]:
        if name not in self._parts:
            rule = Rule(match=BLOCK_LINEARS, weights=self._specs[name], act_bits=8)
            recipe = Recipe(name=name, rules=(rule,))
            tree = jax.jit(lambda params: quantize(params, recipe))(self._params)
            self._parts[name] = dict(iter_parts(tree))
        return self._parts[name]

    def mixed(self, allocation: Allocation) -> dict[str, Any]:
        """The model that `quantize` makes by the allocation's recipe: the same codes."""
        units = zip(allocation.header.units, allocation.levels, strict=True)
        chosen = {layer: level for unit, level in units for layer in unit.layers}
        parts = []
        for name, leaves in self._level(FLOAT).items():
            part = {}
            for path in leaves:
                linear, _, leaf = path.rpartition("/")
                level = chosen.get(f"{name}/{linear}", FLOAT) if leaf == "kernel" else FLOAT
                part[path] = self._level(level)[name][path]
            parts.append((name, part))
        return assemble(parts)


def main(argv: list[str] | None = None) -> int:
    """Print the table, the differences and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    console = wide_console()
    try:
        sensitivity = load_sensitivity(options.scan)
        if options.formats:
            sensitivity = restricted(sensitivity, options.formats)
        draw = Draw(
            captions=range(options.pictures),
            batch=options.batch,
            steps=options.steps,
            seed=options.seed,
        )
        network = sensitivity.header.model
        subject = SUBJECTS[network](draw)
        budgets = options.budgets or BUDGETS[network]
        rows = compare(subject, sensitivity, budgets, console)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"mixed_precision: {error}", file=sys.stderr)
        return 2
    console.print(results_table(rows))
    by_name, gains = {row.name: row for row in rows}, []
    for budget in budgets:
        pair = [by_name[f"{scheme} {budget:g}"].values for scheme in ("metric", "mse")]
        for measure in pair[0]:
            gain = metrics.difference_interval(*(values[measure] for values in pair))
            console.print(f"{budget:g} bits, {measure}: metric - mse {gain}")
            gains.append(f"mp_gain_{measure.lower()}_{budget:g}={gain.mean:.3f}")
    console.print(f"figure: {' '.join(gains)}", soft_wrap=True)
    return 0


def compare(
    subject: Subject, sensitivity: Sensitivity, budgets: tuple[float, ...], console: Console
) -> list[Row]:
    """The float model, each level everywhere, and both schemes at every budget."""
    float_row, reference = measure(subject, "float", subject.saved.params, 16.0, None)
    levels, rows = Levels(subject.saved, sensitivity), [float_row]
    console.print("  ".join(cells(float_row)), soft_wrap=True)
    known: dict[tuple[str, ...], Row] = {}  # the schemes may choose the same
    for name, made in allocations(sensitivity, budgets):
        if made.levels not in known:
            params = levels.mixed(made)
            check_bits(params, made)
            bits = made.sizes.bits_per_weight
            known[made.levels] = measure(subject, name, params, bits, reference)[0]
            console.print("  ".join(cells(known[made.levels])), soft_wrap=True)
        rows.append(dataclasses.replace(known[made.levels], name=name))
    return rows


def allocations(
    sensitivity: Sensitivity, budgets: tuple[float, ...]
) -> list[tuple[str, Allocation]]:
    """Each level everywhere, then both schemes at every budget, by their names in the table."""
    names = [level_name(spec) for spec in sensitivity.header.menu]
    found = [(f"all {short_name(name)}", uniform(sensitivity, name)) for name in names]
    for budget in budgets:
        for scheme in SCHEMES:
            request = Request(mean_bits=budget, scheme=scheme)
            found.append((f"{scheme} {budget:g}", allocate(sensitivity, request)))
    return found


def measure(
    subject: Subject, name: str, params: Any, bits: float, reference: np.ndarray | None
) -> tuple[Row, np.ndarray]:
    """A model's figures and what it makes; without a reference it is its own."""
    finals = subject.sample(params)
    pictures = subject.decode(finals)
    psnr = metrics.psnr(pictures, pictures if reference is None else reference)
    row = Row(
        name=name,
        bits=bits,
        segments=len(list(stacks_of(params))),
        values={PSNR: psnr, **subject.scores(finals)},
        accuracy=subject.right(finals),
    )
    return row, pictures


def check_bits(params: Any, allocation: Allocation) -> None:
    """That the codes, scales and zero points in memory take what the allocation counted.

    Raises:
        ValueError: it is not.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    stored = sum(leaf.nbytes for leaf in leaves if is_qtensor(leaf))
    pairs = zip(allocation.unit_bytes, allocation.levels, strict=True)
    expected = sum(size for size, level in pairs if level != FLOAT)
    if stored != expected:
        raise ValueError(f"the codes and scales take {stored:,} bytes, not {expected:,}")


def results_table(rows: list[Row]) -> Table:
    """Means over pictures; PSNR of the mean squared error."""
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("bits by", no_wrap=True)
    for name in ("bits", "segments", *rows[0].values, "attributes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    """A row of the table."""
    error = np.mean(10 ** (-row.values[PSNR] / 10))
    others = [values.mean() for name, values in row.values.items() if name != PSNR]
    return [
        row.name,
        f"{row.bits:.3f}",
        f"{row.segments}",
        "-" if error == 0 else f"{-10 * np.log10(error):.2f}",
        *(f"{value:.3f}" for value in others),
        f"{100 * row.accuracy:.1f} %",
    ]


if __name__ == "__main__":
    sys.exit(main())
