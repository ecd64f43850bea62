"""`lowbit-jax allocate`: a scan's file and a budget in, a recipe and a heat map out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from lowbit_jax.precision.allocate import allocate
from lowbit_jax.precision.problem import Request
from lowbit_jax.precision.report import allocation_table, save_heat_map, summary
from lowbit_jax.precision.sensitivity import load_sensitivity, restricted
from lowbit_jax.quant.recipe import load_recipe

TABLE_WIDTH = 160  # columns where the output is a file or a pipe


@dataclass(frozen=True, kw_only=True)
class Allocate:
    """Choose bits for every unit of a model from a sensitivity scan and a budget.

    Needs the extra "eval" (scipy; matplotlib for the heat map).
    """

    scan: tyro.conf.Positional[Path]
    """The file of a finished scan."""
    out: Path
    """Recipe to write, for convert_and_quantize --recipe."""
    mean_bits: float | None = None
    """Budget: bits per parameter over everything stored, as `lowbit-jax inspect` counts them."""
    bytes: int | None = None
    """Budget: bytes in memory of everything stored."""
    scheme: Literal["metric", "mse"] = "metric"
    """metric: bits shared between groups of units by MSE, inside a group by its own metric; mse:
    by MSE alone."""
    formats: tuple[str, ...] = ()
    """Weight formats to choose from, such as int4 int8; none: all that were scanned."""
    act_bits: int = 8
    """Of the activations of quantised units; 0 leaves them in floating point."""
    mean_act_bits: float | None = None
    """Choose activation bits too, to this mean; the scan must have tried some."""
    segments: int = 8
    """Scan segments of all stacks together, at most."""
    like: str | None = None
    """Recipe, by name or file, that lends every rule its balance, rotation and error feedback, such
    as viditq-w4a8; the recipe that is written then needs statistics."""
    heat_map: Path | None = None
    """PNG to write."""


def run_allocate(command: Allocate, console: Console) -> None:
    """Allocate, print the table, write the recipe and the heat map.

    Raises:
        ScanError: an unfinished or damaged scan, a format that it did not try.
        AllocationError: a budget that cannot be met.
        RecipeError: an unknown recipe to be like, or one that cannot be.
        ImportError: scipy or matplotlib is missing.
    """
    sensitivity = load_sensitivity(command.scan)
    if command.formats:
        sensitivity = restricted(sensitivity, command.formats)
    request = Request(
        bytes=command.bytes,
        mean_bits=command.mean_bits,
        scheme=command.scheme,
        act_bits=command.act_bits or None,
        mean_act_bits=command.mean_act_bits,
        segments=command.segments,
        like=None if command.like is None else load_recipe(command.like),
    )
    found = allocate(sensitivity, request, command.out.stem)
    wide = console if console.is_terminal else Console(markup=False, width=TABLE_WIDTH)
    wide.print(allocation_table(found))
    console.print(summary(found), soft_wrap=True)
    command.out.write_text(json.dumps(found.recipe.to_json(), indent=1) + "\n")
    console.print(f"recipe: {command.out}", soft_wrap=True)
    if command.heat_map is not None:
        save_heat_map(command.heat_map, sensitivity, found)
        console.print(f"heat map: {command.heat_map}", soft_wrap=True)
