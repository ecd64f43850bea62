"""A forward of FLUX.1 on this CPU: seconds and memory, beside diffusers on the same blocks.

    python -m benchmarks.flux_cpu                     # 1 + 2 blocks of the published width
    python -m benchmarks.flux_cpu --full              # all 19 + 38; what has no room is left out
    python -m benchmarks.flux_cpu --full --checkpoint DIR    # a converted FLUX.1, loaded from disk

One forward is one step of sampling (FLUX.1-dev's guidance is an input). Every variant runs in a
process of its own, one after the other, and reads its own peak of resident memory. Without a
checkpoint weights are random, made in the format of the recipe; no time here depends on them.
diffusers runs the model as it loads it, in bfloat16.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.convert import resident_peak
from benchmarks.convert_flux import FULL, available_memory
from benchmarks.cpu_matmul import random_params, some_normals
from lowbit_jax.checkpoint import iter_parts, load, read_manifest
from lowbit_jax.models import flux
from lowbit_jax.models.registry import read_config
from lowbit_jax.quant.recipe import load_recipe
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.transform import quantize

RECIPES = {
    "bf16": "float",
    "w8a8": "w8a8",
    "ternary": "flux-1.58bit",
    "ternary_a8": "flux-1.58bit-a8",
}
DIFFUSERS = "diffusers"
CHECKPOINT = "checkpoint"
ROOM = (
    1.6e9  # beside the weights: the runtime, activations at 1024 + 512 tokens, one layer unpacked
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time FLUX forwards on the CPU and read their peak memory."""

    full: bool = False
    """All 19 + 38 blocks of FLUX.1-dev."""
    blocks: tuple[int, int] = (1, 2)
    """Numbers of double and of single blocks, without --full."""
    hidden: int = 3072
    """Width, a multiple of 128."""
    pixels: int = 512
    """Side of the picture, a multiple of 16: (pixels / 16)^2 image tokens."""
    text: int = 512
    """Text tokens."""
    rounds: int = 3
    """Forwards that are timed, after one that compiles."""
    variants: tuple[str, ...] = (*RECIPES, DIFFUSERS)
    """What to run."""
    checkpoint: Path | None = None
    """Folder of a converted FLUX, run in place of the recipes; its blocks count, not --blocks."""
    alone: str | None = None
    """Run this variant in this process and print what it took as JSON."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one variant took.

    Attributes:
        load: seconds until the weights were in memory.
        first: seconds of the first forward, compilation included.
        seconds: of the forwards after it.
        cpu_seconds: of all processors together, likewise.
        weights: bytes of the parameters.
        peak: largest resident memory of the process, bytes.
        finite: whether every number that came out was.
    """

    load: float
    first: float
    seconds: list[float]
    cpu_seconds: list[float]
    weights: int
    peak: int
    finite: bool

    @property
    def best(self) -> float:
        """The least disturbed forward."""
        return min(self.seconds)


def main(argv: list[str] | None = None) -> None:
    """Run every variant, print a table and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.pixels % 16:
        raise SystemExit(f"--pixels {options.pixels} is no multiple of 16")
    if options.alone is not None:
        print(json.dumps(asdict(run(options.alone, options))))
        return
    config = config_of(options)
    console = Console()
    names = list(options.variants)
    if options.checkpoint:
        names = [CHECKPOINT, *(name for name in names if name == DIFFUSERS)]
    results: dict[str, Result] = {}
    for name in names:
        reason = why_not(name, options, config)
        if reason:
            console.print(f"not run: {name}, {reason}", soft_wrap=True)
            continue
        console.print(f"running {name}")
        results[name] = in_process(name, sys.argv[1:] if argv is None else argv)
    console.print(show(options, config, results))
    print("figure: " + " ".join(figures(results)))


def config_of(options: Options) -> flux.FluxConfig:
    """Of the checkpoint where there is one."""
    if options.checkpoint:
        manifest = read_manifest(options.checkpoint)
        if manifest["model"] != "flux":
            raise SystemExit(f"{options.checkpoint} holds a {manifest['model']}, not a flux")
        return read_config("flux", manifest["config"])
    double, single = FULL if options.full else options.blocks
    return flux.FluxConfig(
        hidden_size=options.hidden,
        num_heads=options.hidden // 128,
        depth=double,
        depth_single_blocks=single,
    )


def weight_bytes(name: str, config: flux.FluxConfig, options: Options) -> int:
    """Bytes of the parameters of a variant, from shapes or the manifest."""
    if name == CHECKPOINT:
        return sum(path.stat().st_size for path in options.checkpoint.rglob("*") if path.is_file())
    recipe = RECIPES.get(name, "float")
    return size_report(iter_parts(abstract(config, recipe))).after


def abstract(config: flux.FluxConfig, recipe: str) -> Any:
    """The parameters of a recipe as shapes."""
    return jax.eval_shape(
        partial(quantize, recipe=load_recipe(recipe)), flux.abstract_params(config)
    )


def why_not(name: str, options: Options, config: flux.FluxConfig) -> str:
    """Why a variant cannot run here; "" when it can."""
    if name not in (*RECIPES, DIFFUSERS, CHECKPOINT):
        raise SystemExit(f"variant '{name}' is none of: {', '.join((*RECIPES, DIFFUSERS))}")
    if name == DIFFUSERS:
        try:
            import diffusers  # noqa: F401
        except ImportError:
            return "not installed"
    need, free = weight_bytes(name, config, options) + ROOM, available_memory()
    return f"needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free" if need > free else ""


def in_process(name: str, argv: list[str]) -> Result:
    """A variant in a process of its own.

    Raises:
        SystemExit: it failed; its messages have been printed.
    """
    command = [sys.executable, "-m", "benchmarks.flux_cpu", *argv, "--alone", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def run(name: str, options: Options) -> Result:
    """Load, warm up, time; in the process whose memory counts."""
    config = config_of(options)
    start = time.perf_counter()
    forward, weights = _diffusers(config, options) if name == DIFFUSERS else _ours(name, options)
    load_seconds = time.perf_counter() - start
    times, busy, finite = [], [], True
    for _ in range(1 + options.rounds):
        start, cpu = time.perf_counter(), time.process_time()
        finite &= bool(np.isfinite(forward()).all())
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    return Result(
        load=load_seconds,
        first=times[0],
        seconds=times[1:],
        cpu_seconds=busy[1:],
        weights=weights,
        peak=resident_peak(os.getpid()),
        finite=finite,
    )


def _inputs(config: flux.FluxConfig, options: Options) -> list[Any]:
    side = options.pixels // 16
    rng = np.random.default_rng(0)
    return [
        some_normals(rng, (1, side * side, config.in_channels)),
        some_normals(rng, (1, options.text, config.context_in_dim)),
        jnp.full((1,), 0.5),
        some_normals(rng, (1, config.vec_in_dim)),
        flux.image_ids(side, side),
        flux.text_ids(options.text),
        jnp.full((1,), 3.5),
    ]


def _ours(name: str, options: Options) -> tuple[Callable[[], np.ndarray], int]:
    config = config_of(options)
    if name == CHECKPOINT:
        params = load(options.checkpoint).params
    else:
        params = random_params(config, RECIPES[name])
    model = flux.FluxTransformer(config, jnp.bfloat16)
    inputs = _inputs(config, options)
    forward = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    weights = size_report(iter_parts(params)).after
    return lambda: np.asarray(forward(params, *inputs), np.float32), weights


def _diffusers(config: flux.FluxConfig, options: Options) -> tuple[Callable[[], np.ndarray], int]:
    import torch
    from diffusers import FluxTransformer2DModel

    from convert.flux import to_diffusers_config

    fields = {k: v for k, v in to_diffusers_config(config).items() if k[0] != "_"}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**fields)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            bound = math.sqrt(3 / parameter.shape[-1]) if parameter.ndim == 2 else 0.5
            parameter.uniform_(-bound, bound)

    def tensor(x: Any, dtype: Any = torch.bfloat16) -> Any:
        return torch.tensor(np.asarray(x, np.float32)).to(dtype)

    img, txt, t, pooled, img_ids, txt_ids, guidance = _inputs(config, options)
    inputs = {
        "hidden_states": tensor(img),
        "encoder_hidden_states": tensor(txt),
        "timestep": tensor(t),
        "pooled_projections": tensor(pooled),
        "img_ids": tensor(img_ids, torch.float32),
        "txt_ids": tensor(txt_ids, torch.float32),
        "guidance": tensor(guidance),
    }

    def forward() -> np.ndarray:
        with torch.no_grad():
            return model(**inputs).sample.float().numpy()

    return forward, sum(p.numel() * p.element_size() for p in model.parameters())


def show(options: Options, config: flux.FluxConfig, results: dict[str, Result]) -> Table:
    """A row per variant."""
    tokens = (options.pixels // 16) ** 2
    title = (
        f"{config.depth} + {config.depth_single_blocks} FLUX blocks, width {config.hidden_size}, "
        f"{options.pixels} x {options.pixels} ({tokens} + {options.text} tokens), "
        f"{os.cpu_count()} processors"
    )
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("weights", no_wrap=True)
    for column in ("s a step", "CPU s", "first s", "load s", "weights GB", "peak GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        cells = (r.best, min(r.cpu_seconds), r.first, r.load, r.weights / 1e9, r.peak / 1e9)
        label = name if r.finite else f"{name} (not finite)"
        table.add_row(label, *(f"{cell:.2f}" for cell in cells))
    return table


def figures(results: dict[str, Result]) -> list[str]:
    """Seconds and peak of each variant, for the last line."""
    return [
        f"{name}_s={r.best:.3f} {name}_peak_GB={r.peak / 1e9:.3f}" for name, r in results.items()
    ]


if __name__ == "__main__":
    main()
