"""`lowbit-jax sample`: pictures of prompts from a converted FLUX.1 pipeline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lowbit_jax.checkpoint_store import OutputError
from lowbit_jax.pipelines import FluxPipeline
from lowbit_jax.pipelines.picture import check_picture


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Make pictures with a converted FLUX.1; their PNG files say how they were made."""

    folder: tyro.conf.Positional[Path]
    """A folder that convert_and_quantize made from a whole diffusers pipeline."""
    prompt: str | None = None
    """What is to be seen."""
    batch: Path | None = None
    """Instead of a prompt: a text file with one a line. --out is then a folder of 0000.png, ..."""
    out: Path = Path("out.png")
    """The PNG file."""
    steps: int | None = None
    """Of the sampler; usual are 28 for dev, 4 for schnell."""
    guidance: float | None = None
    """Distilled guidance scale, dev only; usual is 3.5."""
    height: int = 1024
    """In pixels."""
    width: int = 1024
    """In pixels."""
    seed: int = 0
    """Of the noise; each further picture has the next one."""
    max_length: int | None = None
    """Tokens of T5; usual are 512 for dev, 256 for schnell."""
    sequential: bool = False
    """Keep one part (text encoder, transformer, decoder) in memory at a time."""
    overwrite: bool = False
    """Write over pictures that are there."""


def sample(command: Sample, console: Console) -> None:
    """Make and write the pictures.

    Raises:
        ValueError: bad arguments, a pipeline that is incomplete or damaged.
        OutputError: a picture that is there already, or cannot be written.
        ModuleNotFoundError: the extra "pipeline" is not installed.
    """
    prompts = _prompts(command)
    paths = _paths(command, len(prompts))
    for path in paths:
        if path.parent.is_dir() or command.batch is None:
            check_picture(path, command.overwrite)
    start = time.perf_counter()
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a file or a pipe would get nothing but empty lines
    )

    def report(note: str) -> None:
        console.print(note, soft_wrap=True)

    pipeline = FluxPipeline(command.folder, sequential=command.sequential, report=report)
    with bars:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        pictures = pipeline.stream(
            prompts,
            seed=command.seed,
            steps=command.steps,
            guidance=command.guidance,
            height=command.height,
            width=command.width,
            max_length=command.max_length,
            progress=progress,
        )
        for picture, path in zip(pictures, paths, strict=True):
            if command.batch is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, overwrite=command.overwrite)  # at once: the next may take long
    settings = picture.settings
    console.print(
        f"{command.out}: {len(paths)} picture(s), {settings['size']}, {settings['steps']} steps,"
        f" guidance {settings['guidance']}, recipe '{pipeline.recipes['transformer']}', T5 "
        f"'{pipeline.recipes['text_encoder_2']}'; {time.perf_counter() - start:.1f} s with loading "
        "and compiling",
        soft_wrap=True,
    )


def _prompts(command: Sample) -> list[str]:
    if (command.prompt is None) == (command.batch is None):
        raise ValueError("give either --prompt TEXT or --batch FILE")
    if command.batch is None:
        return [command.prompt or ""]
    try:
        lines = command.batch.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{command.batch}: is not UTF-8 text ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{command.batch}: holds no prompt")
    return prompts


def _paths(command: Sample, count: int) -> list[Path]:
    if command.batch is None:
        return [command.out]
    if command.out.suffix or (command.out.exists() and not command.out.is_dir()):
        raise OutputError(f"{command.out}: with --batch, --out is a folder; give its name")
    return [command.out / f"{number:04d}.png" for number in range(count)]
