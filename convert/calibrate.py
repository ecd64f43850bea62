"""`calibrate_model CHECKPOINT --prompts FILE --out FILE`: statistics for recipes that need them.

What was summed up is kept in `.NAME.partial` beside the file, after the first sample and then as
often as costs little: a run that was cut goes on with --resume and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from convert.checkpoint_files import open_checkpoint
from convert.command import run_command
from convert.job import Job, plan
from convert.lora import merging, parse_loras
from convert.port import float_params
from convert.sampling import Settings, Subject, make_subject
from convert.statistics import is_statistics, load_statistics, save_statistics
from convert.torch_file import Weights
from lowbit_jax.calibration.collect import abstract_readings, collect
from lowbit_jax.calibration.statistics import Statistics
from lowbit_jax.checkpoint import OutputError
from lowbit_jax.models.registry import MODELS
from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.quant.recipe import RECIPES, Recipe, RecipeError, load_recipe
from lowbit_jax.quant.stacks import layer_paths

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
SHARE = 0.1  # of the time, at most, for keeping what was summed up


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Sample a float model and write statistics of its activations for recipes that need them.

    The file is for convert_and_quantize --stats. Samples and steps are the model's own: nothing but
    prompts is needed. The whole model is in memory.
    """

    checkpoint: tyro.conf.Positional[Path]
    """What convert_and_quantize takes; of a whole pipeline its transformer's folder."""
    prompts: Path
    """A text file with a prompt a line (models with MiniLM's text states; FLUX.1 inside its whole
    diffusers folder, whose text encoders are run) or, for DiT and Latte, a class label; or encoded
    prompts: safetensors with txt [p, t, k], pooled [p, v] for FLUX, and optional mask [p, t],
    negative [t, k], negative_mask [t]."""
    out: Path | None = None
    """The safetensors file to write; needed unless --dry-run."""
    recipe: str | None = None
    """The recipe that the statistics are for: --grams and --ranges follow from it. viditq-w6a6,
    viditq-w4a8, viditq-w4a8-mp and viditq-w4a4 need X^T X, for error feedback; viditq-v1-w4a8 has
    two ranges; viditq-w8a8, smoothquant-* and naive-* need neither."""
    grams: str | None = None
    """Linears whose X^T X is wanted, a regular expression for their paths: '[a-z_]*blocks/.*' for
    all in blocks; by default none. It takes 8 k^2 bytes for each."""
    ranges: int | None = None
    """Timestep ranges of equal length that are kept apart; by default one."""
    steps: int = 16
    """Of the sampler."""
    grid: tuple[int, int] | None = None
    """Rows and columns of latent patches; by default the model's own, 64 64 for FLUX (1024 x 1024
    pixels)."""
    frames: int | None = None
    """Latent frames of a video; by default the model's own."""
    fps: float = 24.0
    """Frames per second, which STDiT3 is told."""
    guidance: float | None = None
    """Guidance scale; by default the published one."""
    seed: int = 0
    """Of the noise."""
    model: str = "auto"
    """Network; auto recognises it by its tensors."""
    weights: Weights = "auto"
    """Part of a training checkpoint; auto takes the moving average (ema) where there is one."""
    lora: tuple[str, ...] = ()
    """LoRA files to add to the weights, as convert_and_quantize will: FILE, or FILE=STRENGTH."""
    lora_skip: str | None = None
    """Keys of the LoRA files to leave out, as a regular expression."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Of the parameters and the computation. Sums are float32 in a forward, float64 over them."""
    dry_run: bool = False
    """Check everything but the weights and show the plan."""
    overwrite: bool = False
    """Replace statistics that are there."""
    resume: bool = False
    """Go on with a run that was interrupted; give the same prompts and options. More prompts at the
    end of the file add to statistics that are finished."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, see `run_command`."""
    arguments = tyro.cli(Arguments, args=argv, prog="calibrate_model")
    return run_command("calibrate_model", lambda: calibrate(arguments, Console(markup=False)))


def calibrate(arguments: Arguments, console: Console) -> None:
    """Plan, show the plan, sample with a progress bar, write the statistics.

    Raises:
        ValueError: bad checkpoint, prompts, recipe, arguments or output. OSError: files that cannot
            be read or written.
    """
    if arguments.out is None and not arguments.dry_run:
        raise ValueError("give --out FILE, or --dry-run for the plan alone")
    if arguments.out is not None:
        check_out(arguments.out, arguments.overwrite, arguments.resume)
    if (arguments.checkpoint / "model_index.json").is_file():
        raise ValueError(
            f"{arguments.checkpoint}: a whole pipeline; give {arguments.checkpoint / 'transformer'}"
        )
    dtype, loras = DTYPES[arguments.dtype], parse_loras(arguments.lora, arguments.lora_skip)
    with open_checkpoint(arguments.checkpoint, arguments.weights) as checkpoint:
        job = plan(checkpoint, RECIPES["float"], model=arguments.model, dtype=dtype, loras=loras)
        params = MODELS[job.model].abstract_params(job.config, dtype)
        grams, ranges = _wanted(arguments, params)
        settings = Settings(
            steps=arguments.steps,
            ranges=ranges,
            grams=grams,
            grid=arguments.grid,
            frames=arguments.frames,
            fps=arguments.fps,
            guidance=arguments.guidance,
            seed=arguments.seed,
            dtype=dtype,
        )
        subject = make_subject(job, arguments.prompts, settings)
        start = _start(arguments, job, params)
        show_plan(job, subject, params, start, console)
        if arguments.out is None or arguments.dry_run:
            return
        _run(job, subject, start, arguments.out, arguments, console)


def check_out(out: Path, overwrite: bool, resume: bool) -> None:
    """Raise `OutputError` when `out` may not be written."""
    partial = partial_file(out)
    if overwrite and resume:
        raise OutputError("--resume goes on with a run and --overwrite begins anew; give one")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}")
    if out.exists() and not (overwrite or resume):
        raise OutputError(f"{out}: exists already; choose another --out or pass --overwrite")
    if out.exists() and not is_statistics(out):
        raise OutputError(f"{out}: holds no statistics, so it will not be replaced")
    if partial.exists() and not (overwrite or resume):
        raise OutputError(
            f"{out}: an interrupted run is in {partial}; pass --resume to go on with it, or "
            "--overwrite to begin anew"
        )


def partial_file(out: Path) -> Path:
    """Where statistics are until they are whole."""
    return out.with_name(f".{out.name}.partial")


def recipe_needs(recipe: Recipe, params: Any) -> tuple[str | None, int]:
    """What a recipe needs of statistics: linears whose X^T X (as for `observe`), and ranges.

    Args:
        recipe: any.
        params: of the model, or their `jax.ShapeDtypeStruct`s.

    Raises:
        RecipeError: it needs no statistics, does not fit the model, or wants several numbers of
            ranges.
    """
    if not recipe.needs_statistics:
        raise RecipeError(f"recipe '{recipe.name}' needs no statistics")
    rules = {path: rule for path, rule in recipe.assign(layer_paths(params)).items() if rule}
    grams = [re.escape(path) for path, rule in rules.items() if rule.needs_grams]
    balances = [rule.balance for rule in rules.values() if rule.balance is not None]
    ranges = {balance.ranges for balance in balances if balance.ranges is not None}
    if len(ranges) > 1:
        raise RecipeError(f"recipe '{recipe.name}' has masks for {sorted(ranges)} ranges")
    return "|".join(grams) or None, min(ranges, default=1)


def _wanted(arguments: Arguments, params: Any) -> tuple[str | None, int]:
    """`grams` and `ranges`, given or of the recipe."""
    if arguments.grams is not None:
        try:
            found = [p for p in layer_paths(params) if re.fullmatch(arguments.grams, p)]
        except re.error as error:
            raise ValueError(f"--grams '{arguments.grams}': {error}") from None
        if not found:
            example = layer_paths(params)[0]
            raise ValueError(f"--grams '{arguments.grams}': no linear; they look like '{example}'")
    if arguments.recipe is None:
        return arguments.grams, arguments.ranges or 1
    if arguments.grams is not None:
        raise ValueError("--recipe says which X^T X are needed; leave --grams out")
    grams, ranges = recipe_needs(load_recipe(arguments.recipe), params)
    if ranges > 1 and arguments.ranges not in (None, ranges):
        raise ValueError(
            f"--ranges {arguments.ranges}: recipe '{arguments.recipe}' has masks for {ranges}"
        )
    return grams, arguments.ranges or ranges


def _start(arguments: Arguments, job: Job, params: Any) -> Statistics | None:
    """What --resume goes on with."""
    if not arguments.resume or arguments.out is None:
        return None
    config = dataclasses.asdict(job.config)
    for path in (partial_file(arguments.out), arguments.out):
        if path.exists():
            return load_statistics(path, params, model=job.model, config=config)
    return None


def show_plan(
    job: Job, subject: Subject, params: Any, start: Statistics | None, console: Console
) -> None:
    """What will be done, before anything is.

    Raises:
        ValueError: samples that the model does not take.
    """
    run = subject.run
    calls = abstract_readings(run, params, lambda p: subject.sample(p, 0))
    halves, ranges = len(run.halves), len(run.ranges)
    widths = {name: readings[0].absmax.shape[-1] for name, readings in calls.items()}
    grams = [widths[name] for name, readings in calls.items() if readings[0].gram is not None]
    channels = sum(halves * ranges * (20 * k + 8) for k in widths.values())
    squares = sum(8 * k * k for k in grams)
    forwards = subject.count * len(run.steps)
    there = 0 if start is None else start.samples
    lines = [
        f"{job.checkpoint.source}: {job.model} in {job.layout.name} layout, {len(widths)} linears",
        *job.checkpoint.notes,
        *merging(job.loras, job.updates),
        f"{subject.count} samples x {len(run.steps)} steps = {forwards} forwards of batch {halves} "
        f"({subject.about}); {ranges} timestep range(s)",
        f"statistics: {(channels + squares) / 1e6:,.1f} MB to write; X^T X of {len(grams)} linears "
        f"is {squares / 1e6:,.1f} MB of it",
        f"memory: weights {tree_bytes(params) / 1e6:,.1f} MB and {tree_bytes(calls) / 1e6:,.1f} MB "
        f"of a step's sums on the device, beside activations; on the host "
        f"{2 * (channels + squares) / 1e6:,.1f} MB",
    ]
    if start is not None:
        lines.append(f"resume: {there} samples are there; {max(0, subject.count - there)} to go")
    for line in lines:
        console.print(line, soft_wrap=True)


def _run(
    job: Job,
    subject: Subject,
    start: Statistics | None,
    out: Path,
    arguments: Arguments,
    console: Console,
) -> None:
    partial = partial_file(out)
    if arguments.overwrite:
        partial.unlink(missing_ok=True)
    params = float_params(job, DTYPES[arguments.dtype])
    begin = time.perf_counter()
    try:
        found = collect(
            subject.run,
            params,
            subject.samples(params),
            resume=start,
            keep=_Keeper(partial),
            console=console if console.is_terminal else None,  # a pipe would get empty lines
        )
    except BaseException as error:
        if partial.is_file():
            error.add_note(f"what was sampled before is in {partial}; pass --resume to go on")
        raise
    save_statistics(out, found, overwrite=arguments.overwrite or arguments.resume)
    partial.unlink(missing_ok=True)
    console.print(
        f"{out}: {found.samples} samples, {out.stat().st_size / 1e6:,.1f} MB; "
        f"{time.perf_counter() - begin:.1f} s with compiling. "
        f"convert_and_quantize {arguments.checkpoint} --stats {out} --recipe "
        f"{arguments.recipe or 'NAME'} --out DIR{' --lora ...' if arguments.lora else ''}",
        soft_wrap=True,
    )


class _Keeper:
    """Keeps the first sums, and later ones as often as takes no more than `SHARE` of the time."""

    def __init__(self, path: Path):
        self._path, self._next = path, 0.0

    def __call__(self, statistics: Statistics) -> None:
        before = time.monotonic()
        if before < self._next:
            return
        save_statistics(self._path, statistics, overwrite=True)
        after = time.monotonic()
        self._next = after + (after - before) * (1 / SHARE - 1)


if __name__ == "__main__":
    sys.exit(main())
