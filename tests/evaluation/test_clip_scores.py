"""Scores of clips: each fault is seen by the scores that are of it, and by no others."""

import numpy as np
import pytest

from lowbit_jax.evaluation import clip_scores, moving_nouns
from lowbit_jax.evaluation.clip_scores import METRICS, margins, motion_psnr, scores
from lowbit_jax.evaluation.moving_nouns import KINDS
from tests.references.scenes import made_up_scene

# of exact clips
PERFECT = {
    **dict.fromkeys(("head", "glasses", "body", "background", "direction", "speed"), True),
    **dict.fromkeys(("frame_error", "position_error", "displacement_error", "flicker"), 0.0),
    **dict.fromkeys(("picture_psnr", "frame_psnr"), np.inf),
}


@pytest.fixture(scope="module")
def scene():
    return made_up_scene()


@pytest.fixture(scope="module")
def attrs(scene):
    return moving_nouns.sample_attrs(np.random.default_rng(0), 24, scene)


def changed(scene, attrs, kind):
    """The attributes with another value of one kind."""
    column, rng = KINDS.index(kind), np.random.default_rng(1)
    other = attrs.copy()
    other[:, column] += rng.integers(1, scene.counts[column], len(attrs))
    other[:, column] %= scene.counts[column]
    return other


def assert_only(found, seen):
    """All scores but those in `seen` are perfect, and those are not, for any clip."""
    for name, values in found.items():
        right = values == PERFECT[name]
        assert (~right if name in seen else right).all(), name


def test_exact_clips_are_perfect(scene, attrs):
    found = scores(scene, moving_nouns.clips(scene, attrs), attrs)
    assert set(found) == set(METRICS)
    assert all(values.shape == (24,) for values in found.values())
    assert_only(found, ())


@pytest.mark.parametrize("kind", ["head", "glasses", "body", "background"])
def test_another_part_is_a_matter_of_text_and_quality(scene, attrs, kind):
    clips = moving_nouns.clips(scene, changed(scene, attrs, kind))
    found = scores(scene, clips, attrs)
    assert_only(found, (kind, "picture_psnr", "frame_psnr", "frame_error"))


@pytest.mark.parametrize("kind", ["direction", "speed"])
def test_another_motion_is_a_matter_of_time(scene, attrs, kind):
    clips = moving_nouns.clips(scene, changed(scene, attrs, kind))
    found = scores(scene, clips, attrs)
    exact = ("frame_psnr", "frame_error")  # these see everything
    assert_only(found, (kind, "position_error", "displacement_error", *exact))


def test_errors_in_pixels_by_hand(scene):
    attrs = np.array([[0, 0, 0, 0, 0, 1]])  # left quickly: 8 pixels
    slow = moving_nouns.clips(scene, np.array([[0, 0, 0, 0, 0, 0]]))
    found = scores(scene, slow, attrs)
    # 4 t pixels behind, the short way around 32 pixels
    np.testing.assert_allclose(found["position_error"], np.mean([0, 4, 8, 12, 16, 12, 8, 4]))
    np.testing.assert_allclose(found["displacement_error"], 4)
    late = np.roll(moving_nouns.clips(scene, attrs), (3, 4), axis=(2, 3))
    found = scores(scene, late, attrs)
    np.testing.assert_allclose(found["position_error"], 5)
    np.testing.assert_allclose(found["displacement_error"], 0)
    assert found["direction"].all() and found["speed"].all()


def test_frozen_clips_lose_in_time(scene, attrs):
    clips = moving_nouns.clips(scene, attrs)
    frozen = np.repeat(clips[:, :1], clips.shape[1], axis=1)
    found = scores(scene, frozen, attrs)
    assert not found["direction"].any()
    speed = np.linalg.norm(moving_nouns.velocity(attrs), axis=-1)
    np.testing.assert_allclose(found["displacement_error"], speed)
    found.pop("speed")  # nearer to slow than to quick
    exact = ("frame_psnr", "frame_error")
    assert_only(found, ("direction", "position_error", "displacement_error", *exact))


def test_flicker_is_seen_by_flicker(scene, attrs):
    clips = moving_nouns.clips(scene, attrs).astype(float)
    signs = np.where(np.arange(8) % 2, 5.0, -5.0)[:, None, None, None]
    found = scores(scene, clips + signs, attrs)
    np.testing.assert_allclose(found["flicker"], 10)
    np.testing.assert_allclose(found["frame_error"], 5)
    assert (found["picture_psnr"] > 200).all()  # exact but for rounding
    found.pop("picture_psnr")
    assert_only(found, ("flicker", "frame_psnr", "frame_error"))


def test_a_dull_picture_is_seen_by_quality(scene, attrs):
    clips = moving_nouns.clips(scene, attrs)
    found = scores(scene, clips * 0.9 + 12, attrs)
    assert_only(found, ("picture_psnr", "frame_psnr", "frame_error"))
    np.testing.assert_allclose(found["picture_psnr"], found["frame_psnr"])
    error = np.square(clips * 0.1 - 12).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(found["frame_psnr"], 10 * np.log10(255**2 / error))


def test_noise_leaves_text_and_time(scene, attrs):
    clips = moving_nouns.clips(scene, attrs)
    noisy = clips + np.random.default_rng(2).normal(0, 25, clips.shape)
    found = scores(scene, noisy, attrs)
    for name in ("flicker", "picture_psnr", "frame_psnr", "frame_error"):
        found.pop(name)
    assert_only(found, ())


def test_follow_is_a_search_over_every_shift():
    rng = np.random.default_rng(3)
    clips = rng.uniform(0, 255, (2, 3, 7, 6, 3))
    target = rng.uniform(0, 255, (2, 7, 6, 3))
    shifts, errors = clip_scores.follow(clips, target)
    for b, f in np.ndindex(2, 3):
        every = {
            by: np.square(np.roll(target[b], by, axis=(0, 1)) - clips[b, f]).sum()
            for by in np.ndindex(7, 6)
        }
        assert tuple(shifts[b, f]) == min(every, key=every.get)
        np.testing.assert_allclose(errors[b, f], min(every.values()))


def test_scores_are_of_each_clip_alone(scene, attrs):
    clips = moving_nouns.clips(scene, attrs) + np.random.default_rng(4).normal(
        0, 90, (24, 8, 1, 1, 1)
    )
    together = scores(scene, clips, attrs)
    for i in (0, 23):
        alone = scores(scene, clips[i : i + 1], attrs[i : i + 1])
        for name, values in alone.items():
            np.testing.assert_allclose(values[0], together[name][i], err_msg=name)


def test_what_cannot_be_judged_is_refused(scene, attrs):
    clips = moving_nouns.clips(scene, attrs).astype(float)
    with pytest.raises(ValueError, match=r"\(24, 8, 16, 32, 3\).*24 captions"):
        scores(scene, clips[:, :, :16], attrs)
    with pytest.raises(ValueError, match="2 or more"):
        scores(scene, clips[:, :1], attrs)
    clips[3, 0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"clips \[3\]"):
        scores(scene, clips, attrs)


def test_margins_by_hand(scene, attrs):
    clips = moving_nouns.clips(scene, attrs).astype(float)
    found = margins(scene, clips, attrs)
    assert set(found) == {"head", "glasses", "body", "background", "motion"}
    for values in found.values():
        np.testing.assert_allclose(values, 1)
    # of two clips in one, a quarter of the way: 1 - 2/4 where the other is the nearest candidate
    two = attrs.copy()
    two[:, KINDS.index("body")] += 1
    two[:, KINDS.index("body")] %= scene.counts[KINDS.index("body")]
    mixed = 0.75 * clips + 0.25 * moving_nouns.clips(scene, two)
    found = margins(scene, mixed, attrs)
    assert (found["body"] < 0.5 + 1e-9).all()
    np.testing.assert_allclose(found["motion"], 1)
    for values in (found["head"], found["background"]):
        assert (values > 0.9).all()  # hidden or not, the body is another part


@pytest.mark.parametrize("kind", ["head", "glasses", "body", "background", "direction", "speed"])
def test_margins_are_negative_where_another_one_is_right(scene, attrs, kind):
    clips = moving_nouns.clips(scene, changed(scene, attrs, kind))
    found = margins(scene, clips, attrs)
    seen = "motion" if kind in ("direction", "speed") else kind
    # there is the candidate that the clip is: it is nearer by all that parts the two
    np.testing.assert_array_less(found[seen], -0.999)
    if seen != "motion":
        np.testing.assert_allclose(found["motion"], 1)
    else:
        for part in moving_nouns.PARTS:
            np.testing.assert_allclose(found[part], 1)


def test_margins_tell_right_from_wrong_as_scores_do(scene, attrs):
    noise = np.random.default_rng(5).normal(0, 2000, (24, 8, 32, 32, 3))
    clips = moving_nouns.clips(scene, attrs) + noise
    right, found = scores(scene, clips, attrs), margins(scene, clips, attrs)
    assert 0.1 < np.mean([right[part] for part in moving_nouns.PARTS]) < 0.95
    for part in moving_nouns.PARTS:
        np.testing.assert_array_equal(found[part] > 0, right[part])


def test_motion_in_db_is_blind_to_what_is_shown(scene, attrs):
    clips = moving_nouns.clips(scene, attrs).astype(float)
    assert (motion_psnr(scene, clips, attrs) == np.inf).all()
    other = moving_nouns.clips(scene, changed(scene, attrs, "head"))
    assert (motion_psnr(scene, other, attrs) == np.inf).all()
    signs = np.where(np.arange(8) % 2, 5.0, -5.0)[:, None, None, None]
    flicker = motion_psnr(scene, clips + signs, attrs)
    np.testing.assert_allclose(flicker, 20 * np.log10(255 / 5))
    wrong = moving_nouns.clips(scene, changed(scene, attrs, "direction"))
    first = moving_nouns.clips(scene, attrs)
    error = np.square(wrong.astype(float) - first).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(motion_psnr(scene, wrong, attrs), 10 * np.log10(255**2 / error))
