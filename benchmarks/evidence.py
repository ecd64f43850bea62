"""What evidence is made of: a model with an exact judge, and what one way of quantising does to it.

A `Subject` is a trained model with held-out captions, fixed noise and a judge. A `Bench` samples it
with quantised parameters and keeps, per caption, everything that is asked later: exact scores,
PSNR, SSIM and LPIPS to the float model's pictures at equal noise, and features.
Results are kept in files, so that a run that was cut goes on where it was.

Shape letters: b captions, f frames, y and x pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from convert.efficientnet import load_efficientnet
from lowbit_jax.calibration.statistics import Statistics
from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.evaluation import metrics
from lowbit_jax.evaluation.efficientnet import features, resize
from lowbit_jax.evaluation.metrics import Interval
from lowbit_jax.quant.qtensor import QTensor, is_qtensor
from lowbit_jax.quant.recipe import Recipe
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.transform import quantize

SIDE = 96  # pixels that the networks of FD and LPIPS see: sprites have no more in them
BATCH = 64  # pictures that they see at a time
MEASURES = ("psnr", "ssim", "lpips")  # against the float model's pictures
SHOWN = 10  # pictures or clips that are kept for the eye


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model and how it is judged.

    Attributes:
        name: what tables call it.
        params: float parameters.
        sample: parameters to pictures [b, y, x, 3] or clips [b, f, y, x, 3] in [0, 1], of the same
            captions and from the same noise every time.
        judge: of pictures, exact scores by name, one number per caption.
        accuracies: names of those scores that are right or wrong; their mean is "the score".
        calibrate: statistics of activations, on captions of the training part.
        settings: whatever else the results depend on, as JSON.
        categories: of what is right (the scores of an outcome, as booleans), shares by category.
    """

    name: str
    params: Any
    sample: Callable[[Any], Float[np.ndarray, "b ..."]]
    judge: Callable[[Float[np.ndarray, "b ..."]], Mapping[str, np.ndarray]]
    accuracies: tuple[str, ...]
    calibrate: Callable[[], Statistics]
    settings: Mapping[str, Any]
    categories: Callable[[dict[str, np.ndarray]], Mapping[str, float]] = lambda found: {}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way of quantising one model.

    Attributes:
        values: per caption: exact scores, "score" (mean of the accuracies), "psnr", "ssim",
            "lpips" against the float model; the float model's own are inf, 1 and 0.
        pooled: features of the pictures, for distances of sets; of clips, of each frame.
        shown: the first pictures, uint8.
        bits: mean stored bits of a parameter, scales, masks and what stays in float included.
        bytes: stored.
        seconds: to quantise and to sample.
    """

    values: dict[str, np.ndarray]
    pooled: np.ndarray
    shown: np.ndarray
    bits: float
    bytes: int
    seconds: float

    def interval(self, name: str) -> Interval:
        """Mean over captions, with its 95 % bootstrap interval."""
        return metrics.mean_interval(self.values[name])

    def distance(self, reference: Outcome) -> float:
        """Fréchet distance of the features to those of the reference's pictures."""
        return metrics.frechet(self.pooled, reference.pooled)


@dataclass(frozen=True)
class Bench:
    """Measures one subject, with a folder of results.

    Attributes:
        subject: what is measured.
        folder: where results are kept, a file each.
    """

    subject: Subject
    folder: Path

    @cached_property
    def statistics(self) -> Statistics:
        """Of the float model's activations; collected when first needed."""
        return self.subject.calibrate()

    @cached_property
    def reference(self) -> tuple[np.ndarray, Outcome]:
        """The float model's pictures and its own outcome."""
        start = time.perf_counter()
        pictures = self.subject.sample(self.subject.params)
        return pictures, self._outcome(self.subject.params, pictures, pictures, start)

    def recipe(self, recipe: Recipe) -> Outcome:
        """What a recipe does; quantises, samples and keeps the result, or finds it."""
        return self.params(recipe.name, recipe.to_json(), lambda: self.quantized(recipe))

    def quantized(self, recipe: Recipe) -> Any:
        """The subject's parameters under a recipe."""
        statistics = self.statistics if recipe.needs_statistics else None
        return jax.jit(lambda params: quantize(params, recipe, statistics))(self.subject.params)

    def params(self, name: str, what: Any, make: Callable[[], Any]) -> Outcome:
        """What parameters do that `make` gives; `what` says, as JSON, what they are."""
        digest = _digest([what, self.subject.name, dict(self.subject.settings), MEASURES])
        path = self.folder / self.subject.name / f"{name}.npz"
        if path.is_file() and (found := _load(path, digest)):
            return found
        pictures, _ = self.reference
        start = time.perf_counter()
        params = make()
        outcome = self._outcome(params, self.subject.sample(params), pictures, start)
        _save(path, outcome, digest)
        return outcome

    def _outcome(
        self,
        params: Any,
        pictures: np.ndarray,
        reference: np.ndarray,
        start: float,
    ) -> Outcome:
        seconds = time.perf_counter() - start
        exact = {
            name: np.asarray(v, np.float64) for name, v in self.subject.judge(pictures).items()
        }
        score = np.mean([exact[name] for name in self.subject.accuracies], axis=0)
        b = len(pictures)
        frames = (
            pictures.reshape(-1, *pictures.shape[-3:]),
            reference.reshape(-1, *reference.shape[-3:]),
        )
        sizes = size_report(iter_parts(as_stored(params)))
        return Outcome(
            values={
                "score": score,
                **exact,
                "psnr": metrics.psnr(pictures, reference),
                "ssim": metrics.ssim(*frames).reshape(b, -1).mean(axis=1),
                "lpips": lpips(*frames).reshape(b, -1).mean(axis=1),
            },
            pooled=see(frames[0]),
            shown=np.round(255 * pictures[:SHOWN]).astype(np.uint8),
            bits=sizes.bits_per_weight,
            bytes=sizes.after,
            seconds=seconds,
        )


def as_stored(params: Any) -> Any:
    """Shapes of parameters with what stays in floating point as a checkpoint has it: bfloat16."""

    def shape(leaf: Any) -> Any:
        narrow = leaf.dtype == jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if narrow else leaf.dtype)

    def stored(leaf: Any) -> Any:
        return jax.eval_shape(lambda: leaf) if isinstance(leaf, QTensor) else shape(leaf)

    return jax.tree.map(stored, params, is_leaf=is_qtensor)


@jax.jit
def _enlarge(pictures: Float[jax.Array, "b y x 3"]) -> Float[jax.Array, "b side side 3"]:
    return resize(pictures, SIDE)


_features = jax.jit(features)
_network = cache(load_efficientnet)


def see(pictures: Float[np.ndarray, "b y x 3"]) -> Float[np.ndarray, "b 1280"]:
    """EfficientNet-Lite0's features of pictures."""
    return _in_batches(lambda x: _features(_network(), _enlarge(x)).pooled, pictures)


def lpips(
    found: Float[np.ndarray, "b y x 3"], expected: Float[np.ndarray, "b y x 3"]
) -> Float[np.ndarray, "b"]:
    """`metrics.lpips` of pictures enlarged to `SIDE`."""
    return _in_batches(lambda a, b: metrics.lpips(*map(_enlarge, (a, b))), found, expected)


def _in_batches(function: Callable[..., Any], *pictures: np.ndarray) -> np.ndarray:
    """Of `BATCH` pictures at a time, the last ones padded: one shape, one compilation."""
    parts = []
    for start in range(0, len(pictures[0]), BATCH):
        batches = [np.asarray(x[start : start + BATCH], np.float32) for x in pictures]
        kept = len(batches[0])
        rest = [(0, BATCH - kept), (0, 0), (0, 0), (0, 0)]
        parts.append(np.asarray(function(*(np.pad(x, rest) for x in batches)))[:kept])
    return np.concatenate(parts)


def _digest(what: Any) -> str:
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _save(path: Path, outcome: Outcome, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {f"values/{name}": value for name, value in outcome.values.items()}
    scalars = np.array([outcome.bits, outcome.bytes, outcome.seconds], np.float64)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        digest=np.array(digest),
        scalars=scalars,
        pooled=outcome.pooled,
        shown=outcome.shown,
        **values,
    )
    partial.replace(path)


def _load(path: Path, digest: str) -> Outcome | None:
    """A kept result, if it is of the same settings."""
    with np.load(path) as file:
        if str(file["digest"]) != digest:
            return None
        values = {n.removeprefix("values/"): file[n] for n in file.files if n.startswith("values/")}
        bits, size, seconds = file["scalars"].tolist()
        return Outcome(
            values=values,
            pooled=file["pooled"],
            shown=file["shown"],
            bits=bits,
            bytes=int(size),
            seconds=seconds,
        )
