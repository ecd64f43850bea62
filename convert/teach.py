"""`convert_and_quantize --method`: codes found from what the float model does, from prompts alone.

    feedback     block after block, codes with error feedback from X^T X of what the block is given
    reconstruct  and then each block trained against the float block
    scales       and then all scales, biases and norms together against the float velocity, the
                 float model out of memory by then
    distill      or, after feedback, all codes and scales together against the float velocity

The whole float model is in memory while it samples; what else, `show_estimate` says before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from convert.flux_prompts import read_flux_prompts
from convert.job import Job, manifest
from convert.port import float_params
from convert.sampling import find_schedule, flux_sample
from convert.trajectories import save_trajectories
from lowbit_jax.calibration import drivers
from lowbit_jax.calibration.collect import Run, Sample
from lowbit_jax.checkpoint import Writer, iter_parts
from lowbit_jax.distill import latent, split, train
from lowbit_jax.distill.blocks import feedback_blocks, reconstruct
from lowbit_jax.distill.trajectories import Trajectories
from lowbit_jax.distill.velocity import velocity_loss
from lowbit_jax.models.flux import FluxTransformer
from lowbit_jax.quant.qtensor import is_qtensor, tree_bytes
from lowbit_jax.quant.recipe import Feedback

Method = Literal["feedback", "reconstruct", "scales", "distill"]
RUNGS: dict[Method, tuple[Method, ...]] = {
    "feedback": ("feedback",),
    "reconstruct": ("feedback", "reconstruct"),
    "scales": ("feedback", "reconstruct", "scales"),
    "distill": ("feedback", "distill"),
}
STEPS = 16  # of a trajectory
ROWS = 1024  # forwards that blocks are shown, of all prompts and steps,
ACTIVATIONS = 32e9  # or as many as take these bytes
SHARE = 0.9  # of the time left, for training


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How a model is taught.

    Attributes:
        method: see the module.
        prompts: see `convert.prompts`.
        minutes: for all of it.
        grid: rows and columns of latent patches of a picture.
        folder: where trajectories and checkpoints of trainings are kept.
        batch: forwards of a training step.
        seed: of noise and order.
    """

    method: Method
    prompts: Path
    minutes: float
    grid: tuple[int, int]
    folder: Path
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"--budget-minutes must be positive, got {self.minutes:g}")


def memory_bytes(
    params: Any, quantized: int, method: Method, batch: int, tokens: int
) -> dict[str, int]:
    """Bytes that each part needs at its peak, by shapes; activations of one block by a rule.

    Args:
        params: float parameters, or their shapes.
        quantized: bytes of the quantised ones.
        method: see the module.
        batch: of a training step.
        tokens: of text and picture.
    """
    floats = tree_bytes(params)
    stacks = [params[name] for name in ("double_blocks", "single_blocks") if name in params]
    shapes = _kernel_shapes(stacks)
    kernels = [shape[-2:] for shape in shapes]
    blocks = [
        sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(segment))
        for stack in stacks
        for segment in stack.values()
    ]
    every = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stacks))
    outputs = sum(math.prod(shape) // shape[-2] for shape in shapes)
    layers = sum(len(jax.tree.leaves(s)[0]) for stack in stacks for s in stack.values())
    width = max(n for _, n in kernels) + max(k for k, _ in kernels)
    activations = 4 * batch * tokens * width * 2  # of one block, forward and backward
    row = _row_bytes(params, tokens)
    device = {
        # three k x k of float32 and six matrices, one linear at a time
        "feedback": floats + max(12 * k * k + 24 * k * n for k, n in kernels),
        # latent weights, their gradient and two moments of one block
        "reconstruct": floats + 16 * max(blocks) + activations,
        # a scale and a bias of each output, their gradients and moments; an input of each block
        "scales": quantized + 32 * outputs + layers * batch * row + activations,
        "distill": floats + 16 * every + layers * batch * row + activations,
    }
    grams = max(sum(8 * shape[-2] ** 2 for shape in _kernel_shapes(stack)) for stack in stacks)
    return {rung: device[rung] for rung in RUNGS[method]} | {
        "on the host or on disk (X^T X of a block, activations)": grams + 4 * _most_rows(row) * row
    }


def rows_of(params: Any, tokens: int) -> int:
    """Forwards that blocks are shown at most, where there are as many.

    Args:
        params: float parameters, or their shapes.
        tokens: of text and picture.
    """
    return _most_rows(_row_bytes(params, tokens))


def _row_bytes(params: Any, tokens: int) -> int:
    """Of what goes from block to block in one forward, in float32."""
    return 4 * tokens * params["img_in"]["kernel"].shape[-1]


def _most_rows(row: int) -> int:
    """Forwards whose activations, of four kinds, take no more than `ACTIVATIONS`."""
    return max(1, min(ROWS, int(ACTIVATIONS / (4 * row))))


def _kernel_shapes(tree: Any) -> list[tuple[int, ...]]:
    """Of every kernel, [l k n] of a stack."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf.shape for path, leaf in flat if path[-1].key == "kernel"]


def write_taught(
    job: Job,
    tree: Any,
    digests: dict[str, str],
    told: dict[str, Any],
    out: Path,
    overwrite: bool,
    archive: bool,
) -> None:
    """Save what `teach` gave; the manifest says how it was made, under "taught"."""
    facts = manifest(job, digests) | {"taught": told}
    with Writer(out, facts, overwrite=overwrite, archive=archive) as writer:
        for name, part in iter_parts(tree):
            writer.write(name, part)
        writer.finish()


def teach(job: Job, lesson: Lesson, console: Console) -> tuple[Any, dict[str, Any]]:
    """Quantise a checkpoint by a method.

    Args:
        job: what was planned; its recipe says which layers and formats.
        lesson: how.
        console: for the estimate and progress.

    Returns:
        The quantised tree, with what stays in floating point in the dtype of the job, and what the
        manifest says of how it was made.

    Raises:
        ValueError: another network than FLUX, prompts that cannot be used, a budget too small.
    """
    if job.model != "flux":
        raise ValueError(f"--method teaches FLUX; this is {job.model}")
    start = time.monotonic()
    config, patches = job.config, lesson.grid[0] * lesson.grid[1]
    prompts = read_flux_prompts(job, lesson.prompts)
    samples = [
        flux_sample(config, prompts, i, tokens=patches, seed=lesson.seed)
        for i in range(len(prompts))
    ]
    tokens = prompts.txt.shape[1] + patches
    params = float_params(job)
    model = FluxTransformer(job.config, jnp.bfloat16, remat=True)
    sigmas = find_schedule(job).sigmas(STEPS, patches)
    run = drivers.flux_run(model, sigmas, grid=lesson.grid)
    seconds = _forward_seconds(run, params, samples[0])
    memory = memory_bytes(params, job.sizes().after, lesson.method, lesson.batch, tokens)
    show_estimate(lesson, memory, len(samples), seconds, console)

    size = min(32, len(samples))
    data = save_trajectories(lesson.folder / "trajectories", run, params, samples, size=size)
    rows = min(rows_of(params, tokens), len(data) * data.steps)
    options = Feedback()
    with console.status("error feedback") as status:
        told = lambda block: status.update(f"error feedback: {block}")  # noqa: E731
        tree = feedback_blocks(
            run,
            params,
            job.recipe,
            data,
            options,
            rows=rows,
            seed=lesson.seed,
            folder=lesson.folder,
            progress=told,
        )
    facts = {"prompts": len(data), "steps": data.steps, "trajectories": data.digest}
    rungs = [{"rung": "feedback", "rows": rows, **dataclasses.asdict(options)}]
    trainings = RUNGS[lesson.method][1:]
    for number, rung in enumerate(trainings):
        left = (lesson.minutes - (time.monotonic() - start) / 60) / (len(trainings) - number)
        if left <= 0:
            raise ValueError(
                f"the budget of {lesson.minutes:g} minutes is spent before '{rung}'; give more, or "
                "fewer prompts. What is recorded is used again"
            )
        if any((lesson.folder / later).exists() for later in trainings[number + 1 :]):
            left = 0.0  # the next one has begun with what this gave; going on would change that
        if rung == "scales":
            params = None  # has given all that is asked of it, and its memory is needed
        tree, done = _train(rung, lesson, run, params, tree, data, rows, seconds, left, console)
        rungs.append(done)
    minutes = round((time.monotonic() - start) / 60, 2)
    tree = jax.tree.map(partial(_cast, dtype=job.dtype), tree, is_leaf=is_qtensor)
    return tree, {"method": lesson.method, **facts, "rungs": rungs, "minutes": minutes}


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf if is_qtensor(leaf) else leaf.astype(dtype)


def show_estimate(
    lesson: Lesson, memory: dict[str, int], prompts: int, seconds: float, console: Console
) -> None:
    """What it will take, before it is taken: from one forward that was timed, and from shapes."""
    console.print(
        f"{lesson.method}: a forward takes {seconds:.3f} s; trajectories of {prompts} prompts "
        f"about {prompts * STEPS * seconds / 60:.1f} min, {lesson.minutes:g} min in all",
        soft_wrap=True,
    )
    for name, size in memory.items():
        console.print(f"memory, {name}: about {size / 1e9:,.2f} GB", soft_wrap=True)


def _forward_seconds(run: Run, params: Any, sample: Sample) -> float:
    def forward(params, sample):
        def apply(*inputs, **named) -> Any:
            return run.model.apply({"params": params}, *inputs, **named)

        return run.denoise(
            apply, sample.noise, jnp.full(1, run.steps.timestep[0]), sample.conditions
        )

    compiled = jax.jit(forward)
    compiled(params, sample).block_until_ready()
    start = time.monotonic()
    compiled(params, sample).block_until_ready()
    return time.monotonic() - start


def _train(
    rung: Method,
    lesson: Lesson,
    run: Run,
    params: Any,
    tree: Any,
    data: Trajectories,
    rows: int,
    seconds: float,
    minutes: float,
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    """One training, of what the rung before gave, in its share of the time that is left."""
    minutes *= SHARE
    # a step is two forwards and a backward pass of twice a forward, of `batch` entries
    steps = _planned(lesson.folder / rung, max(2, int(60 * minutes / (4 * seconds * lesson.batch))))
    options = train.Options(steps=steps, learning_rate=3e-4, batch=lesson.batch, seed=lesson.seed)
    kept: dict[str, Any] = {
        "folder": lesson.folder / rung,
        "minutes": minutes,
        "console": console,
    }
    if rung == "reconstruct":
        made = reconstruct(run, params, tree, data, options, rows=rows, **kept)
        done = {name: found.step for name, found in made.fits.items()}
        return made.params, {"rung": rung, "rows": rows, "planned": steps, "steps": done}
    if rung == "scales":
        parts = split.split(latent.rescaled(tree), split.SCALES)
    else:
        parts = split.split(latent.latents(params, tree), split.CODES)
    loss = velocity_loss(run)
    found = train.fit(
        loss,
        parts,
        lambda step: data.batch(step, options.batch, options.seed),
        options,
        name=rung,
        about=data.digest,
        **kept,
    )
    batch, judge = data.batch(steps, options.batch, options.seed), jax.jit(loss)
    before, after = (
        float(judge(parts.join(leaves, parts.frozen), batch))
        for leaves in (parts.trained, found.trained)
    )
    facts = {"rung": rung, "planned": steps, "steps": found.step, "loss": [before, after]}
    if not after < before:  # cut short while the learning rate was high
        console.print(
            f"{rung}: {found.step} of {steps} steps made the loss {before:.3g} no lower "
            f"({after:.3g}): left out. A larger --budget-minutes goes on with it",
            soft_wrap=True,
        )
        return tree, facts | {"left_out": True}
    return latent.tensors(parts.join(found.trained, parts.frozen)), facts


def _planned(folder: Path, steps: int) -> int:
    """The steps of a training: those planned when it was begun, if it was."""
    file = folder / "steps.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(steps))
    return json.loads(file.read_text())
