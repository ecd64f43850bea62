"""Timing on a machine that others use too: interleaved runs, ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one form, one per round.

    Attributes:
        seconds: in order of rounds.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The usual one."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The least disturbed one."""
        return min(self.seconds)

    def ratio(self, to: Times) -> float:
        """How many times longer than `to`: the median of the ratios within each round.

        What disturbs a round disturbs its forms alike, so this is steadier than a ratio of medians.
        """
        return statistics.median(a / b for a, b in zip(self.seconds, to.seconds, strict=True))


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Times every call once a round, after one that warms up (compiles).

    Args:
        calls: name -> a function that starts the work and returns its arrays.
        rounds: how often each is timed.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(seconds=tuple(values)) for name, values in seconds.items()}
