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
    """What one form took in each round, in seconds.

    Attributes:
        seconds: by the clock.
        busy: of the processors, all threads together; on a machine that others use it is steadier,
            but it does not show how well the work was spread.
    """

    seconds: tuple[float, ...]
    busy: tuple[float, ...]

    @property
    def median(self) -> float:
        """The usual time by the clock."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The least disturbed one."""
        return min(self.seconds)

    def ratio(self, to: Times) -> float:
        """How many times longer than `to`: the median of the ratios within each round.

        What disturbs a round disturbs its forms alike, so this is steadier than a ratio of medians.
        """
        return _median_ratio(self.seconds, to.seconds)

    def busy_ratio(self, to: Times) -> float:
        """The same of the processors' time."""
        return _median_ratio(self.busy, to.busy)


def _median_ratio(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


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
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, start_busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)
    return {name: Times(seconds=tuple(seconds[name]), busy=tuple(busy[name])) for name in calls}
