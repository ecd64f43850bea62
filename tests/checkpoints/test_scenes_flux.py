"""The shipped scenes model: a diffusers model, small, with held-out prompts that it follows."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert.port import port
from lowbit_jax.evaluation import scenes
from tests.references.shipped_flux import compare_with_diffusers

MODEL = Path(__file__).parents[2] / "checkpoints" / "scenes-flux"


@pytest.fixture(scope="module")
def prompts():
    return json.loads((MODEL / "prompts.json").read_text())


@pytest.mark.slow
def test_same_picture_as_diffusers(prompts):
    compare_with_diffusers(MODEL, prompts["max_tokens"])


def test_is_small_and_complete():
    """At most 20 MB, with its notes and the training log."""
    size = sum(path.stat().st_size for path in (MODEL / "transformer").iterdir())
    assert size <= 20e6
    for name in ("README.md", "training-log.csv", "training-log.png"):
        assert (MODEL / name).stat().st_size > 0, name


def test_prompts_are_held_out_and_of_every_kind(prompts):
    attrs = np.array([item["attrs"] for item in prompts["prompts"]])
    assert prompts["attributes"] == list(scenes.ATTRIBUTES)
    assert len(attrs) == 256 and scenes.is_held_out(attrs).all()
    groups = scenes.by_group(np.ones(len(attrs)), attrs)
    assert {name: len(rows) for name, rows in groups.items()} == {
        "single": 52,
        "two": 51,
        "counting": 51,
        "position": 102,
    }
    words = [item["text"] for item in prompts["prompts"]]
    try:
        assert words == scenes.caption(scenes.load_things(), attrs)
    except RuntimeError as error:
        pytest.skip(f"the sprites cannot be fetched: {error}")


@pytest.mark.slow
def test_held_out_captions_are_followed():
    """With the real sprites and text encoder: things, numbers and the colours of single things.

    The README has the shares over all prompts, and what the model has not learned.
    """
    pytest.importorskip("tokenizers")
    demo = pytest.importorskip("benchmarks.demo")
    try:
        things, prompts = scenes.load_things(), demo.load_prompts(40, MODEL)
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"sprites or text encoder: {error}")
    pictures, _ = demo.sample(port(MODEL, dtype=jnp.float32), prompts, seed=0)
    found = scenes.score(things, 255 * pictures, prompts.attrs)
    right = scenes.by_group(found["right"], prompts.attrs)
    assert right["single"].mean() > 0.8 and right["counting"].mean() > 0.6
    assert found["heads"].mean() > 0.75 and found["number"].mean() > 0.8
