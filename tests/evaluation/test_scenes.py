"""Scenes: things, captions, split, placement, and the judge against one written out in loops."""

from collections import Counter

import numpy as np
import pytest

from lowbit_jax.evaluation import nouns, scenes
from lowbit_jax.evaluation.scenes import ABOVE, BELOW, COUNTING, LEFT, RIGHT, SINGLE, TWO
from tests.references.scenes import made_up_scene

COUNTS = (24, 8)
BACKGROUND = (10, 200, 120)


@pytest.fixture(scope="module")
def things():
    """Four heads and three bodies; no download."""
    return scenes.make_things(made_up_scene(), BACKGROUND)


@pytest.fixture(scope="module")
def attrs(things):
    drawn = scenes.sample_attrs(np.random.default_rng(0), 200, things.counts)
    assert set(drawn[:, 0]) == set(range(7))
    return drawn


def test_real_things_are_far_apart():
    try:
        things = scenes.load_things()
    except RuntimeError as error:
        pytest.skip(f"the Nouns sprites cannot be fetched: {error}")
    assert things.counts == COUNTS and len(things.tiles) == 193
    flat = things.tiles.reshape(193, -1).astype(float)
    apart = np.sqrt(np.square(flat[:, None] - flat).sum(axis=-1))
    assert 397 < apart[~np.eye(193, dtype=bool)].min() < 398  # as `load_things` says


def test_a_thing_is_a_noun_at_half_size(things):
    scene = made_up_scene()
    for head in range(4):
        for body in range(3):
            canvas = np.full((32, 32, 3), BACKGROUND, float)
            for sprite in (scene.parts["body"][body], scene.parts["head"][head]):
                visible = sprite[..., 3] == 255
                canvas[visible] = sprite[visible][:, :3]
            for y in range(0, 16, 5):
                for x in range(16):
                    mean = canvas[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(axis=(0, 1))
                    assert np.abs(things.tiles[head * 3 + body, y, x] - mean).max() <= 0.5
    assert (things.tiles[things.empty] == BACKGROUND).all()


def test_captions(things):
    rows = {
        "an acorn in red": (SINGLE, 0, 0, 0, 0, 0),
        "a cat in red and a dog in blue": (TWO, 2, 0, 3, 2, 0),
        "three boxs in green": (COUNTING, 1, 1, 0, 0, 3),
        "a cat in red to the left of a dog in blue": (LEFT, 2, 0, 3, 2, 0),
        "a cat in red to the right of a dog in blue": (RIGHT, 2, 0, 3, 2, 0),
        "a cat in red above a dog in blue": (ABOVE, 2, 0, 3, 2, 0),
        "a cat in red below an acorn in blue": (BELOW, 2, 0, 0, 2, 0),
    }
    assert scenes.caption(things, np.array(list(rows.values()))) == list(rows)
    drawn = scenes.sample_attrs(np.random.default_rng(1), 3000, things.counts)
    assert len(set(scenes.caption(things, drawn))) == len(np.unique(drawn, axis=0))


def test_samples_are_well_formed_and_balanced():
    drawn = scenes.sample_attrs(np.random.default_rng(2), 5000, COUNTS)
    assert Counter(drawn[:, 0]) == dict.fromkeys(range(3), 1000) | dict.fromkeys(range(3, 7), 500)
    for start in range(0, 50, 5):  # any run of five
        kinds = set(drawn[start : start + 5, 0])
        assert {SINGLE, TWO, COUNTING} < kinds and kinds & {LEFT, RIGHT} and kinds & {ABOVE, BELOW}
    for kind, head, body, other, dress, number in drawn:
        assert 0 <= head < 24 and 0 <= body < 8
        if kind in (SINGLE, COUNTING):
            assert other == dress == 0
        else:
            assert other != head and dress != body and 0 <= other < 24 and 0 <= dress < 8
        assert number in ((2, 3, 4) if kind == COUNTING else (0,))
    seen = [len(set(map(tuple, drawn[:, columns]))) for columns in ([1, 2], [3, 4])]
    assert seen == [192, 192]


def test_split():
    """By the fixed hash, of what a caption puts together; order and colours do not matter."""
    for side in (False, True):
        drawn = scenes.sample_attrs(np.random.default_rng(3), 1000, COUNTS, held_out=side)
        for kind, head, body, other, _, number in drawn:
            pair = {SINGLE: (head, body), COUNTING: (head, number)}
            first, second = pair.get(kind, (min(head, other), max(head, other)))
            assert nouns.held_out_pair(np.array([first]), np.array([second]))[0] == side
    possible = scenes._draw(np.random.default_rng(4), np.resize(scenes.TURN, 50_000), COUNTS)
    for kinds in scenes.GROUPS.values():
        share = scenes.is_held_out(possible[np.isin(possible[:, 0], kinds)]).mean()
        assert abs(share - 0.1) < 0.04  # 192, 276, 72 and 276 pairs


def test_too_few_things_for_a_held_out_part():
    with pytest.raises(ValueError, match="4 heads and 3 bodies: .* kinds is held out: .*two"):
        scenes.sample_attrs(np.random.default_rng(0), 10, (4, 3), held_out=True)


def test_placement_is_what_the_caption_says_and_free_otherwise(things, attrs):
    rng = np.random.default_rng(5)
    seen = {kind: set() for kind in range(7)}
    for _ in range(20):
        cells = scenes.place(things, attrs, rng)
        for row, content in zip(attrs, cells.tolist(), strict=True):
            assert Counter(content) == wanted_by_hand(things, row)
            assert row[0] < LEFT or relation_by_hand(things, row, content)
            first = row[1] * 3 + row[2]
            used = tuple(0 if c == things.empty else 1 if c == first else 2 for c in content)
            seen[row[0]].add(used)
    assert [len(seen[kind]) for kind in range(7)] == [4, 12, 6 + 4 + 1, 2, 2, 2, 2]
    again = [scenes.place(things, attrs, np.random.default_rng(6)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_pictures_and_reading(things):
    cells = np.array([[0, things.empty, 5, 11]])
    picture = scenes.compose(things, cells)[0]
    for index, (y, x) in zip(cells[0], ((0, 0), (0, 16), (16, 0), (16, 16)), strict=True):
        np.testing.assert_array_equal(picture[y : y + 16, x : x + 16], things.tiles[index])
    cells = np.random.default_rng(7).integers(0, things.empty + 1, (50, 4))
    pictures = scenes.compose(things, cells).astype(float)
    np.testing.assert_array_equal(scenes.read(things, pictures), cells)
    assert (scenes.clarity(things, pictures) == np.inf).all()
    np.testing.assert_allclose(scenes.clarity(things, pictures + 2.55), 40)
    noisy = pictures + np.random.default_rng(8).normal(0, 300, pictures.shape)
    found = scenes.read(things, noisy)
    assert 0.05 < (found != cells).mean() < 0.95
    for picture, row in zip(noisy, found, strict=True):
        np.testing.assert_array_equal(read_by_hand(things, picture), row)


def read_by_hand(things, picture):
    cells = []
    for y in (0, 16):
        for x in (0, 16):
            part = picture[y : y + 16, x : x + 16]
            errors = [np.square(part - tile.astype(float)).sum() for tile in things.tiles]
            cells.append(int(np.argmin(errors)))
    return cells


def wanted_by_hand(things, row):
    kind, head, body, other, dress, number = row
    asked = [head * 3 + body] * (number if kind == COUNTING else 1)
    asked += [other * 3 + dress] if kind not in (SINGLE, COUNTING) else []
    return Counter(asked + [things.empty] * (4 - len(asked)))


def relation_by_hand(things, row, content):
    """Some cell with the first head and some with the second stand as asked for."""
    kind, head, _, other, _, _ = row
    step = {LEFT: (0, 1), RIGHT: (0, -1), ABOVE: (1, 0), BELOW: (-1, 0)}[kind]
    at = [(i // 2, i % 2) for i in range(4)]
    full = [(*place, c // 3) for place, c in zip(at, content, strict=True) if c != things.empty]
    return any(
        h == head and g == other and (v - y, u - x) == step for y, x, h in full for v, u, g in full
    )


def score_by_hand(things, row, picture):
    content = read_by_hand(things, picture)
    asked, full = wanted_by_hand(things, row), lambda cells: [c for c in cells if c != things.empty]
    heads = lambda cells: Counter(c // 3 for c in full(cells))  # noqa: E731
    binding = Counter(content) == asked
    place = binding if row[0] < LEFT else relation_by_hand(things, row, content)
    return {
        "right": binding and place,
        "heads": heads(content) == heads(asked.elements()),
        "binding": binding,
        "number": len(full(content)) == len(full(asked.elements())),
        "place": place,
    }


def test_score_is_the_loop_written_out(things, attrs):
    """Pictures of every degree of wrongness: other captions' cells, one cell changed, noise."""
    rng = np.random.default_rng(9)
    for trial in range(6):
        cells = scenes.place(things, attrs, rng)
        rows = rng.random(len(cells)) < 0.7
        cells[rows, rng.integers(0, 4, rows.sum())] = rng.integers(0, 13, rows.sum())
        cells = rng.permuted(cells, axis=1) if trial % 2 else cells
        pictures = scenes.compose(things, cells) + rng.normal(
            0, 60 * trial, (len(cells), 32, 32, 3)
        )
        found = scenes.score(things, pictures, attrs)
        assert tuple(found) == scenes.SCORES
        for i, row in enumerate(attrs):
            by_hand = score_by_hand(things, row, pictures[i])
            assert {name: values[i] for name, values in found.items()} == by_hand
        for values in found.values():
            assert 0 < values.mean() < 1


def change_colour(things, cells, attrs):
    cells[cells != things.empty] = recolour(cells[cells != things.empty])


def recolour(index):
    return index // 3 * 3 + (index + 1) % 3


def swap_colours(things, cells, attrs):
    """Each of two heads in the other's colour: the mistake attribute binding asks about."""
    first, second = (attrs[:, at] * 3 + attrs[:, at + 1] for at in (1, 3))
    mixed = attrs[:, 1] * 3 + attrs[:, 4], attrs[:, 3] * 3 + attrs[:, 2]
    pairs = zip((first, second), mixed, strict=True)
    masks = [(cells == old[:, None], new) for old, new in pairs]
    for mask, new in masks:
        cells[mask] = np.broadcast_to(new[:, None], cells.shape)[mask]


def exchange(things, cells, attrs):
    """The two things in each other's cells."""
    cells[:] = cells[:, ::-1]


def one_more(things, cells, attrs):
    rows = np.flatnonzero((cells == things.empty).any(axis=1))
    assert len(rows) == len(cells)
    at = (cells == things.empty).argmax(axis=1)
    cells[rows, at] = attrs[:, 1] * 3 + attrs[:, 2]


def one_less(things, cells, attrs):
    at = (cells != things.empty).argmax(axis=1)
    cells[np.arange(len(cells)), at] = things.empty


def other_head(things, cells, attrs):
    full = cells != things.empty
    cells[full] = (cells[full] + 3) % 12


ALL, NONE = set(scenes.SCORES), set()
POSITION = {"number", "heads", "binding"}


@pytest.mark.parametrize(
    ("change", "kinds", "kept"),
    [
        (lambda *_: None, range(7), ALL),
        (exchange, [SINGLE, TWO, COUNTING], ALL),
        (exchange, [LEFT, RIGHT, ABOVE, BELOW], POSITION),
        (change_colour, [SINGLE, TWO, COUNTING], {"number", "heads"}),
        (change_colour, [LEFT, RIGHT, ABOVE, BELOW], {"number", "heads", "place"}),
        (swap_colours, [TWO], {"number", "heads"}),
        (swap_colours, [LEFT, RIGHT, ABOVE, BELOW], {"number", "heads", "place"}),
        (one_more, [SINGLE, TWO], NONE),
        (one_more, [LEFT, RIGHT, ABOVE, BELOW], {"place"}),
        (one_less, range(7), NONE),
        (other_head, range(7), {"number"}),
    ],
)
def test_a_mistake_costs_what_it_should(things, attrs, change, kinds, kept):
    rows = attrs[np.isin(attrs[:, 0], kinds)]
    cells = scenes.place(things, rows, np.random.default_rng(10))
    change(things, cells, rows)
    found = scenes.score(things, scenes.compose(things, cells), rows)
    assert {name: set(values) for name, values in found.items()} == {
        name: {name in kept} for name in scenes.SCORES
    }


def test_noise_is_wrong(things, attrs):
    noise = np.random.default_rng(11).uniform(0, 255, (len(attrs), 32, 32, 3))
    assert scenes.score(things, noise, attrs)["right"].mean() < 0.1


def test_categories_are_geneval_s(things, attrs):
    """Wrong colours leave single object, two objects and position; a wrong cell only position."""
    cells = scenes.place(things, attrs, np.random.default_rng(12))
    shares = lambda: scenes.categories(  # noqa: E731
        scenes.score(things, scenes.compose(things, cells), attrs), attrs
    )
    assert set(shares().values()) == {1.0} and len(shares()) == 7
    exchange(things, cells, attrs)
    expected = dict.fromkeys(scenes.CATEGORIES, 1.0) | {"position": 0.0}
    assert shares() == expected | {"overall": pytest.approx(5 / 6)}
    exchange(things, cells, attrs)
    change_colour(things, cells, attrs)
    expected |= {"counting": 0.0, "colours": 0.0, "position": 1.0, "attribute binding": 0.0}
    assert shares() == expected | {"overall": 0.5}
    answers = scenes.by_group(np.arange(len(attrs)), attrs)
    kinds = {name: set(attrs[rows, 0]) for name, rows in answers.items()}
    assert kinds == {"single": {0}, "two": {1}, "counting": {2}, "position": {3, 4, 5, 6}}
