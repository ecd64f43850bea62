"""Safetensors files without torch: a strict memory-mapped reader and a streaming writer.

    with TensorFile("model.safetensors") as file:
        for name in file.names:
            use(file.read(name))     # a view, no copy
            file.release(name)       # its pages leave this process

Model folders and sharded checkpoints are `convert.checkpoint_files`; the checks that make a file
safe to read are `convert.safetensors_header`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.errors import CheckpointError
from convert.safetensors_header import TensorInfo, quote, read_header
from convert.safetensors_writer import TensorSpec, write_safetensors, write_sharded

__all__ = ["TensorFile", "TensorInfo", "TensorSpec", "write_safetensors", "write_sharded"]

_HASH_CHUNK = 1 << 22  # a multiple of the page size, so that hashed pages can be dropped


class TensorFile:
    """One safetensors file, checked whole on opening, then read through a memory map.

    Attributes: `path` (Path), `names` (sorted tuple of str), `metadata` (dict of str to str),
    `size` (bytes on disk). Arrays read stay valid after `close` for as long as they are held.

    Raises:
      CheckpointError: the file cannot be opened or breaks a rule of the format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with _open_regular(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            self._infos, self.metadata = read_header(file, self.path, self.size)
            self._map: mmap.mmap | None = mmap.mmap(
                file.fileno(), self.size, access=mmap.ACCESS_READ
            )
        self.names = tuple(sorted(self._infos))

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops the map; the arrays still held keep it alive until they go."""
        if self._map is not None:
            with suppress(BufferError):  # raised while arrays still point into the map
                self._map.close()
            self._map = None

    def info(self, name: str) -> TensorInfo:
        """The `TensorInfo` of a tensor. Raises CheckpointError when there is none of this name."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(self.path, no_such_tensor(name, self.names)) from None

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only array of its own dtype and shape, without a copy.

        (A file may place data at an odd address; such a tensor comes as an aligned copy.)

        Raises:
          CheckpointError: no such tensor, or a BOOL tensor holding a byte other than 0 and 1.
          ValueError: the file was closed.
        """
        info = self.info(name)
        view = self._mapping()
        if info.nbytes == 0:
            out = np.empty(info.shape, info.dtype)
        else:
            flat = np.frombuffer(view, np.uint8, info.nbytes, info.offset)
            if info.dtype == np.bool_ and flat.max() > 1:
                problem = f"tensor {quote(name)}: BOOL holds the byte {flat.max()}, not 0 or 1"
                raise CheckpointError(self.path, problem)
            if info.offset % info.dtype.itemsize:
                flat = flat.copy()
            out = flat.view(info.dtype).reshape(info.shape)
        out.flags.writeable = False
        return out

    def release(self, name: str) -> None:
        """Lets the pages of one tensor go, so that streaming a file does not fill memory.

        Arrays read before stay valid: the system reads their pages again when they are touched.
        """
        info = self.info(name)
        self._drop(info.offset, info.nbytes)

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """SHA-256 (hex) of the whole file as it is mapped; `progress` gets each chunk's bytes."""
        digest = hashlib.sha256()
        for start in range(0, self.size, _HASH_CHUNK):
            chunk = self._mapping()[start : start + _HASH_CHUNK]
            digest.update(chunk)
            self._drop(start, len(chunk))
            if progress is not None:
                progress(len(chunk))
        return digest.hexdigest()

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path}: the file was closed; read inside its `with` block")
        return self._map

    def _drop(self, offset: int, nbytes: int) -> None:
        view = self._mapping()
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            start = offset - offset % mmap.PAGESIZE
            view.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)


def no_such_tensor(name: str, names: Sequence[str]) -> str:
    """The problem line for a name that is not there, with the nearest ones."""
    near = get_close_matches(str(name), names, 3) if len(names) <= 10_000 else []
    hint = f"; did you mean {', '.join(map(quote, near))}?" if near else ""
    return f"has no tensor {quote(name)} among its {len(names)}{hint}"


def _open_regular(path: Path) -> BinaryIO:
    if not path.is_file():  # a fifo would block, a folder has another door
        kind = "is not a regular file" if path.exists() else "does not exist"
        raise CheckpointError(path, kind)
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
