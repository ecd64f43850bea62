"""Train a small FLUX on Nouns: `python -m benchmarks.train_nouns --out runs/nouns`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks.caption_pool import PoolSpec, open_pools
from benchmarks.nouns_model import (
    MAX_LEN,
    comparison_sheet,
    evaluate,
    flow_loss,
    flux_config,
    init_params,
    make_sampler,
    make_velocity,
)
from benchmarks.training import Task, TrainOptions, train
from convert.minilm import load_minilm
from lowbit_jax.evaluation import nouns


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """What to train and for how long."""

    hidden: int = 256
    heads: int = 4
    depth: int = 2
    depth_single: int = 4


@dataclass(frozen=True)
class Nouns:
    """The captions of nouns, for `caption_pool`."""

    sprites: nouns.Sprites
    name: str = "nouns"

    def sample_attrs(self, rng: np.random.Generator, n: int, held_out: bool) -> np.ndarray:
        """See `nouns.sample_attrs`."""
        return nouns.sample_attrs(rng, n, self.sprites.counts, held_out)

    def caption(self, attrs: np.ndarray) -> list[str]:
        """See `nouns.caption`."""
        return nouns.caption(self.sprites, attrs)


def make_task(options: Options, console: Console) -> Task:
    """The task: pictures are composed on the fly, captions are encoded on first use."""
    sprites = nouns.load_sprites()
    specs = {
        "training": PoolSpec(
            size=options.pool, seed=options.seed + 1, held_out=False, max_len=MAX_LEN
        ),
        "held-out": PoolSpec(size=512, seed=2, held_out=True, max_len=MAX_LEN),
    }
    pools = open_pools(options.cache, specs, Nouns(sprites), load_minilm, console)
    config = flux_config(options.hidden, options.heads, options.depth, options.depth_single)
    velocity = make_velocity(config, jnp.dtype(options.dtype))
    sample = make_sampler(velocity)

    def take(pool, rows) -> dict[str, np.ndarray]:
        return {
            "images": nouns.compose(sprites, pool.attrs[rows]),
            "txt": np.asarray(pool.states[rows]),
            "pooled": np.asarray(pool.pooled[rows]),
        }

    def batch(step: int) -> dict[str, np.ndarray]:
        pool = pools["training"]
        return take(pool, pool.rows(step, options.batch, options.seed))

    attrs = pools["held-out"].attrs[: options.eval_captions]
    held_out = take(pools["held-out"], slice(0, len(attrs)))

    def held_out_scores(params: Any) -> tuple[dict[str, float], np.ndarray]:
        scores, pictures = evaluate(sample, params, sprites, attrs, held_out)
        return scores, comparison_sheet(held_out["images"], pictures)

    return Task(
        config=config,
        init=partial(init_params, config),
        loss=partial(flow_loss, velocity),
        batch=batch,
        evaluate=held_out_scores,
        accuracies=nouns.KINDS,
        scores=("mean", "psnr"),
    )


def main(options: Options) -> dict[str, float]:
    """Train; returns the last held-out scores."""
    console = Console()
    return train(options, make_task(options, console), console)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
