"""`lowbit-jax inspect DIR`: what a converted checkpoint holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lowbit_jax.checkpoint import SavedModelError, abstract_parts, load, read_manifest
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.report import size_report, size_table


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the contents, sizes and origin of a converted checkpoint."""

    folder: tyro.conf.Positional[Path]
    """A folder written by convert_and_quantize."""
    verify: bool = False
    """Also read every tensor and compare its digest with the manifest."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the named recipes."""


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one line on stderr for bad input."""
    command = tyro.cli(Command, args=argv, prog="lowbit-jax")  # type: ignore[arg-type, var-annotated]
    console = Console(markup=False)
    try:
        if isinstance(command, Inspect):
            inspect(command, console)
        else:
            list_recipes(console)
    except (ValueError, OSError) as error:
        print(f"lowbit-jax: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(command: Inspect, console: Console) -> None:
    """Print what a checkpoint's manifest says; with `verify`, check every tensor.

    Raises:
        SavedModelError: no checkpoint, or a damaged one.
    """
    manifest = read_manifest(command.folder)
    try:
        recipe, source = manifest["recipe"], manifest["source"] or {}
        report = size_report(abstract_parts(manifest))
        console.print(
            f"{command.folder}: {manifest['model']}, "
            f"recipe '{recipe['name']}' ({recipe['description']})"
        )
        console.print(
            "config: " + ", ".join(f"{key} {value}" for key, value in manifest["config"].items())
        )
        for note in source.get("notes", ()):
            console.print(note, soft_wrap=True)
        for name, digest in source.get("files", {}).items():
            console.print(
                f"from {name} ({source['layout']} layout), sha256 {digest}", soft_wrap=True
            )
        console.print(
            "written with " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SavedModelError(f"{command.folder}: manifest.json is incomplete: {error}") from None
    console.print(size_table(report, "stored, against bfloat16"))
    console.print(f"{report.bits_per_weight:.3f} bits per weight over everything stored")
    if command.verify:
        load(command.folder)
        console.print("every tensor matches its digest")


def list_recipes(console: Console) -> None:
    """Print name and meaning of every named recipe."""
    for recipe in RECIPES.values():
        console.print(f"{recipe.name:18}{recipe.description}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
