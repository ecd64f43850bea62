"""The training loop of the small models: steps, averaged weights, checkpoints, held-out scores.

Knows no model: a `Task` says what is trained. Stop at any time (Ctrl-C too); `--resume` continues
exactly where the last checkpoint was written.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jaxtyping import Array, Float, Key, UInt8
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.training_optim import OptimOptions, ema_decay, make_optimizer
from benchmarks.training_report import Log, save_picture
from lowbit_jax.evaluation.nouns_assets import default_cache

State = dict[str, Any]  # params, ema, opt, step


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What every task is told."""

    out: Path
    """Folder of checkpoints, log and pictures."""
    optim: tyro.conf.OmitArgPrefixes[OptimOptions] = OptimOptions()
    batch: int = 96
    seed: int = 0
    minutes: float = float("inf")
    """Stop after this long in this run, with a checkpoint; `--resume` goes on."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and products; parameters and accumulation are float32."""
    pool: int = 16384
    """Number of training captions."""
    eval_every: int = 200
    eval_captions: int = 128
    checkpoint_minutes: float = 5.0
    cache: Path = default_cache()
    """Where encoded captions are kept."""


class Task(NamedTuple):
    """What is trained.

    Attributes:
        config: the network's sizes, a dataclass.
        init: random parameters from a seed.
        loss: of (params, key, **batch); a pure function, it is jitted.
        batch: host arrays of a step; must depend on the step alone, so that a run can go on.
        evaluate: held-out scores of the parameters, and a picture that shows them.
        accuracies: names of the scores that are shares of 1, drawn in one plot.
        scores: names of the other scores.
    """

    config: Any
    init: Callable[[int], Any]
    loss: Callable[..., Float[Array, ""]]
    batch: Callable[[int], dict[str, np.ndarray]]
    evaluate: Callable[[Any], tuple[dict[str, float], UInt8[np.ndarray, "h w 3"]]]
    accuracies: tuple[str, ...]
    scores: tuple[str, ...]


def make_train_step(
    loss_fn: Callable[[Any, Key[Array, ""]], Float[Array, ""]], optimizer, seed: int
):
    """`train_step(state, batch) -> (state, loss)`, jitted, `state` donated."""

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, batch: dict[str, Array]) -> tuple[State, Float[Array, ""]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], key, **batch)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = jax.tree.map(jnp.add, state["params"], updates)
        decay = ema_decay(state["step"])
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
        return {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}, loss

    return train_step


def open_checkpoints(out: Path) -> ocp.CheckpointManager:
    """Orbax checkpoints in `out`: each is written aside and renamed; the newest two are kept."""
    # Synchronous: on the CPU a donated buffer could be overwritten while a thread still reads it.
    settings = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((out / "checkpoints").resolve(), options=settings)


def load_ema(out: Path, config_class: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration and averaged float32 parameters of the newest checkpoint in `out`."""
    stored = json.loads((out / "options.json").read_text())["config"]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    with open_checkpoints(out) as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())
    return config_class(**fields), state["ema"]


def start_state(
    options: TrainOptions, task: Task, optimizer, checkpoints: ocp.CheckpointManager
) -> State:
    """A fresh state, or with `--resume` the newest checkpoint.

    Raises:
        SystemExit: `out` holds checkpoints of another setup, or any without `--resume`.
    """
    file, here = options.out / "options.json", describe(options, task)
    latest = checkpoints.latest_step()
    if latest is not None and not options.resume:
        raise SystemExit(f"{options.out} holds step {latest}; add --resume or choose another --out")
    params = task.init(options.seed)
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "step": jnp.int32(0)}
    state["opt"] = optimizer.init(params)
    if latest is None:
        file.write_text(json.dumps(here, indent=2))
        return state
    before = json.loads(file.read_text())
    changed = [f"{k}: {before.get(k)} -> {v}" for k, v in here.items() if before.get(k) != v]
    if changed:
        raise SystemExit(f"{options.out} was trained otherwise ({'; '.join(changed)})")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return checkpoints.restore(latest, args=ocp.args.StandardRestore(abstract))


def describe(options: TrainOptions, task: Task) -> dict[str, Any]:
    """What must not change between a run and its continuation, as JSON-able values.

    The number of steps may: during the plateau nothing depends on it.
    """
    keys = ("batch", "seed", "dtype", "pool")
    values = {key: getattr(options, key) for key in keys}
    values |= {"config": asdict(task.config), "optim": asdict(options.optim)}
    del values["optim"]["steps"]
    return json.loads(json.dumps(values))


def train(options: TrainOptions, task: Task, console: Console) -> dict[str, float]:
    """Train until `steps`, `minutes` or a signal; returns the last held-out scores."""
    options.out.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(options.optim)
    step_fn = make_train_step(task.loss, optimizer, options.seed)
    checkpoints = open_checkpoints(options.out)
    state = start_state(options, task, optimizer, checkpoints)
    log = Log(options.out / "log.csv", int(state["step"]), task.accuracies, task.scores)
    stop = Stop(options.minutes)
    saved, scores = time.monotonic(), {}

    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as bar:
        total = options.optim.steps
        shown = bar.add_task("training", total=total, completed=log.step, loss=float("nan"))
        while log.step < total and not stop():
            state, loss = step_fn(state, task.batch(log.step))
            log.add(float(loss))
            bar.update(shown, completed=log.step, loss=log.smooth_loss)
            if log.step % options.eval_every == 0 or log.step == total:
                scores, picture = task.evaluate(state["ema"])
                log.add_scores(scores)
                save_picture(options.out / "samples.png", picture)
                console.print(f"step {log.step}: {log.summary()}")
            if time.monotonic() - saved > 60 * options.checkpoint_minutes:
                save(checkpoints, log, state)
                saved = time.monotonic()
    save(checkpoints, log, state)
    checkpoints.close()
    return scores


def save(checkpoints: ocp.CheckpointManager, log: Log, state: State) -> None:
    """Write the log, then the checkpoint; a log that is ahead is cut on resuming."""
    log.write()
    if checkpoints.latest_step() != log.step:
        checkpoints.save(log.step, args=ocp.args.StandardSave(state))


class Stop:
    """True once the time is up or a SIGINT or SIGTERM has come, so that the last step is saved."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._now)

    def _now(self, *_) -> None:
        self.end = 0.0

    def __call__(self) -> bool:
        """Whether to stop."""
        return time.monotonic() >= self.end
