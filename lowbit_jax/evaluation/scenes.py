"""Scenes: a text-to-picture task with several things in a picture, and an exact judge.

The questions are GenEval's (Ghosh et al. 2023, arXiv 2310.11513): is the thing there, are both, are
there as many as asked for, in the right colours, in the right places. A picture of 32x32 has four
cells, two by two; a cell is empty or holds a thing, which is a noun of a head and a coloured body
(`lowbit_jax.evaluation.moving_nouns`) at half size: "a cat in red". A caption leaves free what it
does not say, as captions do: where the things are, or which row is meant by "to the left of". So no
single picture is the right one. The judge reads every cell, where GenEval has an object detector,
and compares what it has found with the caption.

Shape letters: b batch, n things. `attrs` [b, 6] holds whole numbers in the order of `ATTRIBUTES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

from lowbit_jax.evaluation import moving_nouns, nouns
from lowbit_jax.evaluation.nouns_assets import SIZE

CELLS, CELL = 4, SIZE // 2  # cells of a picture, row by row; the side of one in pixels

# kind: index into KINDS; heads and bodies: into `Things`; number: of copies, when counting.
# What a kind does not use is 0.
ATTRIBUTES = ("kind", "head", "body", "other head", "other body", "number")
KINDS = ("single", "two", "counting", "left of", "right of", "above", "below")
SINGLE, TWO, COUNTING, LEFT, RIGHT, ABOVE, BELOW = range(len(KINDS))
# Kinds come in turn, so that five captions in a row are one each of a single thing, two, several,
# beside and above or below.
TURN = (SINGLE, TWO, COUNTING, LEFT, ABOVE, SINGLE, TWO, COUNTING, RIGHT, BELOW)
GROUPS = {
    "single": [SINGLE],
    "two": [TWO],
    "counting": [COUNTING],
    "position": [LEFT, RIGHT, ABOVE, BELOW],
}
SCORES = ("right", "heads", "binding", "number", "place")
# GenEval's six tasks: the group of captions and the score that asks the same question.
CATEGORIES = {
    "single object": ("single", "heads"),
    "two objects": ("two", "heads"),
    "counting": ("counting", "right"),
    "colours": ("single", "binding"),
    "position": ("position", "place"),
    "attribute binding": ("two", "binding"),
}

NUMBERS = {2: "two", 3: "three", 4: "four"}
DRAWS = 1000  # before it is said that there is no such caption; a tenth is held out
PLURALS = {"blueberry": "blueberries", "cherry": "cherries", "fox": "foxes"}  # others: "s"
JOINTS = {TWO: "and", LEFT: "to the left of", RIGHT: "to the right of"}
JOINTS |= {ABOVE: "above", BELOW: "below"}
# Cells of the first and the second thing, either of which is as the caption says.
ROOMS = {
    LEFT: ((0, 1), (2, 3)),
    RIGHT: ((1, 0), (3, 2)),
    ABOVE: ((0, 2), (1, 3)),
    BELOW: ((2, 0), (3, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Things:
    """What a cell can show: uint8 pictures [n, 16, 16, 3], n = heads x bodies + 1, and the words.

    Picture `head * bodies + body` is that noun on the background; the last is an empty cell.
    """

    tiles: UInt8[np.ndarray, "n 16 16 3"]
    heads: tuple[str, ...]
    bodies: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of heads and of bodies."""
        return len(self.heads), len(self.bodies)

    @property
    def empty(self) -> int:
        """Index of the empty cell."""
        return len(self.tiles) - 1


def load_things(path: Path | None = None) -> Things:
    """The 24 heads and 8 body colours of the moving nouns; `path` as for `nouns.load_sprites`.

    All 193 pictures are distinct: two differ by 397 or more (root of the summed squares).
    """
    background = nouns.load_sprites(path).background
    return make_things(moving_nouns.load_scene(path), background)


def make_things(scene: moving_nouns.Scene, background: tuple[int, int, int]) -> Things:
    """Every body under every head, on the background, each 2x2 pixels averaged into one."""
    bodies, heads = scene.parts["body"], scene.parts["head"]
    counts = len(heads), len(bodies)
    canvas = np.broadcast_to(np.array(background, np.uint8), (*counts, SIZE, SIZE, 3))
    for sprite in (bodies[None], heads[:, None]):
        canvas = np.where(sprite[..., 3:] > 0, sprite[..., :3], canvas)
    blank = np.broadcast_to(np.array(background, np.uint8), (1, SIZE, SIZE, 3))
    full = np.concatenate([canvas.reshape(-1, SIZE, SIZE, 3), blank])
    small = full.reshape(-1, CELL, 2, CELL, 2, 3).mean(axis=(2, 4))
    names = scene.names
    return Things(tiles=small.round().astype(np.uint8), heads=names["head"], bodies=names["body"])


def caption(things: Things, attrs: Int[np.ndarray, "b 6"]) -> list[str]:
    """One phrase per row: "a cat in red", "two cats in red", "a cat in red and a dog in blue", "a
    cat in red to the left of a dog in blue", "to the right of", "above", "below"."""
    return [_phrase(things, *row) for row in np.asarray(attrs).tolist()]


def _phrase(things: Things, kind: int, head: int, body: int, other: int, dress: int, number: int):
    word, colour = things.heads[head], things.bodies[body]
    if kind == COUNTING:
        return f"{NUMBERS[number]} {PLURALS.get(word, word + 's')} in {colour}"
    first = f"{nouns.article(word)} in {colour}"
    if kind == SINGLE:
        return first
    return f"{first} {JOINTS[kind]} {nouns.article(things.heads[other])} in {things.bodies[dress]}"


def is_held_out(attrs: Int[np.ndarray, "b 6"]) -> Bool[np.ndarray, "b"]:
    """Whether a caption is in the tenth never trained on: a fixed hash of what it puts together.

    That is (head, body) of a single thing, (head, number) when counting, and for two things, in
    every relation and either order, the two heads: training never shows those together.
    """
    kind, head, body, other, _, number = np.asarray(attrs).T
    alone, counting = kind == SINGLE, kind == COUNTING
    first = np.where(alone | counting, head, np.minimum(head, other))
    second = np.where(alone, body, np.where(counting, number, np.maximum(head, other)))
    return nouns.held_out_pair(first, second)


def sample_attrs(
    rng: np.random.Generator, n: int, counts: tuple[int, int], held_out: bool = False
) -> Int[np.ndarray, "n 6"]:
    """`n` random captions of the training part of the split, or of the held-out part.

    Kinds come in the fixed turn of `TURN`; two things differ in head and body colour.

    Args:
        rng: numpy generator; the result depends on nothing else.
        n: how many.
        counts: `Things.counts`.
        held_out: which part.

    Raises:
        ValueError: with so few heads and bodies no caption of some kind is in that part.
    """
    kind = np.resize(TURN, n)
    attrs = _draw(rng, kind, counts)
    for _ in range(DRAWS):
        wrong = is_held_out(attrs) != held_out
        if not wrong.any():
            return attrs
        attrs[wrong] = _draw(rng, kind[wrong], counts)
    part = "held out" if held_out else "trained on"
    missing = ", ".join(KINDS[i] for i in sorted(set(kind[wrong])))
    raise ValueError(
        f"{counts[0]} heads and {counts[1]} bodies: in {DRAWS} draws no caption of these kinds is"
        f" {part}: {missing}; use more"
    )


def _draw(rng: np.random.Generator, kind, counts: tuple[int, int]) -> Int[np.ndarray, "n 6"]:
    first = rng.integers(0, counts, (len(kind), 2))
    second = (first + rng.integers(1, counts, (len(kind), 2))) % counts
    number = rng.integers(min(NUMBERS), max(NUMBERS) + 1, len(kind))
    pair = (kind != SINGLE) & (kind != COUNTING)
    return np.column_stack(
        [kind, first, second * pair[:, None], number * (kind == COUNTING)]
    ).astype(np.int64)


def wanted(things: Things, attrs: Int[np.ndarray, "b 6"]) -> Int[np.ndarray, "b 4"]:
    """The things asked for, in no cell yet: the first (every copy), the second, then empty ones."""
    kind, head, body, other, dress, number = np.asarray(attrs).T
    bodies = len(things.bodies)
    copies = np.where(kind == COUNTING, number, 1)[:, None]
    pair = (kind != SINGLE) & (kind != COUNTING)
    content = np.where(np.arange(CELLS) < copies, (head * bodies + body)[:, None], things.empty)
    content[pair, 1] = (other * bodies + dress)[pair]
    return content


def place(
    things: Things, attrs: Int[np.ndarray, "b 6"], rng: np.random.Generator
) -> Int[np.ndarray, "b 4"]:
    """What each cell holds, as indices into `Things.tiles`; what the captions leave free is random.

    Beside means in the same row, above and below in the same column. That is narrower than GenEval,
    which lets diagonal neighbours pass.
    """
    content, kind = wanted(things, attrs), np.asarray(attrs)[:, 0]
    cells = rng.permuted(content, axis=1)
    which = rng.integers(0, 2, len(kind))
    for relation, rooms in ROOMS.items():
        rows = np.flatnonzero(kind == relation)
        at = np.array(rooms)[which[rows]]
        cells[rows] = things.empty
        cells[rows[:, None], at] = content[rows, :2]
    return cells


def compose(things: Things, cells: Int[np.ndarray, "b 4"]) -> UInt8[np.ndarray, "b 32 32 3"]:
    """The pictures with these things in their cells."""
    tiles = things.tiles[cells].reshape(-1, 2, 2, CELL, CELL, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIZE, SIZE, 3)


def read(things: Things, pictures: Num[np.ndarray, "b 32 32 3"]) -> Int[np.ndarray, "b 4"]:
    """What each cell shows: the nearest of all things, by squared error. Pictures in [0, 255]."""
    x = np.asarray(pictures, np.float64).reshape(-1, 2, CELL, 2, CELL, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, CELLS, CELL * CELL * 3)
    tiles = things.tiles.reshape(len(things.tiles), -1).astype(np.float64)
    return (np.square(tiles).sum(axis=1) - 2 * x @ tiles.T).argmin(axis=-1)


def score(
    things: Things, pictures: Num[np.ndarray, "b 32 32 3"], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, Bool[np.ndarray, "b"]]:
    """Whether the pictures show what was asked for, by the name of the question (`SCORES`).

    * right: everything that was asked for, and nothing else;
    * heads: the right things in the right numbers, whatever the colours and the cells;
    * binding: and each in its colour, whatever the cells;
    * number: as many things as asked for, whatever they are;
    * place: the first head stands to the second as the caption says, whatever the colours and
      whatever else there is; of captions without a relation, the same as binding.

    Args:
        things: the candidates.
        pictures: in [0, 255], any dtype.
        attrs: what they should show.
    """
    attrs, content = np.asarray(attrs), wanted(things, attrs)
    found, bodies = read(things, pictures), len(things.bodies)
    ordered = lambda cells: np.sort(cells, axis=1)  # noqa: E731
    same = lambda a, b: (ordered(a) == ordered(b)).all(axis=1)  # noqa: E731
    occupied = lambda cells: (cells != things.empty).sum(axis=1)  # noqa: E731
    binding = same(found, content)
    place = binding.copy()
    heads = found // bodies  # an empty cell gives the number of heads
    for relation, rooms in ROOMS.items():
        rows = attrs[:, 0] == relation
        pairs = heads[rows][:, rooms]  # rows, either room, first and second
        place[rows] = (pairs == attrs[rows][:, None, [1, 3]]).all(axis=2).any(axis=1)
    return {
        "right": binding & place,
        "heads": same(heads, content // bodies),
        "binding": binding,
        "number": occupied(found) == occupied(content),
        "place": place,
    }


def by_group(
    right: Bool[np.ndarray, "b"], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, Bool[np.ndarray, "m"]]:
    """The answers to one question (a value of `score`) by kind of caption, see `GROUPS`."""
    kind = np.asarray(attrs)[:, 0]
    return {name: right[np.isin(kind, kinds)] for name, kinds in GROUPS.items()}


def categories(
    found: dict[str, Bool[np.ndarray, "b"]], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, float]:
    """The share of right answers in each of GenEval's six tasks, and their mean as "overall".

    Args:
        found: what `score` gives; every kind of caption must be there.
        attrs: what the pictures should show.
    """
    shares = {
        name: float(by_group(found[question], attrs)[group].mean())
        for name, (group, question) in CATEGORIES.items()
    }
    return shares | {"overall": float(np.mean(list(shares.values())))}


def clarity(things: Things, pictures: Num[np.ndarray, "b 32 32 3"]) -> Float[np.ndarray, "b"]:
    """PSNR in dB to the exact picture of what is read in it: how cleanly it is drawn."""
    return nouns.psnr(pictures, compose(things, read(things, pictures)))
