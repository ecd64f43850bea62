"""A scene of made-up sprites, so that tests of clips need no download."""

import numpy as np

from lowbit_jax.evaluation import moving_nouns
from lowbit_jax.evaluation.moving_nouns import Scene


def made_up_scene(seed=0):
    """Four heads, three pairs of glasses, three bodies: coloured boxes with random holes."""
    rng = np.random.default_rng(seed)
    boxes = {"head": (4, 20, 6, 25), "glasses": (10, 14, 7, 24), "body": (20, 32, 9, 22)}
    names = {
        "head": tuple("acorn box cat dog".split()),
        "glasses": tuple("black red blue".split()),
        "body": tuple("red green blue".split()),
        "background": tuple(moving_nouns.BACKGROUNDS),
        "direction": tuple(moving_nouns.DIRECTIONS),
        "speed": tuple(moving_nouns.SPEEDS),
    }
    parts = {}
    for kind, (top, bottom, left, right) in boxes.items():
        sprites = np.zeros((len(names[kind]), 32, 32, 4), np.uint8)
        inside = sprites[:, top:bottom, left:right]
        inside[..., :3] = rng.integers(0, 256, inside[..., :3].shape)
        inside[..., 3] = 255 * (rng.random(inside.shape[:3]) < 0.9)
        parts[kind] = sprites
    return Scene(parts=parts, names=names)
