"""The shipped checkpoint is a diffusers model: diffusers loads it and draws the same picture."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.port import port
from lowbit_jax.models.flux import image_ids, text_ids
from lowbit_jax.models.registry import build
from tests.references.shipped_flux import GRID, compare_with_diffusers, inputs

MODEL = Path(__file__).parents[2] / "checkpoints" / "nouns-flux"
TOKENS = 32


@pytest.mark.slow
def test_same_picture_as_diffusers():
    compare_with_diffusers(MODEL, TOKENS)


def test_is_small_and_complete():
    """At most 20 MB, with prompts nobody trained on, licence notes and the training log."""
    size = sum(path.stat().st_size for path in (MODEL / "transformer").iterdir())
    assert size <= 20e6
    prompts = json.loads((MODEL / "prompts.json").read_text())
    assert len(prompts["prompts"]) == 128
    for name in ("README.md", "training-log.csv", "training-log.png"):
        assert (MODEL / name).stat().st_size > 0, name


def test_prompts_are_held_out():
    """By the split's own rule."""
    from lowbit_jax.evaluation.nouns import is_held_out

    prompts = json.loads((MODEL / "prompts.json").read_text())["prompts"]
    assert is_held_out(np.array([item["attrs"] for item in prompts])).all()


def test_quantised_model_runs_under_jit():
    """The ternary and integer kernels of a real checkpoint in one jitted call; finite output."""
    for recipe in ("flux-1.58bit-a8", "w4a8"):
        saved = port(MODEL, recipe, dtype=jnp.float32)
        config = saved.config
        noise, txt, pooled = inputs(config["in_channels"], config["context_in_dim"], TOKENS)
        model = build(saved.model, config)
        t = jnp.array([0.3, 0.9])
        ids = image_ids(*GRID), text_ids(TOKENS)
        out = jax.jit(model.apply)({"params": saved.params}, noise, txt, t, pooled, *ids)
        assert bool(jnp.isfinite(out).all())
