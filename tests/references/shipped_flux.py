"""What the tests of the shipped FLUX models share: inputs, and the sampling of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert.port import port
from lowbit_jax.models.flux import image_ids, text_ids
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.samplers.flow_euler import FlowSchedule

GRID, STEPS = (8, 8), 6


def inputs(channels: int, width: int, tokens: int):
    """Noise and text states as numpy float32; any states do, so no text encoder is needed."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 64, channels), np.float32)
    txt = 0.3 * rng.standard_normal((2, tokens, width), np.float32)
    return noise, txt, 0.2 * rng.standard_normal((2, width), np.float32)


def diffusers_tokens(folder: Path, noise, txt, pooled):
    """Sampling with nothing of ours: diffusers' transformer and scheduler, in float32."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    network = network.to(torch.float32).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        folder, subfolder="scheduler"
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
                txt_ids=torch.from_numpy(text_ids(txt.shape[1])),
            ).sample
            x = scheduler.step(velocity, t, x).prev_sample
    return x.numpy()


def compare_with_diffusers(folder: Path, tokens: int) -> None:
    """A trajectory in float32. 1e-3 of the largest value: errors of 1e-6 grow over the steps."""
    saved = port(folder, dtype=jnp.float32)
    noise, txt, pooled = inputs(saved.config["in_channels"], saved.config["context_in_dim"], tokens)
    expected = diffusers_tokens(folder, noise, txt, pooled)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(STEPS, 64)
    model = build(saved.model, saved.config)
    found = sample_tokens(model, saved.params, noise, txt, pooled, sigmas, grid=GRID)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.std(expected) > 0.1  # a picture, not a constant
