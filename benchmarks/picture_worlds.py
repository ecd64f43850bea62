"""The worlds of the small FLUX models: captions, the pictures they ask for, and who judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from benchmarks.caption_pool import World
from lowbit_jax.evaluation import nouns, scenes

Answers = dict[str, Bool[np.ndarray, "n"]]  # by question, one for each caption


class PictureWorld(World, Protocol):
    """Captions, the pictures they ask for, and who judges.

    Attributes:
        max_len: tokens of a caption that the network sees.
        attributes: names of what is in a row of attributes.
        scored: the questions whose mean is the score of a picture.
        accuracies: names of the scores of `summary` that are shares of 1.
        scores: names of its other scores.
    """

    max_len: int
    attributes: tuple[str, ...]
    scored: tuple[str, ...]
    accuracies: tuple[str, ...]
    scores: tuple[str, ...]

    def pictures(
        self, attrs: Int[np.ndarray, "n a"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "n 32 32 3"]:
        """A picture per caption; `rng` decides what captions leave free."""
        ...

    def judge(
        self, pictures: Float[np.ndarray, "n 32 32 3"], attrs: Int[np.ndarray, "n a"]
    ) -> Answers:
        """What is right about pictures in [0, 255]."""
        ...

    def categories(self, found: Answers, attrs: Int[np.ndarray, "n a"]) -> dict[str, float]:
        """Shares of right answers by category, of what `judge` gives."""
        ...

    def summary(
        self, pictures: Float[np.ndarray, "n 32 32 3"], attrs: Int[np.ndarray, "n a"]
    ) -> dict[str, float]:
        """What a training shows of pictures in [0, 255]."""
        ...


@dataclass(frozen=True)
class Nouns:
    """`evaluation.nouns`: one noun of four parts; its caption fixes every pixel."""

    sprites: nouns.Sprites
    name: str = "nouns"
    max_len: int = 32  # Captions have 19 to 33; one in 24,000 loses its last word, "accessory".
    attributes: tuple[str, ...] = nouns.KINDS
    scored: tuple[str, ...] = nouns.KINDS
    accuracies: tuple[str, ...] = nouns.KINDS
    scores: tuple[str, ...] = ("mean", "psnr")

    def sample_attrs(self, rng: np.random.Generator, n: int, held_out: bool) -> np.ndarray:
        """See `nouns.sample_attrs`."""
        return nouns.sample_attrs(rng, n, self.sprites.counts, held_out)

    def caption(self, attrs: np.ndarray) -> list[str]:
        """See `nouns.caption`."""
        return nouns.caption(self.sprites, attrs)

    def pictures(self, attrs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `nouns.compose`; captions leave nothing free."""
        return nouns.compose(self.sprites, attrs)

    def judge(self, pictures: np.ndarray, attrs: np.ndarray) -> Answers:
        """See `nouns.score`."""
        return nouns.score(self.sprites, pictures, attrs)

    def categories(self, found: Answers, attrs: np.ndarray) -> dict[str, float]:
        """Single parts, the pair that training never shows together, all four."""
        every = np.logical_and.reduce([found[kind] for kind in nouns.KINDS])
        parts = {kind: found[kind] for kind in nouns.KINDS}
        parts |= {"head+accessory": found["head"] & found["accessory"], "all four": every}
        return {name: float(right.mean()) for name, right in parts.items()}

    def summary(self, pictures: np.ndarray, attrs: np.ndarray) -> dict[str, float]:
        """Accuracy of each attribute, their mean, and PSNR to the exact picture."""
        found = self.judge(pictures, attrs)
        shares = {kind: float(right.mean()) for kind, right in found.items()}
        shares["mean"] = float(np.mean(list(shares.values())))
        target = nouns.compose(self.sprites, attrs)
        return shares | {"psnr": float(nouns.psnr(pictures, target).mean())}


@dataclass(frozen=True)
class Scenes:
    """`evaluation.scenes`: up to four things in four cells, in GenEval's kinds of captions."""

    things: scenes.Things
    name: str = "scenes"
    max_len: int = 16  # Captions have up to 15.
    attributes: tuple[str, ...] = scenes.ATTRIBUTES
    scored: tuple[str, ...] = ("right",)
    accuracies: tuple[str, ...] = (*scenes.GROUPS, "right")
    scores: tuple[str, ...] = (*scenes.SCORES[1:], "clarity")

    def sample_attrs(self, rng: np.random.Generator, n: int, held_out: bool) -> np.ndarray:
        """See `scenes.sample_attrs`."""
        return scenes.sample_attrs(rng, n, self.things.counts, held_out)

    def caption(self, attrs: np.ndarray) -> list[str]:
        """See `scenes.caption`."""
        return scenes.caption(self.things, attrs)

    def pictures(self, attrs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `scenes.compose`; `rng` chooses the cells."""
        return scenes.compose(self.things, scenes.place(self.things, attrs, rng))

    def judge(self, pictures: np.ndarray, attrs: np.ndarray) -> Answers:
        """See `scenes.score`."""
        return scenes.score(self.things, pictures, attrs)

    def categories(self, found: Answers, attrs: np.ndarray) -> dict[str, float]:
        """See `scenes.categories`."""
        return scenes.categories(found, attrs)

    def summary(self, pictures: np.ndarray, attrs: np.ndarray) -> dict[str, float]:
        """Share of right pictures by kind of caption; shares of every question; clarity in dB."""
        found = self.judge(pictures, attrs)
        groups = scenes.by_group(found["right"], attrs)
        shares = {name: float(np.mean(right)) for name, right in (groups | found).items()}
        return shares | {"clarity": float(scenes.clarity(self.things, pictures).mean())}


# By name of the shipped model.
WORLDS: dict[str, Callable[[], PictureWorld]] = {
    "nouns-flux": lambda: Nouns(nouns.load_sprites()),
    "scenes-flux": lambda: Scenes(scenes.load_things()),
}
