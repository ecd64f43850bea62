"""An allocation for people: a table, and a heat map of what was measured and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from lowbit_jax.precision.allocate import Allocation
from lowbit_jax.precision.menu import FLOAT, FLOAT_BITS, level_name, short_name
from lowbit_jax.precision.records import MSE, Header
from lowbit_jax.precision.sensitivity import Sensitivity
from pallas_kernels.formats import FORMATS


def allocation_table(allocation: Allocation) -> Table:
    """A row per kind of unit: bits of each block, stored bits, activations, predicted harm."""
    table = Table(box=box.SIMPLE, padding=0)
    table.add_column("judged by / units")
    table.add_column(" weight bits by block")
    for column in (" stored", " act", " harm", " MSE"):
        table.add_column(column, justify="right", no_wrap=True)
    units = allocation.header.units
    for metric in dict.fromkeys(unit.metric for unit in units):
        group = [i for i, unit in enumerate(units) if unit.metric == metric]
        table.add_row(metric, "", *_figures(allocation, group, metric), style="bold")
        for name in dict.fromkeys(f"{units[i].stack}/*/{units[i].kind}" for i in group):
            rows = [i for i in group if f"{units[i].stack}/*/{units[i].kind}" == name]
            bits = " ".join(short_name(allocation.levels[i]) for i in rows)
            table.add_row(f"  {name}", f" {bits}", *_figures(allocation, rows, metric))
        table.add_section()
    return table


def _figures(allocation: Allocation, rows: Sequence[int], metric: str) -> list[str]:
    units = allocation.header.units
    weights = sum(units[i].weights for i in rows)
    stored = 8 * sum(allocation.unit_bytes[i] for i in rows) / weights
    acts = sum((allocation.act_bits[i] or FLOAT_BITS) * units[i].weights for i in rows) / weights
    harm, error = (sum(allocation.harm[m][i] for i in rows) for m in (metric, MSE))
    return [f"{stored:.2f}", f"{acts:.1f}", f"{harm:.2g}", f"{error:.2g}"]


def summary(allocation: Allocation) -> str:
    """One line: what is stored, how many segments, what stays in floating point."""
    units, sizes = allocation.header.units, allocation.sizes
    inside = 8 * sum(allocation.unit_bytes) / sum(unit.weights for unit in units)
    floats = [u.name for u, level in zip(units, allocation.levels, strict=True) if level == FLOAT]
    kept = f"{len(floats)} ({', '.join(floats[:4])}{', ...' if len(floats) > 4 else ''})"
    return (
        f"{sizes.after:,} bytes, {sizes.bits_per_weight:.3f} bits per weight over everything "
        f"stored, {inside:.3f} in the units; {allocation.segments} scan segments; units in "
        f"floating point: {kept if floats else 'none'}"
    )


def save_heat_map(path: Path, sensitivity: Sensitivity, allocation: Allocation) -> None:
    """Write a PNG: what quantising each unit alone costs by MSE and by its metric, and its bits.

    The colours of a metric are shares of the largest harm in its group: they compare units of a
    group, not groups. Of each unit the harm of the fewest bits but those of ternary is shown.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra "eval".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("heat map: pip install 'lowbit-jax[eval]' for matplotlib") from error
    header = allocation.header
    column = shown_level(header)
    level = short_name(level_name(header.menu[column]))
    by_mse, by_metric = (np.zeros(len(header.units)) for _ in range(2))
    for metric in dict.fromkeys(unit.metric for unit in header.units):
        rows = [i for i, unit in enumerate(header.units) if unit.metric == metric]
        for out, measure in ((by_mse, MSE), (by_metric, metric)):
            out[rows] = np.maximum(sensitivity.weights[measure][rows, column], 0)
        by_metric[rows] /= max(by_metric[rows].max(), np.finfo(float).tiny)
    bits = np.array([_bits(name) for name in allocation.levels], float)
    panels = (
        (f"harm at {level} bits by MSE", by_mse / max(by_mse.max(), 1e-300), "magma"),
        (f"harm at {level} bits by its metric", by_metric, "magma"),
        ("weight bits chosen", bits, "viridis"),
    )
    kinds = list(dict.fromkeys((u.stack, u.kind, u.metric) for u in header.units))
    blocks = 1 + max(u.block for u in header.units)
    width = 3.2 + 3 * max(1.6, 0.34 * blocks)
    figure = Figure(figsize=(width, 1.3 + 0.3 * len(kinds)), dpi=110, layout="constrained")
    axes: Any = figure.subplots(1, 3, sharey=True)
    for axis, (title, values, colours) in zip(axes, panels, strict=True):
        grid = np.full((len(kinds), blocks), np.nan)
        for value, unit in zip(values, header.units, strict=True):
            grid[kinds.index((unit.stack, unit.kind, unit.metric)), unit.block] = value
        last = axis is axes[-1]
        image = axis.imshow(
            grid, cmap=colours, aspect="auto", vmin=2 if last else 0, vmax=16 if last else 1
        )
        if last:
            for row, at in np.argwhere(~np.isnan(grid)):
                colour = "black" if grid[row, at] > 9 else "white"
                axis.text(at, row, f"{grid[row, at]:g}", ha="center", va="center", color=colour)
        else:
            figure.colorbar(image, ax=axis, location="bottom", label="share of the largest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(0, blocks, max(1, blocks // 8)))
        axis.set_xlabel("block", fontsize=8)
    axes[0].set_yticks(range(len(kinds)), [f"{s}/{k} ({m})" for s, k, m in kinds], fontsize=8)
    figure.savefig(path)


def shown_level(header: Header) -> int:
    """The level of fewest bits, but for ternary where there is another."""
    bits = [FORMATS[spec.format].bits for spec in header.menu]
    order = np.argsort(bits, kind="stable")
    return int(next((i for i in order if header.menu[i].format != "ternary"), order[0]))


def _bits(level: str) -> int:
    return FLOAT_BITS if level == FLOAT else int(short_name(level))
