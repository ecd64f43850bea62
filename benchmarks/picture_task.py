"""What the training programs of pictures share: a small FLUX and a world of captions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from rich.console import Console

from benchmarks.caption_pool import Pool, PoolSpec, open_pools
from benchmarks.picture_model import (
    comparison_sheet,
    flow_loss,
    flux_config,
    init_params,
    make_sampler,
    make_velocity,
    to_pixels,
)
from benchmarks.picture_worlds import WORLDS, PictureWorld
from benchmarks.training import Task, TrainOptions, train
from convert.minilm import load_minilm

HELD_OUT = 512


@dataclass(frozen=True, kw_only=True)
class PictureOptions(TrainOptions):
    """What to train and for how long."""

    hidden: int = 256
    heads: int = 4
    depth: int = 2
    depth_single: int = 4


def train_pictures(options: PictureOptions, model: str) -> dict[str, float]:
    """Train a model of `WORLDS`; returns the last held-out scores."""
    console = Console()
    return train(options, make_task(options, WORLDS[model](), console), console)


def make_task(options: PictureOptions, world: PictureWorld, console: Console) -> Task:
    """The task: pictures are composed on the fly, captions are encoded on first use."""
    common = {"max_len": world.max_len}
    specs = {
        "training": PoolSpec(size=options.pool, seed=options.seed + 1, held_out=False, **common),
        "held-out": PoolSpec(size=HELD_OUT, seed=2, held_out=True, **common),
    }
    pools = open_pools(options.cache, specs, world, load_minilm, console)
    config = flux_config(options.hidden, options.heads, options.depth, options.depth_single)
    velocity = make_velocity(config, jnp.dtype(options.dtype))
    return Task(
        config=config,
        init=partial(init_params, config),
        loss=partial(flow_loss, velocity),
        batch=partial(training_batch, pools["training"], world, options.batch, options.seed),
        evaluate=partial(
            held_out_scores, make_sampler(velocity), world, pools["held-out"], options.eval_captions
        ),
        accuracies=world.accuracies,
        scores=world.scores,
    )


def training_batch(
    pool: Pool, world: PictureWorld, size: int, seed: int, step: int
) -> dict[str, np.ndarray]:
    """Pictures and text of a step, as arguments of the loss; depends on the arguments alone."""
    rows = pool.rows(step, size, seed)
    pictures = world.pictures(pool.attrs[rows], np.random.default_rng((seed, step)))
    return take(pool, rows) | {"images": pictures}


def take(pool: Pool, rows) -> dict[str, np.ndarray]:
    """Text of these captions: states [b, t, k], pooled vectors [b, k]."""
    return {"txt": np.asarray(pool.states[rows]), "pooled": np.asarray(pool.pooled[rows])}


def held_out_scores(
    sample, world: PictureWorld, pool: Pool, captions: int, params: Any
) -> tuple[dict[str, float], UInt8[np.ndarray, "h w 3"]]:
    """Scores of the first `captions` of the pool, and a sheet of targets and pictures.

    The noise is always the same.
    """
    attrs = pool.attrs[:captions]
    noise = jax.random.normal(jax.random.key(1), (len(attrs), 64, 48))
    pictures = to_pixels(sample(params, noise, **take(pool, slice(0, len(attrs)))))
    targets = world.pictures(attrs, np.random.default_rng(1))
    return world.summary(pictures, attrs), comparison_sheet(targets, pictures)
