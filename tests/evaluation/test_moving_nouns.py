"""Moving nouns: sprites, captions, motion, split and the layout of the latents."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.evaluation import moving_nouns
from tests.references.scenes import made_up_scene


@pytest.fixture(scope="module")
def scene():
    return made_up_scene()


def test_real_sprites_are_distinct():
    try:
        scene = moving_nouns.load_scene()
    except RuntimeError as error:
        pytest.skip(f"the Nouns sprites cannot be fetched: {error}")
    assert scene.counts == (24, 6, 8, 6, 8, 2)
    attrs = np.zeros((24, 6), int)
    attrs[:, 0] = np.arange(24)
    pictures = moving_nouns.still(scene, attrs).reshape(24, -1)
    assert len(np.unique(pictures, axis=0)) == 24
    assert moving_nouns.caption(scene, attrs[:1]) == [
        "a noun with a banana head, black glasses and a red body moves left slowly on a grey"
        " background"
    ]


def test_clips_are_rolled_paintings(scene):
    rng = np.random.default_rng(0)
    attrs = moving_nouns.sample_attrs(rng, 24, scene)
    assert set(attrs[:, 4]) == set(range(8))
    clips = moving_nouns.clips(scene, attrs, frames=11)  # longer than it takes to wrap around
    signs = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for clip, row in zip(clips, attrs, strict=True):
        colour = list(moving_nouns.BACKGROUNDS.values())[row[3]]
        canvas = np.full((32, 32, 3), colour, np.uint8)
        for kind in ("body", "head", "glasses"):
            sprite = scene.parts[kind][row[moving_nouns.KINDS.index(kind)]]
            visible = sprite[..., 3] == 255
            canvas[visible] = sprite[visible][:, :3]
        words = scene.names["direction"][row[4]].split(" and ")
        step = (4, 8)[row[5]] * np.sum([signs[word] for word in words], axis=0)
        for t, frame in enumerate(clip):
            np.testing.assert_array_equal(frame, np.roll(canvas, t * step, axis=(0, 1)))


def test_caption_says_everything(scene):
    rng = np.random.default_rng(1)
    attrs = rng.integers(0, scene.counts, (500, 6))
    texts = moving_nouns.caption(scene, attrs)
    assert len(set(texts)) == len(np.unique(attrs, axis=0))
    assert moving_nouns.caption(scene, np.array([[0, 2, 1, 5, 6, 1]])) == [
        "a noun with an acorn head, blue glasses and a green body moves down and left quickly on a"
        " dark background"
    ]


def test_split_is_of_head_and_motion(scene):
    counts = (24, 6, 8, 6, 8, 2)
    attrs = np.random.default_rng(2).integers(0, counts, (50_000, 6))
    held = moving_nouns.is_held_out(attrs)
    assert abs(held.mean() - 0.1) < 0.04  # 384 pairs
    other = attrs.copy()
    other[:, 1:4] = np.random.default_rng(3).integers(0, counts[1:4], (len(attrs), 3))
    np.testing.assert_array_equal(moving_nouns.is_held_out(other), held)
    for side in (False, True):
        drawn = moving_nouns.sample_attrs(np.random.default_rng(4), 50, scene, held_out=side)
        assert (moving_nouns.is_held_out(drawn) == side).all()


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("factor", [2, 4])
def test_latents_are_torch_s_pixel_unshuffle(xp, factor):
    torch = pytest.importorskip("torch")
    clips = np.random.default_rng(5).uniform(-1, 1, (2, 3, 8, 16, 3)).astype(np.float32)
    latents = moving_nouns.to_latent(xp.asarray(clips), factor)
    frames = torch.from_numpy(clips).permute(0, 1, 4, 2, 3)
    expected = torch.nn.functional.pixel_unshuffle(frames, factor).permute(0, 2, 1, 3, 4)
    np.testing.assert_array_equal(latents, expected.numpy())
    np.testing.assert_array_equal(moving_nouns.from_latent(latents, factor), clips)
