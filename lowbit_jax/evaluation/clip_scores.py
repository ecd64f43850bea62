"""Scores of generated clips of moving nouns: text, quality and time, each blind to the others.

A generated frame is first *followed*: of all whole-pixel shifts (wrapping around), the one that
brings the asked-for still picture nearest to it. Undoing the shifts gives steady frames, their mean
one picture. Then

* text is asked of the picture: for each part, is the asked-for candidate the nearest one?
* quality is the picture's distance to the exact one (and every frame's to the exact frame),
* time is asked of the shifts (is it where it should be, does it move as it should?) and of what
  still changes from one steady frame to the next (flicker).

So a clip that moves wrongly loses in time alone, one of another noun in text and quality, and
flicker of zero mean in flicker. Only the distance to the exact frames counts everything.
`margins` says by how much parts and motion are right, where `scores` says whether they are;
`motion_psnr` is time in one continuous number.

Shape letters: b batch, f frames, h and w rows and columns. Clips are in [0, 255], of any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from lowbit_jax.evaluation import moving_nouns
from lowbit_jax.evaluation.metrics import psnr
from lowbit_jax.evaluation.moving_nouns import DIRECTIONS, KINDS, PARTS, SPEEDS, Scene

BACKGROUND, DIRECTION, SPEED = map(KINDS.index, ("background", "direction", "speed"))


class Metric(NamedTuple):
    """What a score tells of ("text", "quality" or "time"), and whether more of it is better."""

    group: str
    higher_is_better: bool


METRICS = {
    **{part: Metric("text", True) for part in PARTS},
    "picture_psnr": Metric("quality", True),
    "frame_psnr": Metric("quality", True),
    "frame_error": Metric("quality", False),
    "direction": Metric("time", True),
    "speed": Metric("time", True),
    "position_error": Metric("time", False),
    "displacement_error": Metric("time", False),
    "flicker": Metric("time", False),
}


def scores(
    scene: Scene, clips: Num[np.ndarray, "b f h w 3"], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, Num[np.ndarray, "b"]]:
    """Every score of `METRICS`, one number per clip.

    | score | is |
    |---|---|
    | head, glasses, body, background | whether the asked-for one is the nearest (bool) |
    | picture_psnr | dB of the mean steady frame to the exact picture |
    | frame_psnr, frame_error | dB, and root mean square in levels, to the exact frames |
    | direction, speed | whether the nearest of all motions has the asked-for one (bool) |
    | position_error | pixels between the found and the exact place, mean of the frames |
    | displacement_error | pixels between found and exact steps from frame to frame, mean |
    | flicker | root mean square change of the steady frames from one to the next, in levels |

    Exact clips have inf dB and errors of 0. Places and steps are compared the short way around the
    edges. All in float64.

    Args:
        scene: the candidates.
        clips: what was generated.
        attrs: what was asked for.

    Raises:
        ValueError: clips of another size, of a single frame, or that are not finite.
    """
    clips = np.asarray(clips, np.float64)
    target = moving_nouns.still(scene, attrs).astype(np.float64)
    if clips.ndim != 5 or clips.shape[2:] != target.shape[1:] or clips.shape[1] < 2:
        raise ValueError(
            f"clips have shape {clips.shape}; {len(attrs)} captions need ({len(attrs)}, 2 or more, "
            f"{', '.join(map(str, target.shape[1:]))})"
        )
    if broken := np.flatnonzero(~np.isfinite(clips).all(axis=(1, 2, 3, 4))).tolist():
        raise ValueError(f"clips {broken} hold values that are not finite")
    exact = moving_nouns.clips(scene, attrs, clips.shape[1]).astype(np.float64)
    background, found = find(scene, clips, attrs)
    steady = moving_nouns.shift(clips, -found)
    picture = steady.mean(axis=1)
    seen = _with(attrs, BACKGROUND, background)
    return {
        **right_parts(scene, picture, seen),
        "background": background == attrs[:, BACKGROUND],
        "picture_psnr": psnr(picture / 255, target / 255),
        "frame_psnr": psnr(clips / 255, exact / 255),
        "frame_error": np.sqrt(_mean_square(clips - exact)),
        **right_motion(found, attrs),
        **_distances(found, attrs),
        "flicker": np.sqrt(_mean_square(np.diff(steady, axis=1))),
    }


def margins(
    scene: Scene, clips: Num[np.ndarray, "b f h w 3"], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, Float[np.ndarray, "b"]]:
    """How clearly each part, and the motion, is the asked-for one; continuous.

    The smallest, over the candidates w other than the asked-for t, of
    (|x - w|^2 - |x - t|^2) / |w - t|^2: 1 in the exact clip, 0 halfway between t and some w,
    negative where another one is nearer. Of head, glasses, body and background, x is the mean
    steady frame; the candidates are stills. Of "motion", x is the clip, and the candidates are its
    own mean steady frame in each of the 16 motions: what the picture shows does not matter.

    Args:
        scene: the candidates.
        clips: what was generated, in [0, 255].
        attrs: what was asked for.
    """
    clips = np.asarray(clips, np.float64)
    picture, background = _steady(scene, clips, attrs)
    seen = _with(attrs, BACKGROUND, background)
    out = {}
    for kind in PARTS:
        column, others = KINDS.index(kind), attrs if kind == "background" else seen
        values = range(len(scene.names[kind]))
        stills = [moving_nouns.still(scene, _with(others, column, v)) for v in values]
        out[kind] = _margin(picture, stills, attrs[:, column])
    still = np.broadcast_to(picture[:, None], clips.shape)
    moved = []
    for direction, speed in np.ndindex(len(DIRECTIONS), len(SPEEDS)):
        motion = _with(_with(attrs, DIRECTION, direction), SPEED, speed)
        moved.append(moving_nouns.shift(still, moving_nouns.track(motion, clips.shape[1])))
    asked = attrs[:, DIRECTION] * len(SPEEDS) + attrs[:, SPEED]
    return out | {"motion": _margin(clips, moved, asked)}


def motion_psnr(
    scene: Scene, clips: Num[np.ndarray, "b f h w 3"], attrs: Int[np.ndarray, "b 6"]
) -> Float[np.ndarray, "b"]:
    """dB of each clip to its own mean steady frame moving as asked; inf where it does exactly so.

    Wrong places and flicker count, what the picture shows does not: time in one number.

    Args:
        scene: the candidates.
        clips: what was generated, in [0, 255].
        attrs: what was asked for.
    """
    clips = np.asarray(clips, np.float64)
    picture, _ = _steady(scene, clips, attrs)
    still = np.broadcast_to(picture[:, None], clips.shape)
    moved = moving_nouns.shift(still, moving_nouns.track(attrs, clips.shape[1]))
    return psnr(clips / 255, moved / 255)


def _steady(
    scene: Scene, clips: Float[np.ndarray, "b f h w 3"], attrs: Int[np.ndarray, "b 6"]
) -> tuple[Float[np.ndarray, "b h w 3"], Int[np.ndarray, "b"]]:
    """The mean frame with the motion found undone, and the background found."""
    background, found = find(scene, clips, attrs)
    return moving_nouns.shift(clips, -found).mean(axis=1), background


def _margin(
    x: Float[np.ndarray, "b ..."],
    candidates: Sequence[Num[np.ndarray, "b ..."]],
    asked: Int[np.ndarray, "b"],
) -> Float[np.ndarray, "b"]:
    """See `margins`; a candidate that looks like the asked-for one does not count."""
    rows = np.arange(len(x))
    stacked = np.stack(candidates).astype(np.float64)
    target = stacked[asked, rows]
    errors = np.stack([_mean_square(x - w) for w in stacked], axis=1)
    apart = np.stack([_mean_square(target - w) for w in stacked], axis=1)
    ahead = errors - errors[rows, asked][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart > 0, ahead / apart, np.inf).min(axis=1)


def find(
    scene: Scene, clips: Float[np.ndarray, "b f h w 3"], attrs: Int[np.ndarray, "b 6"]
) -> tuple[Int[np.ndarray, "b"], Int[np.ndarray, "b f 2"]]:
    """The background of each clip, and where the noun is in each frame: rows and columns moved.

    Both at once, as either alone would be mistaken where the other is wrong: for each background,
    every frame is compared with the asked-for noun on it at every shift; the background with the
    least squared error over all frames, each at its best shift, is the clip's.
    """
    best = [
        follow(clips, moving_nouns.still(scene, _with(attrs, BACKGROUND, value)))
        for value in range(len(scene.names["background"]))
    ]
    errors = np.stack([error.sum(axis=1) for _, error in best], axis=1)
    background = errors.argmin(axis=1)
    shifts = np.stack([found for found, _ in best])
    return background, shifts[background, np.arange(len(clips))]


def follow(
    clips: Float[np.ndarray, "b f h w 3"], target: Num[np.ndarray, "b h w 3"]
) -> tuple[Int[np.ndarray, "b f 2"], Float[np.ndarray, "b f"]]:
    """The wrapping shift (rows, columns) of `target` nearest to each frame, and its squared error.

    |frame - shifted target|^2 = |frame|^2 - 2 correlation + |target|^2: all h x w shifts at once by
    a circular cross-correlation, an FFT.
    """
    axes, (height, width) = (2, 3), clips.shape[2:4]
    spectrum = np.fft.rfft2(clips, axes=axes)
    spectrum *= np.conj(np.fft.rfft2(target[:, None].astype(np.float64), axes=axes))
    correlation = np.fft.irfft2(spectrum.sum(axis=-1), (height, width), axes=axes)
    flat = correlation.reshape(*clips.shape[:2], -1)
    shifts = np.stack(np.unravel_index(flat.argmax(axis=-1), (height, width)), axis=-1)
    squares = np.square(clips).sum(axis=(2, 3, 4))
    target_squares = np.square(target.astype(np.float64)).sum(axis=(1, 2, 3))
    return shifts, squares - 2 * flat.max(axis=-1) + target_squares[:, None]


def right_parts(
    scene: Scene, pictures: Float[np.ndarray, "b h w 3"], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, Bool[np.ndarray, "b"]]:
    """Per part, whether the asked-for candidate gives the nearest picture, the others unchanged."""
    right = {}
    for kind in PARTS:
        column = KINDS.index(kind)
        candidates = range(len(scene.names[kind]))
        stills = (moving_nouns.still(scene, _with(attrs, column, value)) for value in candidates)
        errors = np.stack([_mean_square(pictures - still) for still in stills], axis=1)
        right[kind] = _is_least(errors, attrs[:, column])
    return right


def right_motion(
    found: Int[np.ndarray, "b f 2"], attrs: Int[np.ndarray, "b 6"]
) -> dict[str, Bool[np.ndarray, "b"]]:
    """Whether the motion nearest to the found steps has the asked-for direction, and speed.

    Ties count as wrong: a clip that stands still has no direction (and its speed is the slow one).
    """
    motions = np.indices((len(DIRECTIONS), len(SPEEDS))).reshape(2, -1).T
    every = np.concatenate([np.zeros((len(motions), 4), int), motions], axis=1)
    steps = np.diff(found, axis=1)[:, :, None]
    off = moving_nouns.short_way(steps - moving_nouns.velocity(every))
    errors = np.square(off).sum(axis=(1, 3)).reshape(-1, len(DIRECTIONS), len(SPEEDS))
    return {
        "direction": _is_least(errors.min(axis=2), attrs[:, DIRECTION]),
        "speed": _is_least(errors.min(axis=1), attrs[:, SPEED]),
    }


def _distances(found, attrs) -> dict[str, Float[np.ndarray, "b"]]:
    off = found - moving_nouns.track(attrs, found.shape[1])
    parts = {"position_error": off, "displacement_error": np.diff(off, axis=1)}
    return {
        name: np.linalg.norm(moving_nouns.short_way(part), axis=-1).mean(axis=1)
        for name, part in parts.items()
    }


def _is_least(errors, asked: Int[np.ndarray, "b"]) -> Bool[np.ndarray, "b"]:
    rows = np.arange(len(errors))
    others = errors.astype(np.float64)
    others[rows, asked] = np.inf
    return errors[rows, asked] < others.min(axis=1)


def _with(attrs: Int[np.ndarray, "b 6"], column: int, value) -> Int[np.ndarray, "b 6"]:
    changed = attrs.copy()
    changed[:, column] = value
    return changed


def _mean_square(x: Float[np.ndarray, "b ..."]) -> Float[np.ndarray, "b"]:
    return np.square(x).reshape(len(x), -1).mean(axis=1)
