"""`convert_and_quantize CHECKPOINT --recipe NAME --out DIR`: published weights, quantised Flax."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from convert.checkpoint_files import Checkpoint, open_checkpoint
from convert.command import run_command
from convert.heap import one_heap
from convert.job import Job, manifest, plan, run
from convert.lora import Lora, merging, parse_loras
from convert.pipeline import check_complete, check_fit, copy_files, find_pipeline, staged
from convert.torch_file import Weights
from lowbit_jax.checkpoint import Writer, abstract_parts, check_output
from lowbit_jax.pipelines.folder import Layout
from lowbit_jax.quant.recipe import RECIPES, Recipe, load_recipe
from lowbit_jax.quant.report import SizeReport, size_report, size_table

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Port a PyTorch checkpoint to Flax, quantise it and save it; reads one tensor at a time."""

    checkpoint: tyro.conf.Positional[Path]
    """A .safetensors, .pt, .pth, .bin or .ckpt file, an index of shards, or a diffusers folder; of
    a whole FluxPipeline (with model_index.json) all parts are converted."""
    recipe: Annotated[str, tyro.conf.arg(help=f"{', '.join(RECIPES)}, or a JSON file.")]
    text_recipe: str | None = None
    """Of a whole pipeline's T5 encoder, w8a16 or w4a16 say; else float. CLIP and the autoencoder
    stay in floating point."""
    keep: str | None = None
    """Layers to keep in floating point, against the recipe: a regular expression for their paths,
    such as '.*/cross_attn/kv_linear'."""
    no_feedback: bool = False
    """Round plainly where the recipe has error feedback: it needs no X^T X then."""
    stats: Path | None = None
    """Statistics of the model's activations, which calibrate_model writes, for recipes that balance
    or have error feedback."""
    out: Path | None = None
    """Folder to write; needed unless --dry-run."""
    model: str = "auto"
    """Network; auto recognises it by its tensors."""
    weights: Weights = "auto"
    """Part of a training checkpoint; auto takes the moving average (ema) where there is one."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Of parameters that stay in floating point."""
    lora: tuple[str, ...] = ()
    """LoRA files to add to the weights before they are quantised: FILE, or FILE=STRENGTH."""
    lora_skip: str | None = None
    """Keys of the LoRA files to leave out, as a regular expression: 'lora_te.*', say."""
    dry_run: bool = False
    """Check the checkpoint's names and shapes and show the plan; read no weights."""
    overwrite: bool = False
    """Replace an output folder that holds an earlier conversion."""
    resume: bool = False
    """Go on with a conversion that was interrupted; give the same source, recipe and options."""
    method: Literal["rounding", "feedback", "reconstruct", "scales", "distill"] = "rounding"
    """How codes are found; all but rounding sample from --prompts, need the whole model in memory
    and the extra "distill", and keep their work beside OUT, in OUT.work, to go on with."""
    prompts: Path | None = None
    """A text file with a prompt a line (FLUX.1 inside its whole diffusers folder, whose text
    encoders are run; models with MiniLM's text states), or encoded prompts: safetensors with
    txt [p, t, k] and pooled [p, k]."""
    budget_minutes: float = 60.0
    """Time for --method in all; more of it means more steps of training."""
    grid: tuple[int, int] = (64, 64)
    """Rows and columns of latent patches that --method samples: 64 64 is 1024 x 1024 pixels."""
    archive: bool = False
    """Store ternary codes five to the byte (1.6 bits); they are unpacked to 2 bits on load."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, see `run_command`."""
    one_heap()
    arguments = tyro.cli(Arguments, args=argv, prog="convert_and_quantize")
    return run_command(
        "convert_and_quantize", lambda: convert_and_quantize(arguments, Console(markup=False))
    )


def convert_and_quantize(arguments: Arguments, console: Console) -> None:
    """Plan, show the plan, convert with a progress bar, show what came out.

    Raises:
        ValueError: bad checkpoint, recipe or arguments. OSError: output that cannot be written.
    """
    if arguments.out is None and not arguments.dry_run:
        raise ValueError("give --out DIR, or --dry-run for the plan alone")
    if arguments.resume and arguments.dry_run:
        raise ValueError("--resume goes on with a conversion and --dry-run makes none; give one")
    recipe = load_recipe(arguments.recipe)
    if arguments.no_feedback:
        recipe = recipe.rounded()
    if arguments.keep is not None:
        recipe = recipe.keeping(arguments.keep)
    loras = parse_loras(arguments.lora, arguments.lora_skip)
    pipeline = find_pipeline(arguments.checkpoint) if arguments.model == "auto" else None
    if pipeline is not None:
        if arguments.method != "rounding":
            raise ValueError(
                f"--method {arguments.method} takes a transformer alone: give "
                f"{arguments.checkpoint / 'transformer'}"
            )
        return _convert_pipeline(pipeline, recipe, loras, arguments, console)
    if arguments.text_recipe is not None:
        raise ValueError(
            "--text-recipe is for whole pipelines: give a folder with model_index.json"
        )
    if arguments.out is not None:
        check_output(arguments.out, arguments.overwrite, arguments.resume)
    with open_checkpoint(arguments.checkpoint, arguments.weights) as checkpoint:
        job = plan(
            checkpoint,
            recipe,
            model=arguments.model,
            dtype=DTYPES[arguments.dtype],
            statistics=arguments.stats,
            loras=loras,
        )
        sizes = job.sizes(arguments.archive)
        show_plan(job, sizes, console)
        if arguments.method != "rounding":
            _teach(job, arguments, console)
        elif not arguments.dry_run:
            _convert(job, arguments, console)


def _convert_pipeline(
    pipeline: Layout, recipe: Recipe, loras: list[Lora], arguments: Arguments, console: Console
) -> None:
    source, floats = arguments.checkpoint, RECIPES["float"]
    check_complete(source, pipeline)
    recipes = {"text_encoder_2": load_recipe(arguments.text_recipe or "float")}
    own: dict[str, dict[str, Any]] = {
        "transformer": {"recipe": recipe, "loras": loras, "statistics": arguments.stats}
    }
    jobs: dict[str, Job] = {}
    with ExitStack() as opened:
        for part, model in pipeline.models.items():
            checkpoint = opened.enter_context(open_checkpoint(source / part))
            options = own.get(part, {"recipe": recipes.get(part, floats)})
            jobs[part] = plan(checkpoint, model=model, dtype=DTYPES[arguments.dtype], **options)
        notes = check_fit(source, {part: job.config for part, job in jobs.items()})
        for job in jobs.values():
            show_plan(job, job.sizes(arguments.archive), console)
        for note in notes:
            console.print(note, soft_wrap=True)
        if arguments.dry_run:
            return
        assert arguments.out is not None
        replaces, resumes = arguments.overwrite, arguments.resume
        with staged(arguments.out, pipeline, overwrite=replaces, resume=resumes) as staging:
            for part, job in jobs.items():
                _convert(job, replace(arguments, out=staging / part, overwrite=False), console)
            copy_files(source, staging, pipeline)
    console.print(
        f"{arguments.out}: a whole pipeline; lowbit-jax sample {arguments.out} --prompt ..."
    )


def _teach(job: Job, arguments: Arguments, console: Console) -> None:
    """Find codes by a method and write the model."""
    from convert.teach import Lesson, teach, write_taught  # needs optax, which rounding does not

    if arguments.prompts is None:
        raise ValueError(f"--method {arguments.method} samples from prompts; give --prompts FILE")
    if arguments.resume or arguments.dry_run:
        raise ValueError("--method goes on by itself with what is in OUT.work, and has no dry run")
    assert arguments.out is not None and arguments.method != "rounding"
    lesson = Lesson(
        method=arguments.method,
        prompts=arguments.prompts,
        minutes=arguments.budget_minutes,
        grid=arguments.grid,
        folder=arguments.out.with_name(arguments.out.name + ".work"),
    )
    with _progress(console) as bars:
        digests = _digest(job.checkpoint, bars)
    tree, told = teach(job, lesson, console)
    write_taught(job, tree, digests, told, arguments.out, arguments.overwrite, arguments.archive)
    for rung in told["rungs"]:
        console.print(", ".join(f"{key} {value}" for key, value in rung.items()), soft_wrap=True)
    console.print(f"{arguments.out}: {told['method']} in {told['minutes']} min", soft_wrap=True)


def show_plan(job: Job, sizes: SizeReport, console: Console) -> None:
    """What will be done, before anything is."""
    files = f"{len(job.checkpoint.files)} file(s), {job.checkpoint.total_bytes / 1e6:,.1f} MB"
    console.print(
        f"{job.checkpoint.source}: {job.model} in {job.layout.name} layout, {files}", soft_wrap=True
    )
    for note in (*job.checkpoint.notes, *merging(job.loras, job.updates)):
        console.print(note, soft_wrap=True)
    console.print(size_table(sizes, f"plan: recipe '{job.recipe.name}'"))
    console.print(
        f"{sizes.bits_per_weight:.3f} bits per weight over everything stored; "
        f"{sizes.disk / 1e6:,.1f} MB to write; "
        f"about {job.peak_bytes() / 1e6:,.0f} MB of memory needed",
        soft_wrap=True,
    )


def _convert(job: Job, arguments: Arguments, console: Console) -> None:
    assert arguments.out is not None
    folder = Path(os.path.realpath(arguments.out))  # "." is another folder once it is replaced
    with _progress(console) as bars:
        digests = _digest(job.checkpoint, bars)
    start = time.perf_counter()
    with (
        _lasting_interrupts() as stop_if_asked,
        Writer(
            arguments.out,
            manifest(job, digests),
            overwrite=arguments.overwrite,
            archive=arguments.archive,
            resumable=True,
            resume=arguments.resume,
        ) as writer,
    ):
        there = job.source_bytes(writer.parts)
        finished = writer.complete
        if arguments.resume:
            show_rest(job, writer, console)
        with _progress(console) as bars:
            task = bars.add_task("convert", total=job.checkpoint.total_bytes, completed=there)

            def step(name: str, nbytes: int) -> None:
                bars.update(task, advance=nbytes, description=name)
                stop_if_asked()

            run(job, writer.write, step, frozenset(writer.parts))
        writer.finish()
    seconds = time.perf_counter() - start
    kept = [name for names in writer.nonfinite.values() for name in names]
    if kept:
        console.print(f"NaN or inf kept, in floating point: {_listed(kept)}", soft_wrap=True)
    after = size_report(abstract_parts({"parts": writer.parts})).after
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    source = job.checkpoint.total_bytes
    speed = f"; {seconds:.1f} s, {(source - there) / seconds / 1e6:,.0f} MB/s"
    console.print(
        f"{arguments.out}: {source / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB in memory "
        f"({source / after:.2f}x), {written / 1e6:,.1f} MB on disk ({source / written:.2f}x)"
        f"{'' if finished else speed}",
        soft_wrap=True,
    )


@contextmanager
def _lasting_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C that cannot get lost: the function given raises KeyboardInterrupt if one came before.

    Python drops an exception that is raised inside a finaliser or a callback from C, such as jax's.
    """
    asked = False

    def stop_if_asked() -> None:
        if asked:
            raise KeyboardInterrupt

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are not ours
        yield stop_if_asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)


def show_rest(job: Job, writer: Writer, console: Console) -> None:
    """What an interrupted conversion left, and what remains to be done."""
    names = list(dict.fromkeys(leaf.part for leaf in job.leaves))
    rest = [name for name in names if name not in writer.parts]
    there = job.source_bytes(writer.parts)
    if writer.complete:
        text = "the checkpoint had been finished"
    elif not writer.parts and not writer.discarded:
        text = "nothing is there; beginning"
    else:
        text = (
            f"{len(writer.parts)} of {len(names)} parts are there, equal to their digests "
            f"({there / 1e6:,.1f} of {job.checkpoint.total_bytes / 1e6:,.1f} MB of the source); "
            f"to be made: {_listed(rest) or 'none'}"
        )
    console.print(f"resume: {text}", soft_wrap=True)
    for name, problem in writer.discarded.items():
        console.print(f"resume: {name} {problem}; removed", soft_wrap=True)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _digest(checkpoint: Checkpoint, bars: Progress) -> dict[str, str]:
    task = bars.add_task("digest of the source")
    return checkpoint.digests(lambda done, total: bars.update(task, completed=done, total=total))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # a file or a pipe would get nothing but empty lines
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
