"""Captions with their text states, encoded once and kept on disk.

Shape letters: n captions, a attributes, b batch, t tokens, k width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float16, Int
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

CHUNK = 256


class World(Protocol):
    """What captions are about."""

    name: str

    def sample_attrs(
        self, rng: np.random.Generator, n: int, held_out: bool
    ) -> Int[np.ndarray, "n a"]:
        """`n` random rows of attributes of one side of the split."""
        ...

    def caption(self, attrs: Int[np.ndarray, "n a"]) -> list[str]:
        """One sentence per row."""
        ...


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """What a pool holds; equal specs give equal pools."""

    size: int
    seed: int
    held_out: bool
    max_len: int


@dataclass(frozen=True, kw_only=True)
class Pool:
    """`n` captions: attributes, float16 token states [n, t, k] and pooled vectors [n, k].

    The states are a memory map: what a batch does not touch takes no memory.
    """

    attrs: Int[np.ndarray, "n a"]
    states: Float16[np.ndarray, "n t k"]
    pooled: Float16[np.ndarray, "n k"]

    def rows(self, step: int, size: int, seed: int) -> Int[np.ndarray, "b"]:
        """The captions of one step: passes over all of them, each shuffled by (seed, pass).

        Depends on the arguments alone, so that a resumed run sees what it would have seen.
        """
        n = len(self.attrs)
        at = np.arange(step * size, (step + 1) * size)
        orders = {p: np.random.default_rng((seed, p)).permutation(n) for p in set(at // n)}
        return np.array([orders[i // n][i % n] for i in at])


def open_pool(
    folder: Path,
    spec: PoolSpec,
    world: World,
    make_encoder: Callable[[], Callable],
    progress: Callable[[int], None] = lambda done: None,
) -> Pool:
    """Open the pool of `spec` in `folder`, encoding whatever part of it is not there yet.

    Args:
        folder: cache; one file set per world and spec.
        spec: what the pool holds.
        world: what the captions are about.
        make_encoder: called only if something is missing; returns `encode(texts, max_len)` giving
            token states (b, t, k) and pooled vectors (b, k).
        progress: called with the number of finished captions.
    """
    attrs = world.sample_attrs(np.random.default_rng(spec.seed), spec.size, spec.held_out)
    texts = world.caption(attrs)
    key = json.dumps([asdict(spec), texts]).encode()
    stem = folder / f"{world.name}-{hashlib.sha256(key).hexdigest()[:16]}"
    done_file = stem.with_suffix(".json")
    done = json.loads(done_file.read_text())["done"] if done_file.exists() else 0
    if done < spec.size:
        folder.mkdir(parents=True, exist_ok=True)
        encode = make_encoder()
        for start in range(done, spec.size, CHUNK):
            _write_chunk(stem, spec, start, *encode(texts[start : start + CHUNK], spec.max_len))
            finished = min(start + CHUNK, spec.size)
            _replace_text(done_file, json.dumps({"done": finished, **asdict(spec)}))
            progress(finished)
    states, pooled = (np.load(path, mmap_mode="r") for path in _paths(stem))
    return Pool(attrs=attrs, states=states, pooled=np.asarray(pooled))


def open_pools(
    folder: Path,
    specs: dict[str, PoolSpec],
    world: World,
    make_encoder: Callable[[], Callable],
    console: Console,
) -> dict[str, Pool]:
    """Pools by name, with a progress bar each; see `open_pool`."""
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar:
        pools = {}
        for name, spec in specs.items():
            task = bar.add_task(f"{name} captions", total=spec.size)
            advance = lambda done, task=task: bar.update(task, completed=done)  # noqa: E731
            pools[name] = open_pool(folder, spec, world, make_encoder, advance)
            bar.update(task, completed=spec.size)
    return pools


def _paths(stem: Path) -> tuple[Path, Path]:
    return Path(f"{stem}-states.npy"), Path(f"{stem}-pooled.npy")


def _write_chunk(stem: Path, spec: PoolSpec, start: int, *arrays: np.ndarray) -> None:
    for path, array in zip(_paths(stem), arrays, strict=True):
        if start == 0:
            shape = (spec.size, *array.shape[1:])
            np.lib.format.open_memmap(path, "w+", np.float16, shape)
        target = np.load(path, mmap_mode="r+")
        target[start : start + len(array)] = array
        target.flush()  # before the count says so


def _replace_text(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)
