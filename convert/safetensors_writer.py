"""Writes safetensors files, one tensor in memory at a time, whole or not at all.

Import from `convert.safetensors`, which reads them too.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.errors import CheckpointError
from convert.safetensors_header import (
    DTYPES,
    MAX_HEADER_BYTES,
    array_bytes,
    metadata_problems,
    name_problem,
    quote,
)

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor to be written that does not exist yet: `make()` returns it when its turn comes."""

    shape: tuple[int, ...]
    dtype: Any  # anything np.dtype takes
    make: Callable[[], Any]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes one file, one tensor in memory at a time, and shows it only when it is whole.

    Tensors lie in the reference writer's order (dtype, then name), which is also the order in
    which `make` is called, so equal inputs give equal bytes. The data goes to a temporary file in
    the same folder, is synced, then renamed; on any failure the temporary file is removed.

    Args:
      path: the file; its folder must exist.
      tensors: name -> array (anything with shape and dtype) or `TensorSpec`.
      metadata: str -> str for `__metadata__`; Hugging Face loaders ask for {"format": "pt"}.
      overwrite: replace an existing file instead of refusing.

    Raises:
      CheckpointError: the path is taken, a name, dtype or metadata entry cannot be stored, or a
        `TensorSpec` made an array of another shape or dtype.
    """
    path = Path(path)
    order, problems = _plan(tensors)
    problems += metadata_problems(dict(metadata or {}))
    if problems:
        raise CheckpointError(path, problems)
    _check_free(path, overwrite)
    header = _header({name: tensors[name] for name in order}, metadata)
    if len(header) > MAX_HEADER_BYTES:
        problem = f"header of {len(header)} bytes, the format allows {MAX_HEADER_BYTES}; shard it"
        raise CheckpointError(path, problem)
    with _replacing(path, overwrite) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            _write_tensor(file, path, name, tensors[name])
    return path


def write_sharded(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    max_shard_bytes: int,
    stem: str = "diffusion_pytorch_model",
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes `stem-0000i-of-0000n.safetensors` and their index, the Hugging Face way.

    Tensors fill shards in the mapping's order; one larger than `max_shard_bytes` gets a shard of
    its own. What fits in one shard becomes `stem.safetensors` without an index. The index comes
    last, so a run that was cut short leaves nothing that looks complete.

    Args:
      folder: made when absent.
      tensors, metadata: as for `write_safetensors`; the metadata goes into every shard.
      max_shard_bytes: data bytes of a shard, at least 1.
      overwrite: replace an older checkpoint of the same stem, removing all its files.

    Returns: the files written, the index last.

    Raises:
      CheckpointError: as `write_safetensors`, or a checkpoint of this stem is there already.
      ValueError: `max_shard_bytes` is not positive.
    """
    folder = Path(folder)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, it is {max_shard_bytes}")
    problems = _plan(tensors)[1]
    if problems:
        raise CheckpointError(folder, problems)
    folder.mkdir(parents=True, exist_ok=True)
    layout = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    old = [path for path in folder.iterdir() if layout.fullmatch(path.name)]
    for path in old:
        _check_free(path, overwrite)
    index_path = folder / f"{stem}.safetensors.index.json"
    index_path.unlink(missing_ok=True)  # first: it must never name a mixture of old and new

    shards = _shards(tensors, max_shard_bytes)
    written, weight_map = [], {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{stem}{part}.safetensors"
        chosen = {name: tensors[name] for name in names}
        written.append(write_safetensors(path, chosen, metadata, overwrite=overwrite))
        weight_map.update(dict.fromkeys(names, path.name))
    for path in set(old) - {*written, index_path}:
        path.unlink()
    if len(shards) > 1:
        total = sum(_nbytes(value) for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with _replacing(index_path, overwrite) as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")
        written.append(index_path)
    return written


def _plan(tensors: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names in file order, problems)."""
    problems = []
    for name, value in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            problems.append(f"tensor {quote(name)}: a name must be a str, not __metadata__")
        elif problem := name_problem(name):
            problems.append(problem)
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            problems.append(f"tensor {quote(name)}: a {type(value).__name__} is not an array")
        elif not _storable(value.dtype):
            problems.append(
                f"tensor {quote(name)}: dtype {value.dtype} is not one of {', '.join(DTYPES)}"
            )
    if problems:
        return [], problems
    return sorted(tensors, key=lambda name: (-_RANK[np.dtype(tensors[name].dtype)], name)), []


def _storable(dtype: Any) -> bool:
    try:
        return np.dtype(dtype) in _CODES
    except TypeError:  # not numpy's at all: torch.float32, a JAX random key
        return False


def _nbytes(value: Any) -> int:
    return array_bytes(value.shape, np.dtype(value.dtype))


def _shards(tensors: Mapping[str, Any], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, value in tensors.items():
        if shards[-1] and used + _nbytes(value) > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += _nbytes(value)
    return shards


def _header(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, value in tensors.items():
        end = offset + _nbytes(value)
        table[name] = {
            "dtype": _CODES[np.dtype(value.dtype)],
            "shape": [int(axis) for axis in value.shape],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_tensor(file: BinaryIO, path: Path, name: str, value: Any) -> None:
    array = np.asarray(value.make() if isinstance(value, TensorSpec) else value)
    if array.shape != tuple(value.shape) or array.dtype != np.dtype(value.dtype):
        promised = f"{np.dtype(value.dtype)}{list(value.shape)}"
        got = f"{array.dtype}{list(array.shape)}"
        raise CheckpointError(path, f"tensor {quote(name)}: promised {promised}, made {got}")
    if array.size:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise CheckpointError(path, f"the folder {path.parent} does not exist; make it first")
    if path.exists() and not (overwrite and path.is_file()):
        raise CheckpointError(path, "exists already; pass overwrite=True or another path")


@contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file under a temporary name that takes its real one only when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_free(path, overwrite)  # again: it took a while
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut; folders cannot be opened on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
