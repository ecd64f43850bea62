"""Nouns: a text-to-picture task with an exact judge.

A noun is four 32x32 sprites laid over each other; its caption names them. So the picture a caption
asks for is known to the pixel, and a generated picture is judged by recomposing the target with
every other candidate of one part: no learned metric is needed. The sprites come from the npm
package `@nouns/assets` (package.json: GPL-3.0; the Nouns project declares the art CC0); they are
fetched, never shipped.

Shape letters: b batch, n candidates of one kind. `attrs` [b, 4] holds indices into `Sprites` in the
order of `KINDS`, which is also the order of painting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

from lowbit_jax.evaluation.nouns_assets import SIZE, decode_rle, fetch_sprites

KINDS = ("body", "accessory", "head", "glasses")

# SUBSET: how many of the usable sprites are used, in the package's order (None: all).
HEADS: int | None = 128
ACCESSORIES: int | None = 48
# An accessory is usable if it and the body can both be seen beneath this share of the heads.
MIN_VISIBLE_PIXELS = 4
VISIBLE_SHARE = 0.95
HELD_OUT_PERCENT = 10


@dataclass(frozen=True, kw_only=True)
class Sprites:
    """The sprites in use: per kind uint8 RGBA [n, 32, 32, 4] (alpha 0 or 255) and their n names.

    Names are the words of the captions. `background` is the RGB colour behind everything.
    """

    parts: dict[str, UInt8[np.ndarray, "n 32 32 4"]]
    names: dict[str, tuple[str, ...]]
    background: tuple[int, int, int]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of sprites of each kind, in the order of `KINDS`."""
        return tuple(len(self.names[kind]) for kind in KINDS)


def load_sprites(
    path: Path | None = None, heads: int | None = HEADS, accessories: int | None = ACCESSORIES
) -> Sprites:
    """The sprites in use: all bodies and glasses, the first `heads` and usable `accessories`.

    Args:
        path: an `image-data.json`; default `fetch_sprites()`.
        heads: number of heads (None: all 254).
        accessories: number of usable accessories (None: all).
    """
    data = json.loads(Path(path or fetch_sprites()).read_text())
    rgb = [tuple(bytes.fromhex(colour)) for colour in data["palette"][1:]]
    palette = np.array([(0, 0, 0, 0), *((*colour, 255) for colour in rgb)], np.uint8)
    keys = dict(zip(KINDS, ("bodies", "accessories", "heads", "glasses"), strict=True))
    images = {kind: data["images"][key] for kind, key in keys.items()}
    parts = {
        kind: np.stack([decode_rle(item["data"], palette) for item in items])
        for kind, items in images.items()
    }
    keep = {kind: np.arange(len(items)) for kind, items in images.items()}
    keep["accessory"] = np.flatnonzero(usable_accessories(parts))[:accessories]
    keep["head"] = keep["head"][:heads]
    red, green, blue = bytes.fromhex(data["bgcolors"][0])
    return Sprites(
        parts={kind: parts[kind][keep[kind]] for kind in KINDS},
        names={
            kind: tuple(_words(images[kind][i]["filename"]) for i in keep[kind]) for kind in KINDS
        },
        background=(red, green, blue),
    )


def _words(filename: str) -> str:
    """File name to caption words: "glasses-square-blue" -> "square blue"."""
    words = filename.split("-")[1:]
    return " ".join("text" if word == "txt" else word for word in words).lower()


def usable_accessories(parts: dict[str, UInt8[np.ndarray, "n 32 32 4"]]) -> Bool[np.ndarray, "n"]:
    """Which accessories can be identified and leave the body identifiable.

    Both the accessory and the body must show `MIN_VISIBLE_PIXELS` pixels under `VISIBLE_SHARE` of
    the heads. This drops 19 of 143: the empty one, a tiny one that heads hide, and 17 that repaint
    the whole body.
    """
    opaque = {kind: parts[kind][..., 3].reshape(len(parts[kind]), -1) > 0 for kind in KINDS}
    uncovered = ~(opaque["head"] | opaque["glasses"].any(0)).T  # pixels x heads
    accessory, body = opaque["accessory"], opaque["body"].all(0)
    seen = [mask.astype(np.float32) @ uncovered for mask in (accessory, body & ~accessory)]
    share = [(pixels >= MIN_VISIBLE_PIXELS).mean(axis=1) for pixels in seen]
    return (share[0] >= VISIBLE_SHARE) & (share[1] >= VISIBLE_SHARE)


def compose(sprites: Sprites, attrs: Int[np.ndarray, "b 4"]) -> UInt8[np.ndarray, "b 32 32 3"]:
    """Paint the nouns `attrs` describe: background, body, accessory, head, glasses."""
    background = np.array(sprites.background, np.uint8)
    return _paint(
        sprites, attrs, range(4), np.broadcast_to(background, (len(attrs), SIZE, SIZE, 3))
    )


def _paint(sprites: Sprites, attrs, layers: Sequence[int], canvas):
    for i in layers:
        sprite = sprites.parts[KINDS[i]][attrs[:, i]]
        canvas = np.where(sprite[..., 3:] > 0, sprite[..., :3], canvas)
    return canvas


def caption(sprites: Sprites, attrs: Int[np.ndarray, "b 4"]) -> list[str]:
    """One sentence per row: "a noun with a pizza head, square blue glasses, a red body and a clover
    accessory"."""
    names = [[sprites.names[kind][i] for kind, i in zip(KINDS, row, strict=True)] for row in attrs]
    return [
        f"a noun with {article(head)} head, {glasses} glasses, {article(body)} body"
        f" and {article(accessory)} accessory"
        for body, accessory, head, glasses in names
    ]


def article(name: str) -> str:
    """The name with "a" or "an" before it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def is_held_out(attrs: Int[np.ndarray, "b 4"]) -> Bool[np.ndarray, "b"]:
    """Whether a noun is in the 10 % never trained on: a fixed hash of its (head, accessory) pair.

    Hashing the pair rather than all four keeps those two from ever meeting in training, so the
    held-out score is a test of composition.
    """
    attrs = np.asarray(attrs)
    return held_out_pair(attrs[:, 2], attrs[:, 1])


def held_out_pair(
    first: Int[np.ndarray, "b"], second: Int[np.ndarray, "b"]
) -> Bool[np.ndarray, "b"]:
    """Whether a pair of attributes is in the 10 % held out: SplitMix64's mixer as a fixed hash."""
    z = np.asarray(first, np.uint64) * np.uint64(1 << 32) + np.asarray(second, np.uint64)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) % np.uint64(100) < HELD_OUT_PERCENT


def sample_attrs(
    rng: np.random.Generator, n: int, counts: Sequence[int], held_out: bool = False
) -> Int[np.ndarray, "n 4"]:
    """`n` random nouns of the training part of the split, or of the held-out part.

    Args:
        rng: numpy generator; the result depends on nothing else.
        n: how many.
        counts: number of sprites of each kind (`Sprites.counts`).
        held_out: which part.
    """
    return sample_part(rng, n, counts, is_held_out, held_out)


def sample_part(
    rng: np.random.Generator,
    n: int,
    counts: Sequence[int],
    is_held_out: Callable[[Int[np.ndarray, "b k"]], Bool[np.ndarray, "b"]],
    held_out: bool,
) -> Int[np.ndarray, "n k"]:
    """`n` random rows of attributes, `counts` values each, on one side of a split."""
    kept = np.zeros((0, len(counts)), np.int64)
    while len(kept) < n:
        drawn = rng.integers(0, counts, size=(2 * n + 64, len(counts)))
        kept = np.concatenate([kept, drawn[is_held_out(drawn) == held_out]])
    return kept[:n]


def score(
    sprites: Sprites, images: Num[np.ndarray, "b 32 32 3"], attrs: Int[np.ndarray, "b 4"]
) -> dict[str, Bool[np.ndarray, "b"]]:
    """Per kind, whether the asked-for sprite is the nearest of all candidates of that kind.

    Each target is recomposed with every candidate, its other three parts unchanged; "nearest" is by
    squared error over the picture. Candidates that give the very same picture count as right.

    Args:
        sprites: the candidates.
        images: pictures in [0, 255], any dtype.
        attrs: what they should show.
    """
    images = np.asarray(images, np.float64)
    target = compose(sprites, attrs).astype(np.float64)
    correct = {}
    for i, kind in enumerate(KINDS):
        errors = _relative_errors(sprites, images, attrs, i)
        same = _relative_errors(sprites, target, attrs, i)
        rows = np.arange(len(attrs)), attrs[:, i]
        same = same == same[rows][:, None]  # integers in float64: exact
        correct[kind] = np.where(same, np.inf, errors).min(1) > np.where(same, errors, np.inf).min(
            1
        )
    return correct


def margins(
    sprites: Sprites, images: Num[np.ndarray, "b 32 32 3"], attrs: Int[np.ndarray, "b 4"]
) -> dict[str, Float[np.ndarray, "b"]]:
    """Per kind, how clearly the asked-for sprite is the nearest of all: `score` by how much.

    The smallest, over the candidates w that give another picture than the target t, of
    (|x - w|^2 - |x - t|^2) / |w - t|^2: 1 in the exact picture, 0 halfway between t and some w,
    negative where another one is nearer.

    Args:
        sprites: the candidates.
        images: pictures in [0, 255], any dtype.
        attrs: what they should show.
    """
    images = np.asarray(images, np.float64)
    target = compose(sprites, attrs).astype(np.float64)
    rows = np.arange(len(attrs))
    found = {}
    for i, kind in enumerate(KINDS):
        errors, exact = (_relative_errors(sprites, x, attrs, i) for x in (images, target))
        ahead, most = (part - part[rows, attrs[:, i]][:, None] for part in (errors, exact))
        with np.errstate(divide="ignore", invalid="ignore"):
            found[kind] = np.where(most > 0, ahead / most, np.inf).min(axis=1)
    return found


def _relative_errors(sprites: Sprites, images, attrs, layer: int) -> Float[np.ndarray, "b n"]:
    """Squared error to the target with each candidate of `layer`, up to a constant per picture.

    At a pixel the layers above leave free, an opaque candidate trades |x - below|^2 for
    |x - colour|^2; summed over pixels that is three matrix products, with no recomposed picture in
    memory.
    """
    b = len(images)
    below = _paint(sprites, attrs, range(layer), np.full_like(images, sprites.background))
    free = np.ones((b, SIZE, SIZE, 1))
    for above in range(layer + 1, 4):
        free = free * (sprites.parts[KINDS[above]][attrs[:, above]][..., 3:] == 0)
    part = sprites.parts[KINDS[layer]].astype(np.float64)
    opaque = part[..., 3] > 0
    colour = part[..., :3] * opaque[..., None]
    gain = np.square(images).sum(-1) - np.square(images - below).sum(-1)
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    return (
        flat(free[..., 0] * gain) @ flat(opaque).T.astype(np.float64)
        - 2 * flat(free * images) @ flat(colour).T
        + flat(free[..., 0]) @ flat(np.square(colour).sum(-1)).T
    )


def psnr(
    images: Num[np.ndarray, "b 32 32 3"], target: Num[np.ndarray, "b 32 32 3"]
) -> Float[np.ndarray, "b"]:
    """Peak signal-to-noise ratio in dB of each picture; both in [0, 255]; inf for equal ones."""
    error = np.square(np.asarray(images, np.float64) - np.asarray(target, np.float64))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3)))


def to_latent(images: Float[np.ndarray, "b 32 32 3"]) -> Float[np.ndarray, "b 64 48"]:
    """Pictures in [-1, 1] to FLUX image tokens; a pixel shuffle stands in for the VAE.

    Pixel-unshuffle by 2 gives 12 latent channels [b, 12, 16, 16] (colour, row, column), which FLUX
    packs "b c (h 2) (w 2) -> b (h w) (c 2 2)". Works on numpy and jax arrays alike.
    """
    b, height, width, colours = images.shape
    h, w = height // 4, width // 4
    # row = (h, ph, r): token row, row inside FLUX's patch, row inside the pixel shuffle
    x = images.reshape(b, h, 2, 2, w, 2, 2, colours).transpose(0, 1, 4, 7, 3, 6, 2, 5)
    return x.reshape(b, h * w, colours * 16)


def from_latent(tokens: Float[np.ndarray, "b 64 48"]) -> Float[np.ndarray, "b 32 32 3"]:
    """Inverse of `to_latent`."""
    b, t, channels = tokens.shape
    h = w = round(t**0.5)
    x = tokens.reshape(b, h, w, channels // 16, 2, 2, 2, 2).transpose(0, 1, 6, 4, 2, 7, 5, 3)
    return x.reshape(b, 4 * h, 4 * w, channels // 16)
