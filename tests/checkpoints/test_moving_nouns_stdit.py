"""The shipped video model: in Open-Sora's layout, equal to torch, right about held-out captions."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert_and_quantize
from convert.port import port
from lowbit_jax import checkpoint
from lowbit_jax.evaluation import moving_nouns
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.video import sample_latents
from lowbit_jax.samplers.guidance import OPENSORA_1_2
from lowbit_jax.samplers.rectified_flow import RectifiedFlowSchedule
from lowbit_jax.samplers.registry import read_schedule

MODEL = Path(__file__).parents[2] / "checkpoints" / "moving-nouns-stdit"
SCHEDULE = RectifiedFlowSchedule(base_resolution=64, prediction_type="sample")
STEPS = 4


def _inputs(config):
    """Noise, states and mask of two captions; any states do, so no text encoder is needed."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, config["in_channels"], *config["input_size"]), np.float32)
    states = 0.3 * rng.standard_normal((2, 32, config["caption_channels"]), np.float32)
    return noise, states, np.arange(32) < np.array([[24], [32]])


def _sample(saved, **options):
    noise, *caption = _inputs(saved.config)
    steps = SCHEDULE.steps(STEPS, height=32, width=32, num_frames=1)
    model = build(saved.model, saved.config)
    return np.asarray(
        sample_latents(model, saved.params, noise, caption, steps, guidance=OPENSORA_1_2, **options)
    )


def test_same_clip_as_torch():
    """A trajectory in float32: a torch reference with the file's tensors, Euler steps in NumPy."""
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    from lowbit_jax.models.stdit import STDiTConfig
    from tests.references import stdit

    saved = port(MODEL, dtype=jnp.float32)
    config = STDiTConfig(**saved.config)
    network = stdit.STDiT(config, config.input_size)
    state = load_file(MODEL / "transformer" / "diffusion_pytorch_model.safetensors")
    tables = {"pos_embed": network.pos_embed, "pos_embed_temporal": network.pos_embed_temporal}
    for name, table in tables.items():  # stored rounded to bfloat16
        found = state[name].float().reshape(table.shape)
        assert torch.allclose(found, table, atol=2**-8)
        state[name] = table
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})

    x, states, mask = _inputs(saved.config)
    times = SCHEDULE.timesteps(STEPS, height=32, width=32, num_frames=1)
    for now, after in zip(times, [*times[1:], 0.0], strict=True):
        told = np.full(2, now, np.float32)
        names = ("x", "timestep", "caption", "caption_mask")
        data = stdit.run(network, dict(zip(names, (x, told, states, mask), strict=True)))
        x = (x + (now - after) / now * (data - x)).astype(np.float32)
    found = _sample(saved, scale=None)
    assert np.abs(found - x).max() < 1e-3 * np.abs(x).max()
    assert np.std(x) > 0.1  # a clip, not a constant


def test_converted_and_quantised_it_makes_nearly_the_same_clip(tmp_path):
    """The whole path of a file: the converter's program, a saved folder, guided sampling."""
    expected = _sample(port(MODEL, dtype=jnp.float32), scale=1.5)
    arguments = [str(MODEL), "--recipe", "w8a8", "--out", str(tmp_path / "w8a8"), "--dtype", "f32"]
    assert convert_and_quantize(arguments) == 0
    saved = checkpoint.load(tmp_path / "w8a8")
    assert saved.params["blocks"]["0"]["attn_temp"]["qkv"]["kernel"].format == "int8"
    found = _sample(saved, scale=1.5)
    # Made-up states ask for nothing in particular, and small errors decide what is drawn: 23 dB.
    # Real captions have 48 (the checkpoint's README).
    error = np.square(found - expected).mean()
    assert 0 < error < 1e-2 * np.square(expected).mean()


def test_its_schedule_is_beside_it():
    settings = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    found, size = read_schedule(settings), {"height": 32, "width": 32, "num_frames": 1}
    np.testing.assert_allclose(found.timesteps(20), SCHEDULE.timesteps(20, **size), rtol=1e-12)
    assert found.prediction_type == SCHEDULE.prediction_type


def test_is_small_and_complete():
    """At most 20 MB, with prompts nobody trained on and the training log."""
    size = sum(path.stat().st_size for path in (MODEL / "transformer").iterdir())
    assert size <= 20e6
    prompts = json.loads((MODEL / "prompts.json").read_text())
    assert len(prompts["prompts"]) == 128
    assert prompts["attributes"] == list(moving_nouns.KINDS)
    attrs = np.array([item["attrs"] for item in prompts["prompts"]])
    assert moving_nouns.is_held_out(attrs).all()
    for name in ("README.md", "training-log.csv", "training-log.png"):
        assert (MODEL / name).stat().st_size > 0, name


@pytest.mark.slow
def test_held_out_captions_are_followed():
    """With the real sprites and text encoder."""
    pytest.importorskip("tokenizers")
    samples = pytest.importorskip("benchmarks.video_samples")
    from lowbit_jax.evaluation import clip_scores

    try:
        scene, prompts = moving_nouns.load_scene(), samples.load_prompts(16)
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"sprites or text encoder: {error}")
    clips = samples.sample_recipe("float", prompts, samples.Options())
    scores = clip_scores.scores(scene, clips, prompts.attrs)
    for name, metric in clip_scores.METRICS.items():
        if scores[name].dtype == bool:
            assert scores[name].mean() > 0.9, (metric.group, name)
