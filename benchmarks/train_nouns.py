"""Train a small FLUX on Nouns: `python -m benchmarks.train_nouns --out runs/nouns`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.nouns_model import (
    evaluate,
    flow_loss,
    flux_config,
    init_params,
    make_sampler,
    make_velocity,
)
from benchmarks.nouns_optim import OptimOptions, ema_decay, make_optimizer
from benchmarks.nouns_pool import Pool, PoolSpec, open_pool
from benchmarks.nouns_report import Log, save_samples
from convert.minilm import load_minilm
from lowbit_jax.evaluation import nouns
from lowbit_jax.evaluation.nouns_assets import default_cache
from lowbit_jax.models.flux import FluxConfig

State = dict[str, Any]  # params, ema, opt, step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train and for how long."""

    out: Path
    """Folder of checkpoints, log and pictures."""
    optim: tyro.conf.OmitArgPrefixes[OptimOptions] = OptimOptions()
    batch: int = 96
    seed: int = 0
    minutes: float = float("inf")
    """Stop after this long in this run, with a checkpoint; `--resume` goes on."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    hidden: int = 256
    heads: int = 4
    depth: int = 2
    depth_single: int = 4
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and products; parameters and accumulation are float32."""
    pool: int = 16384
    """Number of training captions."""
    eval_every: int = 200
    eval_captions: int = 128
    checkpoint_minutes: float = 5.0
    cache: Path = default_cache()
    """Where encoded captions are kept."""

    @property
    def config(self) -> FluxConfig:
        """Sizes of the network."""
        return flux_config(self.hidden, self.heads, self.depth, self.depth_single)


def make_train_step(velocity, optimizer, seed: int):
    """`train_step(state, batch) -> (state, loss)`, jitted, `state` donated."""

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, batch: dict[str, Array]) -> tuple[State, Float[Array, ""]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        loss, grads = jax.value_and_grad(partial(flow_loss, velocity))(
            state["params"], key, **batch
        )
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


def load_ema(out: Path) -> tuple[FluxConfig, dict[str, Any]]:
    """The configuration and averaged float32 parameters of the newest checkpoint in `out`."""
    config = json.loads((out / "options.json").read_text())["config"]
    with open_checkpoints(out) as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())
    return FluxConfig(**config | {"axes_dim": tuple(config["axes_dim"])}), state["ema"]


def start_state(options: Options, optimizer, checkpoints: ocp.CheckpointManager) -> State:
    """A fresh state, or with `--resume` the newest checkpoint.

    Raises:
        SystemExit: `out` holds checkpoints of another setup, or any without `--resume`.
    """
    file, here = options.out / "options.json", describe(options)
    latest = checkpoints.latest_step()
    if latest is not None and not options.resume:
        raise SystemExit(f"{options.out} holds step {latest}; add --resume or choose another --out")
    params = init_params(options.config, options.seed)
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


def describe(options: Options) -> dict[str, Any]:
    """What must not change between a run and its continuation, as JSON-able values.

    The number of steps may: during the plateau nothing depends on it.
    """
    keys = ("config", "batch", "seed", "dtype", "pool", "optim")
    values = {key: getattr(options, key) for key in keys}
    values |= {"config": asdict(options.config), "optim": asdict(options.optim)}
    del values["optim"]["steps"]
    return json.loads(json.dumps(values))


def open_pools(options: Options, console: Console) -> tuple[Pool, Pool]:
    """The training pool and 512 held-out nouns."""
    sprites = nouns.load_sprites()
    train = PoolSpec(size=options.pool, seed=options.seed + 1, held_out=False)
    specs = {"training": train, "held-out": PoolSpec(size=512, seed=2, held_out=True)}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar:
        pools = []
        for name, spec in specs.items():
            task = bar.add_task(f"{name} captions", total=spec.size)
            advance = lambda done, task=task: bar.update(task, completed=done)  # noqa: E731
            pools.append(open_pool(options.cache, spec, sprites, load_minilm, advance))
            bar.update(task, completed=spec.size)
    return pools[0], pools[1]


def train(options: Options) -> dict[str, float]:
    """Train until `steps`, `minutes` or a signal; returns the last held-out scores."""
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    pool, held_out = open_pools(options, console)
    velocity = make_velocity(options.config, jnp.dtype(options.dtype))
    optimizer = make_optimizer(options.optim)
    step_fn = make_train_step(velocity, optimizer, options.seed)
    sample = make_sampler(velocity)
    checkpoints = open_checkpoints(options.out)
    state = start_state(options, optimizer, checkpoints)
    log = Log(options.out / "log.csv", int(state["step"]))
    stop = Stop(options.minutes)
    saved, scores = time.monotonic(), {}

    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as bar:
        total = options.optim.steps
        task = bar.add_task("training", total=total, completed=log.step, loss=float("nan"))
        while log.step < total and not stop():
            state, loss = step_fn(state, pool.batch(log.step, options.batch, options.seed))
            log.add(float(loss))
            bar.update(task, completed=log.step, loss=log.smooth_loss)
            if log.step % options.eval_every == 0 or log.step == total:
                scores, pictures = evaluate(sample, state["ema"], held_out, options.eval_captions)
                log.add_scores(scores)
                save_samples(options.out / "samples.png", held_out, pictures)
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


if __name__ == "__main__":
    train(tyro.cli(Options, description=__doc__))
