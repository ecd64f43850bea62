"""`lowbit-jax`: pictures, contents of checkpoints, recipes, allocation of bits, kernel audit."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowbit_jax.checkpoint import SavedModelError, abstract_parts, load, read_manifest
from lowbit_jax.cli_allocate import Allocate, run_allocate
from lowbit_jax.cli_sample import Sample, sample
from lowbit_jax.pipelines.folder import FLUX, INDEX, check_folder
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.report import size_report, size_table
from pallas_kernels.audit.cases import cases
from pallas_kernels.audit.compile import ToolError
from pallas_kernels.audit.report import COLUMNS, cells, write_json
from pallas_kernels.audit.verdict import failures, figure
from pallas_kernels.audit.workers import examine_all

TABLE_WIDTH = 250  # columns of the audit's table where the output is a file or a pipe


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the contents, sizes and origin of a converted checkpoint."""

    folder: tyro.conf.Positional[Path]
    """A folder written by convert_and_quantize, of one model or of a whole pipeline."""
    verify: bool = False
    """Also read every tensor and compare its digest with the manifest."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the named recipes."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Compile the kernels for GPUs that need not be there, and check the machine code.

    Needs the extra "audit" (`make audit` installs it) and no GPU. Every figure is static or of a
    model; none is a measured speed.
    """

    targets: tuple[str, ...] = ("a100",)
    """Which of a100, a10, l20, h100. The floors hold on the A100; spills fail on every one."""
    ops: tuple[str, ...] = ()
    """Only these ops; without, all."""
    full: bool = False
    """Every op at every layer with every number of rows, not only the main shapes."""
    workers: int = 2
    """Processes that compile."""
    json: Path | None = None
    """Also write every number to this file."""


Command = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Allocate, tyro.conf.subcommand("allocate")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 for an audit that failed, or 2 for bad input.

    Bad input is said in one line on stderr.
    """
    command = tyro.cli(Command, args=argv, prog="lowbit-jax")  # type: ignore[arg-type, var-annotated]
    console = Console(markup=False)
    try:
        if isinstance(command, Audit):
            return audit(command, console)
        if isinstance(command, Inspect):
            inspect(command, console)
        elif isinstance(command, Sample):
            sample(command, console)
        elif isinstance(command, Allocate):
            run_allocate(command, console)
        else:
            list_recipes(console)
    except (ValueError, OSError, ImportError, ToolError) as error:
        print(f"lowbit-jax: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(command: Inspect, console: Console) -> None:
    """Print what a checkpoint's manifest says; with `verify`, check every tensor.

    Raises:
        SavedModelError: no checkpoint, or a damaged one.
        PipelineError: a pipeline that is incomplete.
    """
    if (command.folder / INDEX).is_file():
        check_folder(command.folder, FLUX)
        for part in FLUX.models:
            inspect(replace(command, folder=command.folder / part), console)
        return
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


def audit(command: Audit, console: Console) -> int:
    """Audit the kernels, print a table, the failures and one line of figures; 1 if any failed.

    Raises:
        ValueError: an unknown op or target.
        ToolError: a piece of the compiler is missing, or fails.
    """
    chosen = cases(command.ops, full=command.full)
    jobs = [(case, name, None) for name in command.targets for case in chosen]
    stream = examine_all(jobs, command.workers)
    progress = Console(stderr=True)
    findings = list(track(stream, "compiling", len(jobs), console=progress, transient=True))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    wrong = []
    for found in findings:
        table.add_row(*cells(found))
        name = f"{found.target} {found.case.op} {found.case.shape}"
        wrong += [f"FAILED {name}: {failure}" for failure in failures(found)]
    wide = console if console.is_terminal else Console(markup=False, width=TABLE_WIDTH)
    wide.print("machine code and modelled bounds; nothing here is a measured speed")
    wide.print(table)
    for line in wrong:
        console.print(line, soft_wrap=True)
    if command.json:
        write_json(command.json, findings)
    console.print(figure(findings), soft_wrap=True)
    return 1 if wrong else 0


def list_recipes(console: Console) -> None:
    """Print name and meaning of every named recipe."""
    for recipe in RECIPES.values():
        console.print(f"{recipe.name:18}{recipe.description}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
