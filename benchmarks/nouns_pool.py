"""Captioned nouns with their text states, encoded once and kept on disk.

Shape letters: n captions, b batch, t tokens, k width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int, UInt8

from lowbit_jax.evaluation import nouns

# Captions have 19 to 33 tokens. One in 24,000 has 33 and loses its last word, "accessory".
MAX_LEN = 32
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """What a pool holds; equal specs give equal pools."""

    size: int
    seed: int
    held_out: bool
    max_len: int = MAX_LEN


@dataclass(frozen=True, kw_only=True)
class Pool:
    """`n` nouns: attributes int64 [n, 4], float16 token states [n, t, k] and pooled vectors [n, k].

    The states are a memory map: what a batch does not touch takes no memory.
    """

    sprites: nouns.Sprites
    attrs: Int[np.ndarray, "n 4"]
    states: Float16[np.ndarray, "n t k"]
    pooled: Float16[np.ndarray, "n k"]

    def batch(self, step: int, size: int, seed: int) -> dict[str, np.ndarray]:
        """The batch of one step: passes over all nouns, each shuffled by (seed, pass).

        Depends on the arguments alone, so that a resumed run sees what it would have seen.
        """
        n = len(self.attrs)
        at = np.arange(step * size, (step + 1) * size)
        orders = {p: np.random.default_rng((seed, p)).permutation(n) for p in set(at // n)}
        return self.take(np.array([orders[i // n][i % n] for i in at]))

    def take(self, index: Int[np.ndarray, "b"] | slice) -> dict[str, np.ndarray]:
        """Rows as a batch: uint8 `images` [b, 32, 32, 3], `txt` [b, t, k], `pooled` [b, k]."""
        images: UInt8[np.ndarray, "b 32 32 3"] = nouns.compose(self.sprites, self.attrs[index])
        return {
            "images": images,
            "txt": np.asarray(self.states[index]),
            "pooled": np.asarray(self.pooled[index]),
        }


def open_pool(
    folder: Path,
    spec: PoolSpec,
    sprites: nouns.Sprites,
    make_encoder: Callable[[], Callable],
    progress: Callable[[int], None] = lambda done: None,
) -> Pool:
    """Open the pool of `spec` in `folder`, encoding whatever part of it is not there yet.

    Args:
        folder: cache; one file set per spec.
        spec: what the pool holds.
        sprites: the sprites in use.
        make_encoder: called only if something is missing; returns `encode(texts, max_len)` giving
            token states (b, t, k) and pooled vectors (b, k).
        progress: called with the number of finished captions.
    """
    attrs = nouns.sample_attrs(
        np.random.default_rng(spec.seed), spec.size, sprites.counts, spec.held_out
    )
    texts = nouns.caption(sprites, attrs)
    key = json.dumps([asdict(spec), texts]).encode()
    stem = folder / f"nouns-{hashlib.sha256(key).hexdigest()[:16]}"
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
    return Pool(sprites=sprites, attrs=attrs, states=states, pooled=np.asarray(pooled))


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
