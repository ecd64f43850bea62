"""Timestep ranges: where the statistics of a sampler's steps are kept apart (ViDiT-Q v1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

ENDS = (1.0, 1000.0)


@dataclass(frozen=True)
class TimestepRanges:
    """Ranges that tile the timesteps a model is told, each with its upper end and not its lower.

    Range r is (edges[r], edges[r + 1]]; the first also has 0. Compared in float32, as models are
    told their times.

    Attributes:
        edges: rising, from 0 to 1000 (diffusion steps) or to 1 (FLUX's flow time).

    Raises:
        ValueError: edges that do not tile.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        edges = tuple(float(edge) for edge in self.edges)
        rising = all(np.float32(a) < np.float32(b) for a, b in zip(edges, edges[1:], strict=False))
        if len(edges) < 2 or edges[0] != 0 or edges[-1] not in ENDS or not rising:
            raise ValueError(
                f"edges {self.edges} do not tile the timesteps: they must rise from 0 to 1000 "
                "(diffusion steps) or to 1 (flow time)"
            )
        object.__setattr__(self, "edges", edges)

    @staticmethod
    def from_pairs(pairs: Sequence[tuple[int, int]]) -> TimestepRanges:
        """From ViDiT-Q v1's `timerange`, such as `[[0, 500], [501, 1000]]`: ends included.

        Raises:
            ValueError: a gap, an overlap, or other ends than 0 and 1000.
        """
        for (_, end), (begin, _) in zip(pairs, pairs[1:], strict=False):
            if begin != end + 1:
                raise ValueError(
                    f"ranges {list(pairs)} do not tile: {end} is followed by {begin}, not {end + 1}"
                )
        if not pairs or pairs[0][0] != 0 or pairs[-1][1] != 1000:
            raise ValueError(f"ranges {list(pairs)} do not tile 0 to 1000")
        return TimestepRanges((0, *(end for _, end in pairs)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def index(self, t: Float[Array, "*b"] | Int[Array, "*b"]) -> Int32[Array, "*b"]:
        """The range of each timestep; -1 for one outside all, and for NaN."""
        t = jnp.asarray(t, jnp.float32)
        inner = np.asarray(self.edges[1:-1], np.float32)
        found = jnp.searchsorted(inner, t, side="left").astype(jnp.int32)
        return jnp.where((t >= 0) & (t <= self.edges[-1]), found, -1)

    def label(self, r: int) -> str:
        """Range r in words, such as "(500, 1000]"."""
        return f"{'(' if r else '['}{self.edges[r]:g}, {self.edges[r + 1]:g}]"


WHOLE = TimestepRanges((0, 1000))
WHOLE_FLOW = TimestepRanges((0, 1))
