"""Mixed precision on the shipped image model: bits by metrics against bits by MSE, real integers.

    python -m benchmarks.mixed_precision runs/nouns-scan.jsonl [--budgets 3.4 4.15 4.9]

Takes the file of `benchmarks.nouns_sensitivity`, allocates the same stored bits by both schemes,
and samples the first of the shipped captions (the scan's are the last) at equal noise with models
whose kernels are integer codes and whose activations are int8. Intervals are 95 % bootstrap
intervals over captions, of the difference caption by caption.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.demo import GRID, MODEL, load_prompts
from benchmarks.nouns_sensitivity import scores, to_pictures
from convert.port import port
from lowbit_jax.checkpoint import SavedModel, assemble, iter_parts
from lowbit_jax.evaluation import metrics, nouns
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.precision.allocate import Allocation, allocate
from lowbit_jax.precision.menu import FLOAT, level_name
from lowbit_jax.precision.problem import Request, Scheme
from lowbit_jax.precision.sensitivity import Sensitivity, load_sensitivity
from lowbit_jax.quant.qtensor import is_qtensor
from lowbit_jax.quant.recipe import BLOCK_LINEARS, Recipe, Rule
from lowbit_jax.quant.transform import quantize
from lowbit_jax.samplers.flow_euler import FlowSchedule

TABLE_WIDTH = 120  # columns where the output is a file or a pipe
SCHEMES: tuple[Scheme, ...] = ("mse", "metric")
MEASURES = ("PSNR", "quality", "text")  # dB to the float model, dB to the exact picture, margin


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the schemes."""

    scan: tyro.conf.Positional[Path]
    """File of a finished scan of the shipped model."""
    budgets: tuple[float, ...] = (3.4, 4.15, 4.9)
    """Bits per parameter over everything stored."""
    pictures: int = 32
    """Captions, the first of the shipped ones."""
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
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(markup=False, width=TABLE_WIDTH)
    try:
        sensitivity = load_sensitivity(options.scan)
        rows = compare(options, sensitivity, console)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"mixed_precision: {error}", file=sys.stderr)
        return 2
    console.print(results_table(rows))
    gains = []
    for budget in options.budgets:
        by_name = {row.name: row for row in rows}
        pair = [by_name[f"{scheme} {budget:g}"].values for scheme in ("metric", "mse")]
        for measure in MEASURES:
            gain = metrics.difference_interval(*(values[measure] for values in pair))
            console.print(f"{budget:g} bits, {measure}: metric - mse {gain}")
            gains.append((budget, measure, gain.mean))
    words = " ".join(f"mp_gain_{m.lower()}_{b:g}={g:.3f}" for b, m, g in gains)
    console.print(f"figure: {words}", soft_wrap=True)
    return 0


def compare(options: Options, sensitivity: Sensitivity, console: Console) -> list[Row]:
    """The float model, and both schemes at every budget."""
    sprites, prompts = nouns.load_sprites(), load_prompts(options.pictures)
    saved = port(MODEL, dtype=jnp.float32)
    model = build(saved.model, saved.config, jnp.float32)
    schedule = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(options.steps, GRID[0] * GRID[1])
    shape = (options.pictures, GRID[0] * GRID[1], model.config.in_channels)  # type: ignore[attr-defined]
    noise = jax.random.normal(jax.random.key(options.seed), shape)

    def row(name: str, params: Any, bits: float, reference: np.ndarray | None) -> tuple[Row, Any]:
        inputs = (noise, prompts.states, prompts.pooled, sigmas)
        tokens = np.asarray(sample_tokens(model, params, *inputs, grid=GRID))
        pictures = to_pictures(tokens)
        values = scores(sprites, tokens, prompts.attrs)
        expected = pictures if reference is None else reference
        values["PSNR"] = metrics.psnr(pictures, expected)
        right = nouns.score(sprites, pictures * 255, prompts.attrs)
        segments = sum(len(params[stack]) for stack in ("double_blocks", "single_blocks"))
        accuracy = float(np.mean(list(right.values())))
        made = Row(name=name, bits=bits, segments=segments, values=values, accuracy=accuracy)
        console.print("  ".join(cells(made)), soft_wrap=True)
        return made, pictures

    first, reference = row("float", saved.params, 16.0, None)
    levels, rows = Levels(saved, sensitivity), [first]
    known: dict[tuple[str, ...], Row] = {}  # the schemes may choose the same
    for budget in options.budgets:
        for scheme in SCHEMES:
            name = f"{scheme} {budget:g}"
            made = allocate(sensitivity, Request(mean_bits=budget, scheme=scheme))
            if made.levels not in known:
                params = levels.mixed(made)
                check_bits(params, made)
                known[made.levels] = row(name, params, made.sizes.bits_per_weight, reference)[0]
            rows.append(dataclasses.replace(known[made.levels], name=name))
    return rows


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
    for name in ("bits", "segments", "PSNR dB", "exact dB", "text margin", "attributes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    """A row of the table."""
    error = np.mean(10 ** (-row.values["PSNR"] / 10))
    return [
        row.name,
        f"{row.bits:.3f}",
        f"{row.segments}",
        "-" if error == 0 else f"{-10 * np.log10(error):.2f}",
        f"{row.values['quality'].mean():.2f}",
        f"{row.values['text'].mean():.3f}",
        f"{100 * row.accuracy:.1f} %",
    ]


if __name__ == "__main__":
    sys.exit(main())
