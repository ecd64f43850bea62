"""Trajectories as a folder of safetensors shards: written one after the other, gone on with.

    FOLDER/trajectories-00000.safetensors   x, output [p, s, ...], timestep [s], conditions.0, ...

A shard appears when it is whole. Its metadata says of what run it is, so that a folder that was
interrupted is completed, and one of another run refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.errors import CheckpointError
from convert.safetensors import TensorFile, write_safetensors
from lowbit_jax.calibration.collect import Run, Sample
from lowbit_jax.distill.trajectories import (
    Shard,
    Trajectories,
    TrajectoryError,
    record,
    samples_digest,
)

FORMAT, VERSION = "lowbit-jax trajectories", "1"
PARTS = ("x", "output", "timestep")


def save_trajectories(
    folder: str | os.PathLike[str],
    run: Run,
    params: Any,
    samples: Iterable[Sample],
    *,
    size: int = 32,
    progress: Callable[[int], object] = lambda done: None,
) -> Trajectories:
    """Record what is not in `folder` yet and open all of it.

    Args:
        folder: made if it is not there. Nothing else may be in it.
        run: see `record`.
        params: float parameters.
        samples: what to sample: the same, in the same order, as what is there was made of.
        size: samples of a shard.
        progress: called with the number of samples that are there, after each shard.

    Raises:
        CheckpointError: shards of another run, or damaged ones.
        TrajectoryError: see `record`; no samples.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = samples_digest(run, params, size)
    before = _complete(folder, digest, size)
    there, structures = len(before), list[Any]()

    def watched():
        for number, sample in enumerate(samples):
            structures[:] = [jax.tree.structure(sample.conditions)]
            if number < there * size:
                _check_sample(_path(folder, number // size), before[number // size], number, sample)
            yield sample

    done = there * size
    progress(done)
    for number, shard in enumerate(record(run, params, watched(), size=size, skip=there), there):
        tensors = {part: np.ascontiguousarray(getattr(shard, part)) for part in PARTS}
        tensors |= {f"conditions.{i}": leaf for i, leaf in enumerate(shard.conditions)}
        metadata = {"format": FORMAT, "version": VERSION, "digest": digest, "number": str(number)}
        write_safetensors(_path(folder, number), tensors, metadata)
        done += len(shard)
        progress(done)
    if not structures:
        raise TrajectoryError("no samples were given")
    return open_trajectories(folder, structures[0], digest=digest)


def open_trajectories(
    folder: str | os.PathLike[str], structure: Any, *, digest: str | None = None
) -> Trajectories:
    """Open what was recorded; arrays are views of the files.

    Args:
        folder: see `save_trajectories`.
        structure: of a sample's conditions, as `jax.tree.structure` gives it.
        digest: that the shards must have; None for any, the same for all.

    Raises:
        CheckpointError: no shards, missing ones, or shards of several runs.
    """
    paths = sorted(Path(folder).glob("trajectories-*.safetensors"))
    if not paths:
        raise CheckpointError(Path(folder), "no trajectories here")
    shards, total = [], hashlib.sha256()
    for number, path in enumerate(paths):
        shard, found = _read(path, number)
        digest = found if digest is None else digest
        if found != digest:
            raise CheckpointError(path, f"of another run: {found[:16]}, not {digest[:16]}")
        if len(shard.conditions) != structure.num_leaves:
            problem = (
                f"{len(shard.conditions)} conditions, the structure has {structure.num_leaves}"
            )
            raise CheckpointError(path, problem)
        shards.append(shard)
        total.update(f"{found} {len(shard)} ".encode() + shard.output[:, 0].tobytes())
    return Trajectories(shards, structure, total.hexdigest())


def _path(folder: Path, number: int) -> Path:
    return folder / f"trajectories-{number:05d}.safetensors"


def _complete(folder: Path, digest: str, size: int) -> list[Shard]:
    """The full shards of this run that are there, from the first on; a short last one is remade."""
    found: list[Shard] = []
    while _path(folder, len(found)).exists():
        path = _path(folder, len(found))
        shard, theirs = _read(path, len(found))
        if theirs != digest:
            problem = (
                f"trajectories of other parameters, settings or shard size: {theirs[:16]}, not "
                f"{digest[:16]}; choose another folder"
            )
            raise CheckpointError(path, problem)
        if len(shard) < size:
            path.unlink()
            break
        found.append(shard)
    return found


def _check_sample(path: Path, shard: Shard, number: int, sample: Sample) -> None:
    row = number % len(shard)
    noise = np.asarray(sample.noise, np.float32)[0]
    leaves = [np.asarray(leaf)[0] for leaf in jax.tree.leaves(sample.conditions)]
    theirs = [leaf[row] for leaf in shard.conditions]
    same = len(leaves) == len(theirs) and np.array_equal(noise, shard.x[row, 0])
    if not same or not all(map(np.array_equal, leaves, theirs)):
        problem = f"sample {number} has other noise or conditions there; choose another folder"
        raise CheckpointError(path, problem)


def _read(path: Path, number: int) -> tuple[Shard, str]:
    with TensorFile(path) as file:
        metadata = file.metadata or {}
        wanted = {"format": FORMAT, "version": VERSION, "number": str(number)}
        wrong = {key: metadata.get(key) for key in wanted if metadata.get(key) != wanted[key]}
        if wrong or "digest" not in metadata:
            raise CheckpointError(path, f"metadata {wrong or 'without digest'}, not {wanted}")
        missing = [part for part in PARTS if part not in file.names]
        if missing:
            raise CheckpointError(path, f"no tensor {', '.join(missing)}")
        names = [f"conditions.{i}" for i in range(len(file.names) - len(PARTS))]
        # views, valid for as long as they are held
        arrays = {name: file.read(name) for name in [*PARTS, *names]}
    conditions = [arrays[name] for name in names]
    return Shard(conditions=conditions, **{part: arrays[part] for part in PARTS}), metadata[
        "digest"
    ]
