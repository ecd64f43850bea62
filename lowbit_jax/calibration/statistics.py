"""What calibration knows: channel statistics of the input of every linear, as one pytree.

Shape letters: h halves of classifier-free guidance, r timestep ranges, k channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Float64, Int64

from lowbit_jax import ops
from lowbit_jax.calibration.observe import Reading
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.quant.stacks import iter_layers

MAX_LISTED = 20
# float32 sums over the rows of one forward: a second moment may pass absmax^2 by this much of it
ROUNDING = 1e-4


class StatisticsError(ValueError):
    """Statistics that are damaged, or not of the model, ranges or samples they are used with."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Of one linear: numpy arrays; sums are kept, so that runs can go on and be compared exactly.

    Attributes:
        absmax: largest magnitude.
        total: sum over rows: float32 within a forward, float64 over forwards.
        squares: sum of the squares, likewise.
        count: rows (tokens) summed.
        gram: X^T X over all rows, halves and ranges; None where it was not asked for.
    """

    absmax: Float32[np.ndarray, "h r k"]
    total: Float64[np.ndarray, "h r k"]
    squares: Float64[np.ndarray, "h r k"]
    count: Int64[np.ndarray, "h r"]
    gram: Float64[np.ndarray, "k k"] | None = None

    @property
    def mean(self) -> Float32[np.ndarray, "h r k"]:
        """E[x] of every channel."""
        return (self.total / self.count[..., None]).astype(np.float32)

    @property
    def second_moment(self) -> Float32[np.ndarray, "h r k"]:
        """E[x^2] of every channel."""
        return (self.squares / self.count[..., None]).astype(np.float32)


def _static() -> Any:
    return field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all linears of a model.

    Attributes:
        layers: by layer path, such as "double_blocks/3/img_attn/qkv".
        ranges: what axis r stands for.
        halves: what axis h stands for, ("all",) without guidance.
        model: name of the network in `lowbit_jax.models.registry`.
        config: its config fields, as JSON.
        samples: how many were sampled.
        digest: SHA-256 of the run's settings and its samples, in order.
    """

    layers: dict[str, LayerStatistics]
    ranges: TimestepRanges = _static()
    halves: tuple[str, ...] = _static()
    model: str = _static()
    config: str = _static()
    samples: int = _static()
    digest: str = _static()

    def check(self, params: Any, ranges: TimestepRanges | None = None) -> None:
        """That these are statistics of the model with `params`, whole and possible.

        Args:
            params: its parameters, or their `jax.ShapeDtypeStruct`s; float or quantised.
            ranges: what the user of the statistics takes axis r for; None for any.

        Raises:
            StatisticsError: with every problem by the name of its layer.
        """
        widths = layer_widths(params)
        problems = [f"{name}: no statistics" for name in widths if name not in self.layers]
        problems += [
            f"{name}: the model has no such linear" for name in sorted(self.layers.keys() - widths)
        ]
        for name in sorted(widths.keys() & self.layers.keys()):
            shape = (len(self.halves), len(self.ranges), widths[name])
            problems += (f"{name}: {problem}" for problem in self._problems(name, shape))
        if ranges is not None and ranges != self.ranges:
            problems.insert(
                0, f"statistics of the ranges {self.ranges.edges}, not of {ranges.edges}"
            )
        raise_all(problems)

    def _problems(self, name: str, shape: tuple[int, ...]) -> Iterable[str]:
        layer = self.layers[name]
        wanted = {
            "absmax": (shape, np.float32),
            "total": (shape, np.float64),
            "squares": (shape, np.float64),
            "count": (shape[:2], np.int64),
            "gram": ((shape[2], shape[2]), np.float64),
        }
        misfit = False
        for part, (size, dtype) in wanted.items():
            array = getattr(layer, part)
            if array is None and part == "gram":
                continue
            if array.shape != size or array.dtype != dtype:
                misfit = True
                yield (
                    f"{part} is {array.dtype}{list(array.shape)}, the model needs "
                    f"{np.dtype(dtype)}{list(size)}"
                )
            elif not np.isfinite(array).all():
                misfit = True
                yield f"{part} holds NaN or infinity"
        if not misfit:
            yield from self._impossible(layer)

    def _impossible(self, layer: LayerStatistics) -> Iterable[str]:
        for h, r in np.argwhere(layer.count <= 0):
            where = f"{self.halves[h]} half, range {self.ranges.label(r)}"
            yield f"count is {layer.count[h, r]} ({where}): nothing was seen there"
        if (layer.absmax < 0).any():
            yield "absmax is negative"
        if (layer.count > 0).all():
            most = layer.absmax.astype(np.float64)
            room = 1 + ROUNDING
            if (np.abs(layer.total) > room * most * layer.count[..., None]).any():
                yield "a mean is larger than the absmax of its channel"
            if not (
                (layer.squares >= 0) & (layer.squares <= room * most**2 * layer.count[..., None])
            ).all():
                yield "a second moment is negative or larger than the square of absmax"


class Sums:
    """Statistics in the making, on the host: updated in place, one forward after the other.

    Float64 sums in the order of the samples, so that a run that was cut in two ends as one that
    was not, to the bit.
    """

    def __init__(self, halves: int, ranges: TimestepRanges, start: Mapping[str, LayerStatistics]):
        self._size = (halves, len(ranges))
        self._layers = {name: jax.tree.map(np.array, layer) for name, layer in start.items()}

    def add(self, r: int, readings: Iterable[tuple[str, list[Reading]]]) -> None:
        """Add one forward's readings, `iter_readings` of numpy arrays, to range `r`.

        Raises:
            StatisticsError: a layer was given NaN or infinity.
        """
        for name, calls in readings:
            for call in calls:
                self._add(name, r, call)

    def _add(self, name: str, r: int, reading: Reading) -> None:
        if not all(np.isfinite(part).all() for part in (reading.absmax, reading.squares)):
            raise StatisticsError(
                f"{name}: its input holds NaN or infinity, or squares beyond float32; look at the "
                "inputs (labels out of range, captions of nothing but padding) or use float32"
            )
        if name not in self._layers:
            self._layers[name] = self._zeros(reading)
        layer = self._layers[name]
        np.maximum(layer.absmax[:, r], reading.absmax, out=layer.absmax[:, r])
        layer.total[:, r] += reading.total
        layer.squares[:, r] += reading.squares
        layer.count[:, r] += int(reading.count)
        if layer.gram is not None:
            layer.gram[...] += reading.gram

    def _zeros(self, reading: Reading) -> LayerStatistics:
        shape = (*self._size, reading.absmax.shape[-1])
        return LayerStatistics(
            absmax=np.zeros(shape, np.float32),
            total=np.zeros(shape),
            squares=np.zeros(shape),
            count=np.zeros(self._size, np.int64),
            gram=None if reading.gram is None else np.zeros(reading.gram.shape),
        )

    def layers(self) -> dict[str, LayerStatistics]:
        """A copy of what was summed up so far."""
        return {name: jax.tree.map(np.array, layer) for name, layer in self._layers.items()}


def layer_widths(params: Any) -> dict[str, int]:
    """k of every linear by its layer path."""
    return {path: ops.logical_shape(kernel)[-2] for path, kernel, _ in iter_layers(params)}


def raise_all(problems: list[str]) -> None:
    """Raise one error for all problems, if there are any.

    Raises:
        StatisticsError: one line for each of the first `MAX_LISTED`.
    """
    if problems:
        lines = problems[:MAX_LISTED]
        if len(problems) > MAX_LISTED:
            lines.append(f"and {len(problems) - MAX_LISTED} more")
        raise StatisticsError("\n  - ".join([f"statistics: {len(problems)} problem(s)", *lines]))
