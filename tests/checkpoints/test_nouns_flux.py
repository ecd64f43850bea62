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
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.samplers.flow_euler import FlowSchedule

MODEL = Path(__file__).parents[2] / "checkpoints" / "nouns-flux"
GRID, TOKENS, STEPS = (8, 8), 32, 6


def _inputs(channels: int, width: int):
    """Noise and text states as numpy float32; any states do, so no text encoder is needed."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 64, channels), np.float32)
    txt = 0.3 * rng.standard_normal((2, TOKENS, width), np.float32)
    return noise, txt, 0.2 * rng.standard_normal((2, width), np.float32)


def _diffusers_tokens(noise, txt, pooled):
    """The same sampling with nothing of ours: diffusers' transformer and scheduler."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.FluxTransformer2DModel.from_pretrained(MODEL, subfolder="transformer")
    network = network.to(torch.float32).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        MODEL, subfolder="scheduler"
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / STEPS, STEPS))
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = network(
                hidden_states=x,
                encoder_hidden_states=torch.from_numpy(txt),
                pooled_projections=torch.from_numpy(pooled),
                timestep=(t / 1000).expand(len(x)),
                img_ids=torch.from_numpy(image_ids(*GRID)),
                txt_ids=torch.from_numpy(text_ids(TOKENS)),
            ).sample
            x = scheduler.step(velocity, t, x).prev_sample
    return x.numpy()


@pytest.mark.slow
def test_same_picture_as_diffusers():
    """A trajectory in float32. 1e-3 of the largest value: errors of 1e-6 grow over the steps."""
    saved = port(MODEL, dtype=jnp.float32)
    noise, txt, pooled = _inputs(saved.config["in_channels"], saved.config["context_in_dim"])
    expected = _diffusers_tokens(noise, txt, pooled)
    schedule = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(STEPS, 64)
    model = build(saved.model, saved.config)
    found = sample_tokens(model, saved.params, noise, txt, pooled, sigmas, grid=GRID)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.std(expected) > 0.1  # a picture, not a constant


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
        noise, txt, pooled = _inputs(saved.config["in_channels"], saved.config["context_in_dim"])
        model = build(saved.model, saved.config)
        t = jnp.array([0.3, 0.9])
        ids = image_ids(*GRID), text_ids(TOKENS)
        out = jax.jit(model.apply)({"params": saved.params}, noise, txt, t, pooled, *ids)
        assert bool(jnp.isfinite(out).all())
