"""Calibration statistics as a safetensors file, and back, strictly.

A tensor for each part of each linear, "double_blocks/3/img_attn/qkv.absmax" (float32), ".total" and
".squares" (float64 sums over rows), ".count" (int64), ".gram" where there is one (float64); shapes
as in `lowbit_jax.calibration.statistics.LayerStatistics`. The rest is metadata.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError
from convert.safetensors import TensorFile, write_safetensors
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.calibration.statistics import LayerStatistics, Statistics, StatisticsError
from lowbit_jax.models.registry import read_config

FORMAT, VERSION = "lowbit-jax statistics", "1"
PARTS = tuple(field.name for field in dataclasses.fields(LayerStatistics))
OPTIONAL = ("gram",)
KEYS = frozenset(
    "format version lowbit-jax model config edges halves samples digest".split()  # all are needed
)


def save_statistics(
    path: str | os.PathLike[str], statistics: Statistics, *, overwrite: bool = False
) -> Path:
    """Write statistics; the file appears when it is whole.

    To save after every sample: `keep=partial(save_statistics, path, overwrite=True)`.

    Raises:
        CheckpointError: the path is taken, or cannot be written.
    """
    tensors = {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in statistics.layers.items()
        for part in PARTS
        if getattr(layer, part) is not None
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "lowbit-jax": importlib.metadata.version("lowbit-jax"),
        "model": statistics.model,
        "config": statistics.config,
        "edges": json.dumps(statistics.ranges.edges),
        "halves": json.dumps(statistics.halves),
        "samples": str(statistics.samples),
        "digest": statistics.digest,
    }
    return write_safetensors(path, tensors, metadata, overwrite=overwrite)


def load_statistics(
    path: str | os.PathLike[str],
    params: Any,
    *,
    model: str | None = None,
    config: Mapping[str, Any] | None = None,
    ranges: TimestepRanges | None = None,
) -> Statistics:
    """Read statistics of the model with `params`; what is not exactly that is refused by name.

    Args:
        path: the file.
        params: parameters, or their `jax.ShapeDtypeStruct`s; float or quantised.
        model: its name in `lowbit_jax.models.registry`; None for any with these parameters.
        config: its config fields, as a manifest has them; None for any.
        ranges: that the statistics must have; None for any.

    Raises:
        CheckpointError: no such file, not of this format and version, missing or odd metadata,
            tensors that are none of a linear's, or linears without all of theirs.
        StatisticsError: statistics of another model, config or ranges, other names or widths, NaN
            or impossible numbers.
    """
    with TensorFile(path) as file:
        header = _header(file.path, file.metadata or {})
        layers = _layers(file)
    statistics = Statistics(layers=layers, **header)
    if model is not None and statistics.model != model:
        raise StatisticsError(f"{path}: statistics of model '{statistics.model}', not '{model}'")
    if config is not None:
        theirs = read_config(statistics.model, json.loads(statistics.config))
        ours = read_config(statistics.model, config)
        if theirs != ours:
            raise StatisticsError(f"{path}: statistics of a model with {theirs}, not {ours}")
    statistics.check(params, ranges)
    return statistics


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it holds statistics; it may be damaged still."""
    try:
        with TensorFile(path) as file:
            return (file.metadata or {}).get("format") == FORMAT
    except CheckpointError:
        return False


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(
            path,
            f"format {metadata.get('format')!r} version {metadata.get('version')!r}, this reads "
            f"{FORMAT!r} version {VERSION!r}",
        )
    if set(metadata) != KEYS:
        raise CheckpointError(path, f"metadata {sorted(metadata)}, not {sorted(KEYS)}")
    try:
        read_config(metadata["model"], json.loads(metadata["config"]))
        return {
            "ranges": TimestepRanges(tuple(json.loads(metadata["edges"]))),
            "halves": tuple(json.loads(metadata["halves"])),
            "model": metadata["model"],
            "config": metadata["config"],
            "samples": int(metadata["samples"]),
            "digest": metadata["digest"],
        }
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"metadata: {error}") from None


def _layers(file: TensorFile) -> dict[str, LayerStatistics]:
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for name in file.names:
        layer, _, part = name.rpartition(".")
        if part not in PARTS or not layer:
            problems.append(f"tensor '{name}' is none of {', '.join(PARTS)} of a linear")
        found.setdefault(layer, {})[part] = file.read(name).copy()
    for layer, parts in found.items():
        missing = [part for part in PARTS if part not in parts and part not in OPTIONAL]
        problems += [f"{layer}: no {part}" for part in missing]
    if problems:
        raise CheckpointError(file.path, problems)
    return {layer: LayerStatistics(**parts) for layer, parts in found.items()}
