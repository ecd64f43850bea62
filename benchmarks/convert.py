"""How fast, and in how much memory, a checkpoint is converted and quantised.

    python -m benchmarks.convert --blocks 2 4 --recipe flux-1.58bit
    python -m benchmarks.convert --layout facebook --recipe w8a8

Writes a FLUX of the published width but fewer blocks, sharded like the published one, or the whole
DiT-XL/2 as facebook's `.pt` file of float32 (2.7 GB); random weights. Converts it with `python -m
convert` in a process of its own. The time is the whole command's, start and digests included. The
source has just been written, so the system may still hold it in memory: reading from a slower disk
comes on top.

"Overhead" is the peak resident memory less the bytes written: what conversion needs besides its
output. The converter holds two layers at a time, one being written and one being converted, and
never the whole output, so it is the peak itself that must stay the same for a deeper model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.torch_writer import write_torch
from convert import dit, flux
from convert.checkpoint_files import open_checkpoint
from convert.job import plan
from convert.registry import SOURCES
from convert.safetensors import TensorSpec, write_sharded
from convert.statistics import save_statistics
from convert.table import Layout, expand
from lowbit_jax.calibration.ranges import WHOLE
from lowbit_jax.calibration.statistics import LayerStatistics, Statistics, layer_widths
from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.models.dit import DiTConfig
from lowbit_jax.models.flux import FluxConfig
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.recipe import Recipe, load_recipe
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.transform import quantize

FLUX_HEAD_DIM = 128  # the only one a checkpoint without a config.json may have
DIT_HEAD_DIM = 72  # of DiT-XL
SHARD_BYTES = 10 * 10**9
STATISTICS = "statistics.safetensors"


def _flux(hidden: int, blocks: tuple[int, ...]) -> FluxConfig:
    double, single = blocks
    heads = hidden // FLUX_HEAD_DIM
    return FluxConfig(hidden_size=hidden, num_heads=heads, depth=double, depth_single_blocks=single)


def _dit(hidden: int, blocks: tuple[int, ...]) -> DiTConfig:
    (depth,) = blocks
    return DiTConfig(
        hidden_size=hidden,
        num_heads=hidden // DIT_HEAD_DIM,
        depth=depth,
        time_shift=dit.FACEBOOK_SHIFT,
        mlp_norm_eps=dit.FACEBOOK_EPS,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of checkpoint: its network and naming, and how one of any size is made."""

    network: str
    layout: Layout
    config: Callable[[int, tuple[int, ...]], Any]
    dtype: Any
    hidden: int
    blocks: tuple[int, ...]

    def tensors(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the file."""
        abstract = iter_parts(NETWORKS[self.network].abstract_params(config))
        shapes = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in abstract}
        leaves = expand(self.layout, config, shapes)
        return {name: shape for leaf in leaves for name, shape in leaf.source_shapes().items()}


_FLUX = {"network": "flux", "config": _flux, "dtype": ml_dtypes.bfloat16, "hidden": 3072}
CASES = {
    "diffusers": Case(layout=flux.DIFFUSERS, blocks=(2, 4), **_FLUX),
    "bfl": Case(layout=flux.BFL, blocks=(2, 4), **_FLUX),
    "facebook": Case(
        network="dit",
        layout=dit.ORIGINAL,
        config=_dit,
        dtype=np.float32,
        hidden=1152,
        blocks=(28,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a synthetic checkpoint; measure time and peak memory."""

    layout: Literal["diffusers", "bfl", "facebook"] = "diffusers"
    """Naming of the synthetic checkpoint: two of FLUX, and facebook's of DiT, a .pt file."""
    blocks: tuple[int, ...] = ()
    """FLUX: numbers of double and of single blocks (2 4; FLUX.1 has 19 38). DiT: number (28)."""
    recipe: str = "flux-1.58bit"
    """A named recipe or a JSON file."""
    hidden: Annotated[
        int | None,
        tyro.conf.arg(help=f"Width, a multiple of {FLUX_HEAD_DIM} (FLUX) or {DIT_HEAD_DIM} (DiT)."),
    ] = None
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
    case = CASES[options.layout]
    config = case.config(options.hidden or case.hidden, options.blocks or case.blocks)
    recipe = load_recipe(options.recipe)
    parent = options.dir or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    check_disk(parent, case, config, recipe)
    folder = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=parent))
    try:
        write_synthetic(folder / "source", case, config)
        statistics = write_statistics(folder, case, config)
        result = convert(folder / "source", folder / "out", options.recipe, statistics)
    finally:
        if options.keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder)
    show(result, options, config)


def check_disk(parent: Path, case: Case, config: Any, recipe: Recipe) -> None:
    """Say what will be written; raise `SystemExit` when it does not fit."""
    params = NETWORKS[case.network].abstract_params(config)
    statistics = made_up_statistics(case, config) if recipe.needs_statistics else None
    quantized = partial(quantize, recipe=recipe, statistics=statistics)
    sizes = size_report(iter_parts(jax.eval_shape(quantized, params)))
    width = np.dtype(case.dtype).itemsize
    source = width * sum(math.prod(shape) for shape in case.tensors(config).values())
    need, free = 1.05 * (source + sizes.disk), shutil.disk_usage(parent).free
    print(f"{parent}: needs {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")
    if free < need:
        raise SystemExit("not enough disk: ask for fewer --blocks, or give another --dir")


def write_synthetic(folder: Path, case: Case, config: Any) -> None:
    """Random weights: normal, deviation 1 / sqrt(inputs); one tensor in memory at a time."""
    rng = np.random.default_rng(0)

    def make(shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, case.dtype)
        scale = np.float32(shape[-1] ** -0.5)
        for row in range(0, shape[0], 1024):  # no float32 copy of a whole tensor
            part = out[row : row + 1024]
            part[...] = rng.standard_normal(part.shape, np.float32) * scale
        return out

    tensors = {
        name: TensorSpec(shape=shape, dtype=case.dtype, make=partial(make, shape))
        for name, shape in case.tensors(config).items()
    }
    for constant in case.layout.constants:
        value = np.asarray(constant.value(config), case.dtype)
        tensors[constant.source] = TensorSpec(
            shape=value.shape, dtype=case.dtype, make=partial(np.asarray, value)
        )
    folder.mkdir(parents=True)
    if case.network == "dit":
        write_torch(folder / "model.pt", tensors)
    else:
        write_sharded(folder, tensors, SHARD_BYTES)
    describe = SOURCES[case.network].exports.get(case.layout.name)
    if describe:
        (folder / "config.json").write_text(json.dumps(describe(config)))


def made_up_statistics(case: Case, config: Any) -> Statistics:
    """Of normal activations with a few large channels: what a recipe that balances asks for.

    No time and no byte of a conversion depends on what they say.
    """
    rng = np.random.default_rng(0)

    def layer(k: int) -> LayerStatistics:
        deviation = np.exp(rng.normal(0, 0.7, (1, 1, k)))
        rows = 10_000
        return LayerStatistics(
            absmax=(4 * deviation).astype(np.float32),
            total=np.zeros((1, 1, k)),
            squares=rows * deviation**2,
            count=np.full((1, 1), rows, np.int64),
        )

    widths = layer_widths(NETWORKS[case.network].abstract_params(config))
    return Statistics(
        layers={path: layer(k) for path, k in widths.items()},
        ranges=WHOLE,
        halves=("all",),
        model=case.network,
        config=json.dumps(dataclasses.asdict(config), sort_keys=True),
        samples=1,
        digest="made up",
    )


def write_statistics(folder: Path, case: Case, config: Any) -> Path:
    """The file of `made_up_statistics`."""
    return save_statistics(folder / STATISTICS, made_up_statistics(case, config))


def convert(source: Path, out: Path, recipe: str, statistics: Path | None = None) -> Result:
    """Run `python -m convert` and watch its memory; `statistics` for a recipe that needs them.

    Raises:
        SystemExit: the conversion failed; its messages have been printed.
    """
    stats = statistics if load_recipe(recipe).needs_statistics else None
    with open_checkpoint(source) as checkpoint:
        source_bytes = checkpoint.total_bytes
        planned = plan(checkpoint, load_recipe(recipe), statistics=stats).peak_bytes()
    command = [sys.executable, "-m", "convert", str(source), "--recipe", recipe, "--out", str(out)]
    if stats is not None:
        command += ["--stats", str(stats)]
    run = watch(command)
    return Result(
        seconds=run.seconds,
        cpu_seconds=run.cpu_seconds,
        peak=run.peak,
        planned=planned,
        source=source_bytes,
        output=folder_bytes(out),
    )


class Watched(NamedTuple):
    """What a process took: seconds, those of all processors together, peak resident bytes."""

    seconds: float
    cpu_seconds: float
    peak: int


def watch(command: list[str]) -> Watched:
    """Run a command to its end and watch its memory; its standard output is dropped.

    Raises:
        SystemExit: it failed; its messages have been printed.
    """
    cpu_before, start, peak = children_cpu_seconds(), time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, resident_peak(process.pid))
            time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Watched(seconds, children_cpu_seconds() - cpu_before, peak)


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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


def show(result: Result, options: Options, config: Any) -> None:
    """Print the table and the figure line."""
    blocks = " + ".join(map(str, options.blocks or CASES[options.layout].blocks))
    print(
        f"{blocks} blocks of width {config.hidden_size}, "
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
