"""How fast, and in how much memory, a FLUX checkpoint is converted and quantised.

    python -m benchmarks.convert --blocks 2 4 --recipe flux-1.58bit

Writes a FLUX of the published width but fewer blocks, with random weights and sharded like the
published one, and converts it with `python -m convert` in a process of its own. The time is the
whole command's, start and digests included. The source has just been written, so the system may
still hold it in memory: reading from a slower disk comes on top.

"Overhead" is the peak resident memory less the bytes written: what conversion needs besides its
output. The converter holds two layers at a time, one being written and one being converted, and
never the whole output, so it is the peak itself that must stay the same for a deeper model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import ml_dtypes
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from convert import flux
from convert.checkpoint_files import open_checkpoint
from convert.job import plan
from convert.safetensors import TensorSpec, write_sharded
from convert.table import expand
from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.models.flux import FluxConfig, abstract_params
from lowbit_jax.quant.recipe import Recipe, load_recipe
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.transform import quantize

HEAD_DIM = 128  # the only one a checkpoint without a config.json may have
SHARD_BYTES = 10 * 10**9
LAYOUTS = {"diffusers": flux.DIFFUSERS, "bfl": flux.BFL}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a synthetic FLUX; measure time and peak memory."""

    blocks: tuple[int, int] = (2, 4)
    """Number of double and of single blocks (FLUX.1 has 19 and 38)."""
    recipe: str = "flux-1.58bit"
    """A named recipe or a JSON file."""
    layout: Literal["diffusers", "bfl"] = "diffusers"
    """Naming of the synthetic checkpoint."""
    hidden: Annotated[int, tyro.conf.arg(help=f"Width, a multiple of {HEAD_DIM}.")] = 3072
    dir: Path | None = None
    """Folder to work in; the system's temporary one by default."""
    keep: bool = False
    """Leave the synthetic checkpoint and its conversion on disk."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one conversion took; sizes in bytes.

    Attributes:
        seconds: the whole command, from start to exit.
        cpu_seconds: what it used of all processors together; steadier on a busy machine.
        peak: largest resident memory, mapped pages of the source included.
        planned: what the converter's plan said the peak would be.
        source: bytes of the tensors read.
        output: bytes of the files written.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    planned: int
    source: int
    output: int


def main(argv: list[str] | None = None) -> None:
    """Write, convert, measure, clean up; print a table and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    config = FluxConfig(
        hidden_size=options.hidden,
        num_heads=options.hidden // HEAD_DIM,
        depth=options.blocks[0],
        depth_single_blocks=options.blocks[1],
    )
    recipe = load_recipe(options.recipe)
    parent = options.dir or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    check_disk(parent, config, recipe)
    folder = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=parent))
    try:
        write_synthetic(folder / "source", config, options.layout)
        result = convert(folder / "source", folder / "out", options.recipe)
    finally:
        if options.keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder)
    show(result, options)


def check_disk(parent: Path, config: FluxConfig, recipe: Recipe) -> None:
    """Say what will be written; raise `SystemExit` when it does not fit."""
    params = abstract_params(config)
    sizes = size_report(iter_parts(jax.eval_shape(partial(quantize, recipe=recipe), params)))
    need, free = 1.05 * (sizes.before + sizes.disk), shutil.disk_usage(parent).free
    print(f"{parent}: needs {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")
    if free < need:
        raise SystemExit("not enough disk: ask for fewer --blocks, or give another --dir")


def write_synthetic(folder: Path, config: FluxConfig, layout: str) -> None:
    """A bfloat16 checkpoint of random weights: normal, deviation 1 / sqrt(inputs)."""
    rng = np.random.default_rng(0)

    def make(shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, ml_dtypes.bfloat16)
        scale = np.float32(shape[-1] ** -0.5)
        for row in range(0, shape[0], 1024):  # no float32 copy of a whole tensor
            part = out[row : row + 1024]
            part[...] = rng.standard_normal(part.shape, np.float32) * scale
        return out

    abstract = iter_parts(abstract_params(config))
    shapes = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in abstract}
    tensors = {
        name: TensorSpec(shape=shape, dtype=ml_dtypes.bfloat16, make=partial(make, shape))
        for leaf in expand(LAYOUTS[layout], config, shapes)
        for name, shape in leaf.source_shapes().items()
    }
    write_sharded(folder, tensors, SHARD_BYTES)
    if layout == "diffusers":
        (folder / "config.json").write_text(json.dumps(flux.to_diffusers_config(config)))


def convert(source: Path, out: Path, recipe: str) -> Result:
    """Run `python -m convert` and watch its memory.

    Raises:
        SystemExit: the conversion failed; its messages have been printed.
    """
    with open_checkpoint(source) as checkpoint:
        source_bytes = checkpoint.total_bytes
        planned = plan(checkpoint, load_recipe(recipe)).peak_bytes()
    command = [sys.executable, "-m", "convert", str(source), "--recipe", recipe, "--out", str(out)]
    cpu_before, start, peak = children_cpu_seconds(), time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, resident_peak(process.pid))
            time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    output = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Result(
        seconds=seconds,
        cpu_seconds=children_cpu_seconds() - cpu_before,
        peak=peak,
        planned=planned,
        source=source_bytes,
        output=output,
    )


def children_cpu_seconds() -> float:
    """User and system time of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def resident_peak(pid: int) -> int:
    """Largest resident set so far, bytes; 0 for a process that is about to end.

    From /proc and not from `getrusage`, which counts the parent's own peak before the `exec` too.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


def show(result: Result, options: Options) -> None:
    """Print the table and the figure line."""
    double, single = options.blocks
    print(
        f"{double} double and {single} single blocks of width {options.hidden}, "
        f"{options.layout} layout, recipe {options.recipe}"
    )
    table = Table("", box=box.SIMPLE)
    table.add_column("MB", justify="right")
    overhead = result.peak - result.output
    for name, size in (
        ("source", result.source),
        ("written", result.output),
        ("peak resident memory", result.peak),
        ("peak less written: overhead", overhead),
        ("peak that the plan foretold", result.planned),
    ):
        table.add_row(name, f"{size / 1e6:,.1f}")
    Console().print(table)
    print(f"{result.seconds:.1f} s, {result.cpu_seconds:.1f} s of processor time")
    print(
        f"figure: convert_MBps={result.source / result.seconds / 1e6:.1f} "
        f"overhead_MB={overhead / 1e6:.1f} peak_rss_MB={result.peak / 1e6:.1f} "
        f"planned_MB={result.planned / 1e6:.1f} cpu_s={result.cpu_seconds:.1f}"
    )


if __name__ == "__main__":
    main()
