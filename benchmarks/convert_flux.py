"""FLUX.1-dev converted and quantised, beside what a user of PyTorch would run on the same files.

    python -m benchmarks.convert_flux           # 2 + 4 blocks of the published width, both layouts
    python -m benchmarks.convert_flux --full    # all 19 + 38: 23.8 GB of source; says so first

Writes a synthetic checkpoint (random weights, names and shapes as published, shards of 10 GB), then
converts it with each recipe (statistics are made up for those that need them) and, where their
packages are installed, quantises it in PyTorch (`benchmarks.convert_rivals`), each in a process of
its own, one after the other. One checkpoint and one result are on disk at a time. The time is the
whole command's; see `benchmarks.convert`. A rival holds the whole model: one that memory has no
room for is left out, and said.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.convert import (
    CASES,
    STATISTICS,
    Watched,
    check_disk,
    convert,
    folder_bytes,
    watch,
    write_statistics,
    write_synthetic,
)
from benchmarks.convert_rivals import RIVALS
from convert.checkpoint_files import open_checkpoint
from lowbit_jax.quant.recipe import load_recipe

FULL = (19, 38)
RIVAL_MEMORY = 1.15  # of the source, and half a gigabyte of torch: below it a rival cannot run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a synthetic FLUX.1-dev with several recipes; measure time, memory and sizes."""

    full: bool = False
    """All 19 + 38 blocks: 23.8 GB of source, and up to 12 GB of result at a time."""
    blocks: tuple[int, int] = (2, 4)
    """Numbers of double and of single blocks, without --full."""
    hidden: int = 3072
    """Width, a multiple of 128."""
    recipes: tuple[str, ...] = ("flux-1.58bit", "viditq-w8a8", "w8a8", "w4a8")
    """Named recipes or JSON files."""
    layouts: tuple[Literal["diffusers", "bfl"], ...] = ("diffusers", "bfl")
    """Namings of the checkpoint."""
    rivals: tuple[str, ...] = tuple(RIVALS)
    """Quantisers of PyTorch to run on the diffusers layout, where installed."""
    dir: Path | None = None
    """Folder to work in; the system's temporary one by default."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion; `ours` is False for a rival, `reason` says why one did not run."""

    layout: str
    name: str
    ours: bool
    source: int
    run: Watched | None = None
    output: int = 0
    reason: str = ""


def main(argv: list[str] | None = None) -> None:
    """Write, convert, measure, clean up; print a table and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    blocks = FULL if options.full else options.blocks
    console = Console()
    parent = options.dir or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for layout in options.layouts:
        case = CASES[layout]
        config = case.config(options.hidden, blocks)
        largest = max(options.recipes, key=lambda name: _disk_bits(name))
        check_disk(parent, case, config, load_recipe(largest))
        folder = Path(tempfile.mkdtemp(prefix="convert-flux-", dir=parent))
        try:
            console.print(f"writing {blocks[0]} + {blocks[1]} blocks, {layout} layout")
            write_synthetic(folder / "source", case, config)
            write_statistics(folder, case, config)
            rows += _measure(folder, layout, options, console)
        finally:
            shutil.rmtree(folder)
    console.print(_table(rows, blocks, options.hidden))
    for row in rows:
        if row.reason:
            console.print(f"not run: {row.name}, {row.reason}", soft_wrap=True)
    ours = [row for row in rows if row.ours and row.run]
    first = [row for row in ours if row.name == options.recipes[0]]
    slowest = min(row.source / row.run.seconds for row in ours if row.run)
    print(
        f"figure: convert_MBps={slowest / 1e6:.1f} "
        f"peak_rss_GB={max(row.run.peak for row in ours if row.run) / 1e9:.3f} "
        f"ratio={first[0].source / first[0].output:.3f}"
    )


def _disk_bits(recipe: str) -> float:
    """How wide the widest weights of a recipe are: what needs the most disk."""
    widths = {"int8": 8, "int6": 6, "int4": 4, "ternary": 2}
    rules = load_recipe(recipe).rules
    return max((widths[r.weights.format] if r.weights else 16 for r in rules), default=16)


def _measure(folder: Path, layout: str, options: Options, console: Console) -> list[Row]:
    source, out = folder / "source", folder / "out"
    statistics = folder / STATISTICS
    with open_checkpoint(source) as checkpoint:
        size = checkpoint.total_bytes
    rows = []
    for recipe in options.recipes:
        console.print(f"converting with {recipe}")
        result = convert(source, out, recipe, statistics)
        run = Watched(result.seconds, result.cpu_seconds, result.peak)
        rows.append(
            Row(layout=layout, name=recipe, ours=True, source=size, run=run, output=result.output)
        )
        shutil.rmtree(out)
    if layout != "diffusers":  # the only layout that they read without a conversion before
        return rows
    for name in options.rivals:
        reason = _why_not(name, size)
        if reason:
            rows.append(Row(layout=layout, name=name, ours=False, source=size, reason=reason))
            continue
        console.print(f"quantising with {name}")
        command = [sys.executable, "-m", "benchmarks.convert_rivals", name, str(source), str(out)]
        run = watch(command)
        output = folder_bytes(out)
        rows.append(Row(layout=layout, name=name, ours=False, source=size, run=run, output=output))
        shutil.rmtree(out)
    return rows


def _why_not(rival: str, source: int) -> str:
    """Why a rival cannot run here; "" when it can."""
    missing = RIVALS[rival].missing
    if missing:
        return f"not installed: {', '.join(missing)}"
    need = RIVAL_MEMORY * source + 0.5e9
    free = available_memory()
    if need > free:
        return f"holds the model: {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    return ""


def available_memory() -> int:
    """Bytes that can be taken without swapping: caches count as free, the source just written is
    in them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _table(rows: list[Row], blocks: tuple[int, int], hidden: int) -> Table:
    title = f"FLUX.1 of {blocks[0]} + {blocks[1]} blocks, width {hidden}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("quantiser")
    table.add_column("layout")
    for column in ("s", "CPU s", "MB/s", "peak GB", "output GB", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row.run is None:
            continue
        run = row.run
        numbers = (run.seconds, run.cpu_seconds, row.source / run.seconds / 1e6)
        sizes = (run.peak / 1e9, row.output / 1e9, row.source / row.output)
        name = row.name if row.ours else f"({row.name})"
        table.add_row(
            name, row.layout, *(f"{n:,.1f}" for n in numbers), *(f"{x:.3f}" for x in sizes)
        )
    return table


if __name__ == "__main__":
    main()
