"""A training loop over flat dicts of parameters: resumable to the bit, and it stops before damage.

    fit(loss, parts, batches, Options(steps=600), folder)

Nothing here knows a model: `loss(tree, batch)` does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Float32
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lowbit_jax.distill.split import Leaves, Split, join

SMOOTH = 20  # steps of the running mean of the loss that is shown and watched
BARS = "▁▂▃▄▅▆▇█"
FLAT = 0.05  # of the logarithm: what moves less is drawn as a line


class DivergedError(ArithmeticError):
    """A training that cannot go on; the message names the layers. The last good state is kept."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train.

    Attributes:
        steps: of the whole training; the learning rate falls to zero over them as a cosine.
        learning_rate: Adam's, at its highest.
        warmup: steps over which it rises from zero: Adam's first steps are of full size whatever
            the gradient, and codes that error feedback has chosen are easily lost.
        batch: forwards of a step.
        seed: of the order of the data.
        clip: largest norm of the gradient of all that is trained.
        diverged: the training stops when the mean loss of the last 20 steps is this many times
            that of the first 20.
        checkpoint_minutes: between two checkpoints.

    Raises:
        ValueError: a number that makes no sense.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 20
    batch: int = 96
    seed: int = 0
    clip: float = 1.0
    diverged: float = 10.0
    checkpoint_minutes: float = 3.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or min(self.learning_rate, self.clip) <= 0:
            raise ValueError(f"steps, batch, learning_rate and clip must be positive, got {self}")

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped Adam with a cosine."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, min(self.warmup, self.steps // 2), self.steps
        )
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adam(rate))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What came out.

    Attributes:
        trained: the leaves.
        losses: of each step; NaN for those not reached.
        step: steps taken; fewer than asked for when the time was up.
        seconds: by the clock, in this call.
    """

    trained: Leaves
    losses: Float32[np.ndarray, "steps"]
    step: int
    seconds: float


def fit(
    loss: Callable[[Any, Any], Float[Array, ""]],
    parts: Split,
    batches: Callable[[int], Any],
    options: Options,
    folder: Path | None = None,
    *,
    name: str = "training",
    about: str = "",
    minutes: float = float("inf"),
    console: Console | None = None,
) -> Fit:
    """Train `parts.trained`.

    A step with a gradient that is not finite changes nothing and stops the training. So does a
    loss that grows; then the last checkpoint is of before.

    Args:
        loss: (whole tree, batch) -> mean loss; pure.
        parts: see `split`; the frozen leaves are given to every step and have no gradient.
        batches: step -> batch, a function of nothing else.
        options: how.
        folder: where checkpoints are kept; what is there of an equal training is gone on with, to
            the same result to the bit. None for none.
        name: shown beside the progress.
        about: what else must be equal for a training to be equal, such as a digest of the data.
        minutes: stop after this long, with a checkpoint.
        console: where progress and the loss are shown; None for nowhere.

    Raises:
        DivergedError: see above.
        ValueError: `folder` holds another training.
    """
    start = time.monotonic()
    optimizer = options.optimizer()
    state = {
        "trained": parts.trained,
        "optimizer": optimizer.init(parts.trained),
        "losses": jnp.full(options.steps, jnp.nan, jnp.float32),
        "step": jnp.int32(0),
    }
    kept = _Kept(folder, state, options, about)
    state = kept.latest()
    program = step_program(loss, parts.structure, parts.names, tuple(parts.trained), equal(options))
    saved, step = time.monotonic(), int(state["step"])
    with _progress(console) as bar:
        task = bar.add_task(name, total=options.steps, completed=step, loss=float("nan"), curve="")
        while step < options.steps and time.monotonic() - start < 60 * minutes:
            state, bad = program(state, parts.frozen, batches(step))
            _check_finite(np.asarray(bad), list(parts.trained), name, step)
            step += 1
            losses = np.asarray(state["losses"])[:step]
            _check_falling(losses, options, name, parts)
            mean = float(losses[-SMOOTH:].mean())
            bar.update(task, completed=step, loss=mean, curve=curve(losses))
            if time.monotonic() - saved > 60 * options.checkpoint_minutes:
                kept.save(step, state)
                saved = time.monotonic()
    kept.save(step, state)
    kept.close()
    return Fit(
        trained=dict(state["trained"]),
        losses=np.asarray(state["losses"]),
        step=step,
        seconds=time.monotonic() - start,
    )


def equal(options: Options) -> Options:
    """The options with what changes no result left out."""
    return dataclasses.replace(options, checkpoint_minutes=0.0)


@lru_cache(maxsize=2)  # the blocks of a stack share a program
def step_program(loss, structure, names, trained_names, options: Options):
    """One step: (state, frozen, batch) -> state, which trained leaves have a gradient not finite.

    Args:
        loss: see `fit`.
        structure: of the whole tree.
        names: of its leaves.
        trained_names: those that are trained.
        options: how.
    """
    optimizer = options.optimizer()

    @partial(jax.jit, donate_argnums=0)
    def program(state, frozen, batch):
        def of_trained(trained):
            return loss(join(structure, names, trained, frozen), batch)

        trained = state["trained"]
        value, grads = jax.value_and_grad(of_trained)(trained)
        bad = jnp.stack([~jnp.isfinite(grads[name]).all() for name in trained_names])
        bad = bad | ~jnp.isfinite(value)
        updates, moments = optimizer.update(grads, state["optimizer"], trained)
        new = {
            "trained": optax.apply_updates(trained, updates),
            "optimizer": moments,
            "losses": state["losses"].at[state["step"]].set(value),
            "step": state["step"] + 1,
        }
        good = ~bad.any()
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state), bad

    return program


def _check_finite(bad: np.ndarray, names: list[str], training: str, step: int) -> None:
    if bad.any():
        wrong = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DivergedError(
            f"{training}, step {step}: the gradient is NaN or infinite in "
            f"{', '.join(wrong[:3])}{more}; the state before this step is kept. A lower learning "
            "rate may help"
        )


def _check_falling(losses: np.ndarray, options: Options, training: str, parts: Split) -> None:
    first, last = losses[:SMOOTH].mean(), losses[-SMOOTH:].mean()
    if len(losses) >= 2 * SMOOTH and last > options.diverged * first:
        layers = sorted({name.rsplit("/", 2)[0] for name in parts.trained})
        raise DivergedError(
            f"{training}, step {len(losses)}: the loss has grown from {first:.3g} to {last:.3g} "
            f"(training {len(layers)} layers, {layers[0]} to {layers[-1]}); the last checkpoint is "
            "of before. A lower learning rate may help"
        )


class _Kept:
    """Checkpoints of a training, the newest two; or nothing, without a folder."""

    def __init__(self, folder: Path | None, state: Any, options: Options, about: str):
        self._start, self._manager = state, None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        facts = (
            repr(equal(options)),
            about,
            [(n, x.shape, x.dtype) for n, x in state["trained"].items()],
        )
        mark, file = hashlib.sha256(repr(facts).encode()).hexdigest(), folder / "training.sha256"
        if file.exists() and file.read_text() != mark:
            raise ValueError(f"{folder} holds a training with other settings, data or parameters")
        file.write_text(mark)
        # Synchronous: on the CPU a donated buffer could be overwritten while a thread still reads
        settings = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager((folder / "checkpoints").resolve(), options=settings)

    def latest(self) -> Any:
        """The newest state, or the start; the caller may donate it."""
        if self._manager is None or self._manager.latest_step() is None:
            return jax.tree.map(jnp.copy, self._start)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._start)
        restore = ocp.args.StandardRestore(abstract)
        return self._manager.restore(self._manager.latest_step(), args=restore)

    def save(self, step: int, state: Any) -> None:
        if self._manager is not None and self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()


def curve(losses: Float32[np.ndarray, "steps"], width: int = 16) -> str:
    """Losses of all steps so far as a line of at most `width` bars, on a logarithmic scale."""
    parts = np.array_split(losses, min(width, len(losses)))
    heights = np.log(np.maximum([part.mean() for part in parts], np.finfo(np.float32).tiny))
    low, high = heights.min(), heights.max()
    levels = (heights - low) / max(high - low, FLAT) * (len(BARS) - 1)
    return "".join(BARS[round(level)] for level in levels)


def _progress(console: Console | None) -> Progress:
    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()]
    loss = TextColumn("loss {task.fields[loss]:.5f} {task.fields[curve]}")
    return Progress(*columns, loss, console=console, disable=console is None)
