"""Export a trained Nouns model as the shipped checkpoint: `python -m benchmarks.ship_nouns RUN`.

Writes `checkpoints/nouns-flux`: weights in diffusers' layout (bfloat16), held-out prompts, and the
training log with its learning curve.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.demo import MODEL
from benchmarks.nouns_model import MAX_LEN
from benchmarks.training import load_ema
from convert.export import export_diffusers
from lowbit_jax.evaluation import nouns
from lowbit_jax.models.flux import FluxConfig

PROMPTS = 128


def ship(run: tyro.conf.Positional[Path]) -> None:
    """Export the averaged weights of the newest checkpoint of a training run."""
    config, params = load_ema(run, FluxConfig)
    transformer = MODEL / "transformer"
    shutil.rmtree(transformer, ignore_errors=True)
    export_diffusers(transformer, params, "flux", config, dtype=jnp.bfloat16)
    for name in ("log.csv", "log.png"):
        shutil.copy(run / name, MODEL / f"training-{name}")
    (MODEL / "prompts.json").write_text(json.dumps(prompts(), indent=1) + "\n")
    size = sum(path.stat().st_size for path in transformer.iterdir())
    print(f"{transformer}: {size / 1e6:.1f} MB")


def prompts() -> dict:
    """Held-out captions other than those watched while training."""
    sprites = nouns.load_sprites()
    attrs = nouns.sample_attrs(np.random.default_rng(3), PROMPTS, sprites.counts, held_out=True)
    texts = nouns.caption(sprites, attrs)
    pairs = zip(texts, attrs.tolist(), strict=True)
    items = [{"text": text, "attrs": row} for text, row in pairs]
    return {"max_tokens": MAX_LEN, "attributes": list(nouns.KINDS), "prompts": items}


if __name__ == "__main__":
    tyro.cli(ship)
