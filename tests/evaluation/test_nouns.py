"""Nouns: sprites, captions, split, the exact judge, and the token layout."""

import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.evaluation import nouns, nouns_assets

COUNTS = (30, 124, 254, 23)


@pytest.fixture(scope="module")
def sprites():
    try:
        return nouns.load_sprites(heads=None, accessories=None)
    except RuntimeError as error:
        pytest.skip(f"the Nouns sprites cannot be fetched: {error}")


def test_counts_and_names(sprites):
    assert sprites.counts == COUNTS
    for kind in nouns.KINDS:
        assert len(set(sprites.names[kind])) == len(sprites.names[kind])
        assert sprites.parts[kind].shape == (len(sprites.names[kind]), 32, 32, 4)
    assert not {"none", "oldshirt", "small bling"} & set(sprites.names["accessory"])


def test_subset_is_a_prefix(sprites):
    assert nouns.load_sprites().counts == (30, nouns.ACCESSORIES, nouns.HEADS, 23)
    few = nouns.load_sprites(heads=7, accessories=5)
    assert few.counts == (30, 5, 7, 23)
    assert few.names["head"] == sprites.names["head"][:7]


def test_caption_uses_the_names(sprites):
    attrs = np.array(
        [
            [
                sprites.names[kind].index(name)
                for kind, name in zip(
                    nouns.KINDS, ("red", "clover", "aardvark", "square blue"), strict=True
                )
            ]
        ]
    )
    assert nouns.caption(sprites, attrs) == [
        "a noun with an aardvark head, square blue glasses, a red body and a clover accessory"
    ]


def test_compose_paints_in_order(sprites):
    attrs = nouns.sample_attrs(np.random.default_rng(0), 5, COUNTS)
    for image, row in zip(nouns.compose(sprites, attrs), attrs, strict=True):
        canvas = np.full((32, 32, 3), sprites.background, np.uint8)
        for kind, index in zip(nouns.KINDS, row, strict=True):
            sprite = sprites.parts[kind][index]
            visible = sprite[..., 3] == 255
            canvas[visible] = sprite[visible][:, :3]
        np.testing.assert_array_equal(image, canvas)


def test_score_is_perfect_on_targets_and_agrees_with_brute_force(sprites):
    rng = np.random.default_rng(1)
    attrs = nouns.sample_attrs(rng, 12, COUNTS)
    target = nouns.compose(sprites, attrs)
    assert all(found.all() for found in nouns.score(sprites, target, attrs).values())

    noisy = target + rng.normal(0, 160, target.shape)  # enough noise for some parts to be missed
    found = nouns.score(sprites, noisy, attrs)
    for layer, kind in enumerate(nouns.KINDS):
        for b in range(len(attrs)):
            candidates = np.repeat(attrs[b : b + 1], COUNTS[layer], axis=0)
            candidates[:, layer] = np.arange(COUNTS[layer])
            pictures = nouns.compose(sprites, candidates).astype(float)
            errors = np.square(pictures - noisy[b]).sum((1, 2, 3))
            best = pictures[errors.argmin()]
            assert found[kind][b] == (best == target[b]).all()
    assert not all(values.all() for values in found.values())


def test_score_finds_the_part_that_is_wrong(sprites):
    attrs = nouns.sample_attrs(np.random.default_rng(2), 64, COUNTS)
    wrong = attrs.copy()
    wrong[:, 2] = (wrong[:, 2] + 1) % COUNTS[2]
    found = nouns.score(sprites, nouns.compose(sprites, wrong), attrs)
    assert found["head"].mean() == 0
    assert found["glasses"].mean() == 1


def test_margins_are_brute_force_and_have_the_sign_of_the_score(sprites):
    rng = np.random.default_rng(5)
    attrs = nouns.sample_attrs(rng, 6, COUNTS)
    target = nouns.compose(sprites, attrs).astype(float)
    for found in nouns.margins(sprites, target, attrs).values():
        np.testing.assert_allclose(found, 1, rtol=1e-9)

    noisy = target + rng.normal(0, 160, target.shape)
    found, right = (f(sprites, noisy, attrs) for f in (nouns.margins, nouns.score))
    for layer, kind in enumerate(nouns.KINDS):
        np.testing.assert_array_equal(found[kind] > 0, right[kind])
        for b in range(len(attrs)):
            candidates = np.repeat(attrs[b : b + 1], COUNTS[layer], axis=0)
            candidates[:, layer] = np.arange(COUNTS[layer])
            wrong = nouns.compose(sprites, candidates).astype(float)
            apart = np.square(wrong - target[b]).sum((1, 2, 3))
            ahead = (
                np.square(wrong - noisy[b]).sum((1, 2, 3)) - np.square(target[b] - noisy[b]).sum()
            )
            least = (ahead[apart > 0] / apart[apart > 0]).min()
            assert found[kind][b] == pytest.approx(least, rel=1e-9, abs=1e-9)


def test_split_is_fixed_and_separates_pairs():
    rng = np.random.default_rng(3)
    attrs = rng.integers(0, COUNTS, size=(100_000, 4))
    held = nouns.is_held_out(attrs)
    assert abs(held.mean() - 0.10) < 0.01
    other = attrs.copy()
    other[:, [0, 3]] = rng.integers(0, (30, 23), size=(len(attrs), 2))
    np.testing.assert_array_equal(nouns.is_held_out(other), held)
    expected = [splitmix(int(head) << 32 | int(acc)) % 100 < 10 for _, acc, head, _ in attrs[:500]]
    assert held[:500].tolist() == expected


def splitmix(x: int) -> int:
    """SplitMix64's output function in Python integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("held_out", [False, True])
def test_samples_stay_on_their_side(held_out):
    draw = lambda: nouns.sample_attrs(np.random.default_rng(4), 300, COUNTS, held_out)  # noqa: E731
    attrs = draw()
    assert attrs.shape == (300, 4)
    assert (nouns.is_held_out(attrs) == held_out).all()
    np.testing.assert_array_equal(attrs, draw())


@pytest.mark.parametrize("xp", [np, jnp])
def test_latent_layout(xp):
    images = np.random.default_rng(5).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    tokens = nouns.to_latent(xp.asarray(images))
    assert tokens.shape == (2, 64, 48)
    np.testing.assert_array_equal(nouns.from_latent(tokens), images)
    # Token (h, w), channel (colour c, shuffle row r, column s, patch row p, column q).
    h, w, c, r, s, p, q = 3, 6, 2, 1, 0, 0, 1
    channel = (((c * 2 + r) * 2 + s) * 2 + p) * 2 + q
    assert tokens[1, h * 8 + w, channel] == images[1, 4 * h + 2 * p + r, 4 * w + 2 * q + s, c]


def test_decode_rle_by_hand():
    palette = np.arange(12, dtype=np.uint8).reshape(3, 4)
    # top 1, right 5, bottom 2, left 3: 2 x 2 pixels, colours 1 1 2 1.
    picture = nouns_assets.decode_rle("0x0001050203" + "0201" + "0102" + "0101", palette)
    expected = np.zeros((32, 32), int)
    expected[1:3, 3:5] = [[1, 1], [2, 1]]
    np.testing.assert_array_equal(picture, palette[expected])
    with pytest.raises(ValueError, match="sprite of 3 pixels for bounds 2x2"):
        nouns_assets.decode_rle("0x0001050203" + "0301", palette)


def test_psnr():
    target = np.zeros((2, 32, 32, 3))
    np.testing.assert_allclose(nouns.psnr(target + 25.5, target), 20.0)


def test_missing_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWBIT_NOUNS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("npm") is None
    with pytest.raises(RuntimeError, match="npm was not found; install npm, or point LOWBIT_NOUNS"):
        nouns.fetch_sprites(tmp_path)


def test_wrong_file_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "image-data.json"
    other.write_text("{}")
    monkeypatch.setenv("LOWBIT_NOUNS", str(other))
    with pytest.raises(ValueError, match=re.escape(f"{other}: sha256")):
        nouns.fetch_sprites()
