"""Moving nouns: a text-to-video task with an exact judge.

A clip is a noun (`lowbit_jax.evaluation.nouns`: real sprites, here head, glasses and body) that
moves over a plain background, as its caption says: eight directions, two speeds, whole pixels per
frame, wrapping around at the edges, always from the same start. So a caption fixes every pixel of
every frame. `lowbit_jax.evaluation.clip_scores` judges generated clips.

Shape letters: b batch, f frames, c latent channels, y and x rows and columns of latents. `attrs`
[b, 6] holds indices into `Scene.names` in the order of `KINDS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

from lowbit_jax.evaluation import nouns
from lowbit_jax.evaluation.nouns_assets import SIZE

KINDS = ("head", "glasses", "body", "background", "direction", "speed")
PARTS = KINDS[:4]  # what a frame shows; the others are the motion
FRAMES = 8

# caption words -> sprite of the package, chosen to look different
HEADS = (
    "banana bat bear beer bell blueberry bomb cake car cat cherry cloud clover cone cookie crab"
    " crown dog doughnut duck earth flower fox frog"
).split()
GLASSES = {
    "black": "square black",
    "red": "square red",
    "blue": "square blue",
    "yellow": "square yellow saturated",
    "pink": "hip rose",
    "green": "grass",
}
BODIES = {
    "red": "red",
    "orange": "orange yellow",
    "yellow": "yellow",
    "green": "green",
    "blue": "blue sky",
    "purple": "magenta",
    "brown": "darkbrown",
    "white": "grayscale 1",
}
BACKGROUNDS = {
    "grey": (213, 215, 225),
    "pink": (250, 180, 205),
    "blue": (120, 170, 240),
    "green": (140, 205, 140),
    "yellow": (250, 225, 130),
    "dark": (40, 40, 60),
}
DIRECTIONS = {  # rows, columns
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
    "up and left": (-1, -1),
    "up and right": (-1, 1),
    "down and left": (1, -1),
    "down and right": (1, 1),
}
SPEEDS = {"slowly": 4, "quickly": 8}  # pixels per frame


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The parts in use: `names` [n] per kind, and per sprite kind uint8 RGBA [n, 32, 32, 4]."""

    parts: dict[str, UInt8[np.ndarray, "n 32 32 4"]]
    names: dict[str, tuple[str, ...]]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of values of each attribute, in the order of `KINDS`."""
        return tuple(len(self.names[kind]) for kind in KINDS)


def load_scene(path: Path | None = None) -> Scene:
    """The scene of real sprites; `path` as for `nouns.load_sprites`."""
    sprites = nouns.load_sprites(path, heads=None)
    used = {"head": dict(zip(HEADS, HEADS, strict=True)), "glasses": GLASSES, "body": BODIES}
    parts = {
        kind: sprites.parts[kind][[sprites.names[kind].index(name) for name in words.values()]]
        for kind, words in used.items()
    }
    names = {kind: tuple(words) for kind, words in used.items()}
    names |= {"background": tuple(BACKGROUNDS), "direction": tuple(DIRECTIONS)}
    return Scene(parts=parts, names=names | {"speed": tuple(SPEEDS)})


def still(scene: Scene, attrs: Int[np.ndarray, "b 6"]) -> UInt8[np.ndarray, "b 32 32 3"]:
    """The first frame: background, body, head, glasses."""
    canvas = np.array(list(BACKGROUNDS.values()), np.uint8)[attrs[:, 3]][:, None, None]
    for kind in ("body", "head", "glasses"):
        sprite = scene.parts[kind][attrs[:, KINDS.index(kind)]]
        canvas = np.where(sprite[..., 3:] > 0, sprite[..., :3], canvas)
    return canvas


def velocity(attrs: Int[np.ndarray, "b 6"]) -> Int[np.ndarray, "b 2"]:
    """Rows and columns moved per frame."""
    directions, speeds = (np.array(list(d.values())) for d in (DIRECTIONS, SPEEDS))
    return directions[attrs[:, 4]] * speeds[attrs[:, 5], None]


def track(attrs: Int[np.ndarray, "b 6"], frames: int = FRAMES) -> Int[np.ndarray, "b f 2"]:
    """Rows and columns moved since the first frame, not wrapped."""
    return velocity(attrs)[:, None] * np.arange(frames)[:, None]


def shift(
    frames: Num[np.ndarray, "b f h w 3"], by: Int[np.ndarray, "b f 2"]
) -> Num[np.ndarray, "b f h w 3"]:
    """Every frame moved by whole rows and columns, wrapping around."""
    b, f, height, width, _ = frames.shape
    rows = (np.arange(height) - by[..., :1]) % height
    columns = (np.arange(width) - by[..., 1:]) % width
    at = np.arange(b)[:, None, None, None], np.arange(f)[:, None, None]
    return frames[(*at, rows[..., None], columns[..., None, :])]


def clips(
    scene: Scene, attrs: Int[np.ndarray, "b 6"], frames: int = FRAMES
) -> UInt8[np.ndarray, "b f 32 32 3"]:
    """The clips that `attrs` describe."""
    first = still(scene, attrs)[:, None]
    repeated = np.broadcast_to(first, (len(attrs), frames, *first.shape[2:]))
    return shift(repeated, track(attrs, frames))


def short_way(difference: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """The equal shift, modulo the side of a frame, from -16 to 15."""
    return (difference + SIZE // 2) % SIZE - SIZE // 2


def caption(scene: Scene, attrs: Int[np.ndarray, "b 6"]) -> list[str]:
    """One sentence per row: "a noun with a cat head, blue glasses and a red body moves up and left
    slowly on a green background"."""
    rows = [[scene.names[kind][i] for kind, i in zip(KINDS, row, strict=True)] for row in attrs]
    return [
        f"a noun with {nouns.article(head)} head, {glasses} glasses and {nouns.article(body)} body"
        f" moves {direction} {speed} on a {background} background"
        for head, glasses, body, background, direction, speed in rows
    ]


def is_held_out(attrs: Int[np.ndarray, "b 6"]) -> Bool[np.ndarray, "b"]:
    """Whether a clip is in the 10 % never trained on: a fixed hash of (head, direction, speed).

    These heads are never seen moving so: the held-out score is a test of composition.
    """
    attrs = np.asarray(attrs)
    return nouns.held_out_pair(attrs[:, 0], attrs[:, 4] * len(SPEEDS) + attrs[:, 5])


def sample_attrs(
    rng: np.random.Generator, n: int, scene: Scene, held_out: bool = False
) -> Int[np.ndarray, "n 6"]:
    """`n` random clips of the training part of the split, or of the held-out part."""
    return nouns.sample_part(rng, n, scene.counts, is_held_out, held_out)


def to_latent(
    clips: Float[np.ndarray, "b f h w 3"], factor: int = 4
) -> Float[np.ndarray, "b c f y x"]:
    """Pixel-unshuffle of every frame, in place of a VAE: c = (colour, row, column) of a
    `factor` x `factor` cell. Works on numpy and jax arrays alike."""
    b, f, height, width, colours = clips.shape
    cut = clips.reshape(b, f, height // factor, factor, width // factor, factor, colours)
    x = cut.transpose(0, 6, 3, 5, 1, 2, 4)
    return x.reshape(b, colours * factor**2, f, height // factor, width // factor)


def from_latent(
    latents: Float[np.ndarray, "b c f y x"], factor: int = 4
) -> Float[np.ndarray, "b f h w 3"]:
    """Inverse of `to_latent`."""
    b, _, f, y, x = latents.shape
    cut = latents.reshape(b, -1, factor, factor, f, y, x).transpose(0, 4, 5, 2, 6, 3, 1)
    return cut.reshape(b, f, y * factor, x * factor, -1)
