"""Train a small text-to-video STDiT: `python -m benchmarks.train_moving_nouns --out runs/video`.

Text comes from MiniLM, encoded once. Stop at any time (Ctrl-C too); `--resume` continues exactly
where the last checkpoint was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks.caption_pool import PoolSpec, open_pools
from benchmarks.moving_nouns_model import (
    ACCURACIES,
    MAX_LEN,
    OTHER_SCORES,
    contact_sheet,
    evaluate,
    init_params,
    make_loss,
    stdit_config,
)
from benchmarks.training import Task, TrainOptions, train
from benchmarks.training_optim import OptimOptions
from convert.minilm import load_minilm
from lowbit_jax.evaluation import moving_nouns
from lowbit_jax.evaluation.moving_nouns import Scene
from lowbit_jax.models.stdit import STDiTTransformer


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """What to train and for how long."""

    optim: tyro.conf.OmitArgPrefixes[OptimOptions] = OptimOptions(steps=2400, warmup=60)
    batch: int = 32
    pool: int = 8192
    """Number of training captions."""
    eval_captions: int = 32
    hidden: int = 256
    heads: int = 4
    depth: int = 4
    factor: int = 4
    """Side of the cell of pixels that a pixel-unshuffle makes one latent pixel of."""


@dataclass(frozen=True)
class MovingNouns:
    """The captions of moving nouns, for `caption_pool`."""

    scene: Scene
    name: str = "moving-nouns"

    def sample_attrs(self, rng: np.random.Generator, n: int, held_out: bool):
        """See `moving_nouns.sample_attrs`."""
        return moving_nouns.sample_attrs(rng, n, self.scene, held_out)

    def caption(self, attrs: np.ndarray) -> list[str]:
        """See `moving_nouns.caption`."""
        return moving_nouns.caption(self.scene, attrs)


def make_task(options: Options, console: Console) -> Task:
    """The task: its data is made on the fly, its captions are encoded on first use."""
    scene = moving_nouns.load_scene()
    specs = {
        "training": PoolSpec(
            size=options.pool, seed=options.seed + 1, held_out=False, max_len=MAX_LEN
        ),
        "held-out": PoolSpec(size=256, seed=2, held_out=True, max_len=MAX_LEN),
    }
    pools = open_pools(options.cache, specs, MovingNouns(scene), load_minilm, console)
    pool, held_out = pools["training"], pools["held-out"]
    config = stdit_config(options.hidden, options.heads, options.depth, options.factor)
    dtype = jnp.dtype(options.dtype)
    model = STDiTTransformer(config, dtype)

    def batch(step: int) -> dict[str, np.ndarray]:
        rows = pool.rows(step, options.batch, options.seed)
        clips = moving_nouns.clips(scene, pool.attrs[rows])
        return {"clips": clips, "txt": np.asarray(pool.states[rows])}

    def held_out_scores(params):
        n = min(options.eval_captions, len(held_out.attrs))
        attrs = held_out.attrs[:n]
        scores, clips = evaluate(model, params, scene, attrs, np.asarray(held_out.states[:n]))
        return scores, contact_sheet(moving_nouns.clips(scene, attrs)[:16], clips[:16])

    return Task(
        config=config,
        init=lambda seed: init_params(config, seed),
        loss=make_loss(config, dtype),
        batch=batch,
        evaluate=held_out_scores,
        accuracies=ACCURACIES,
        scores=OTHER_SCORES,
    )


def main(options: Options) -> dict[str, float]:
    """Train; returns the last held-out scores."""
    console = Console()
    return train(options, make_task(options, console), console)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
