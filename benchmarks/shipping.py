"""A training run as a shipped checkpoint: weights, scheduler, held-out prompts, log and curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.caption_pool import World
from benchmarks.training import load_ema
from convert.export import export_diffusers

PROMPTS = 128
SEED = 3  # other captions than those watched while training


def ship(
    run: Path,
    folder: Path,
    model: str,
    config_class: Callable[..., Any],
    scheduler: dict[str, Any],
    prompts: dict[str, Any],
) -> None:
    """Write the averaged weights of the newest checkpoint of `run`, bfloat16, into `folder`.

    Args:
        run: `out` of the training.
        folder: made if need be; `transformer/` in it is replaced, as are the other files.
        model: name of the network; written in the first of its export layouts.
        config_class: of the network.
        scheduler: settings that `lowbit_jax.samplers` reads.
        prompts: see `held_out_prompts`.
    """
    config, params = load_ema(run, config_class)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = folder / "transformer"
    shutil.rmtree(transformer, ignore_errors=True)
    export_diffusers(transformer, params, model, config, dtype=jnp.bfloat16)
    for name in ("log.csv", "log.png"):
        shutil.copy(run / name, folder / f"training-{name}")
    (folder / "scheduler").mkdir(exist_ok=True)
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(scheduler, indent=2) + "\n")
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in transformer.iterdir())
    print(f"{transformer}: {size / 1e6:.1f} MB")


def held_out_prompts(
    world: World, attributes: Sequence[str], max_tokens: int, count: int = PROMPTS
) -> dict[str, Any]:
    """Captions that were never trained on, with what they ask for, as JSON-able values."""
    attrs = world.sample_attrs(np.random.default_rng(SEED), count, held_out=True)
    pairs = zip(world.caption(attrs), attrs.tolist(), strict=True)
    items = [{"text": text, "attrs": row} for text, row in pairs]
    return {"max_tokens": max_tokens, "attributes": list(attributes), "prompts": items}
