"""What the readers of weight files share: a file mapped into memory, its tensors read as views."""

from __future__ import annotations

import hashlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from convert.errors import CheckpointError
from convert.safetensors_header import TensorInfo, quote

_HASH_CHUNK = 1 << 22  # a multiple of the page size, so that hashed pages can be dropped
_Self = TypeVar("_Self", bound="MappedFile")


class MappedFile(ABC):
    """One file of tensors, checked whole on opening, then read through a memory map.

    A subclass finds the tensors: `_parse`.

    Attributes: `path` (Path), `names` (sorted tuple of str), `size` (bytes on disk), `notes` (tuple
    of str: what was chosen among the file's contents, and what was left). Arrays read stay valid
    after `close` for as long as they are held.

    Raises:
      CheckpointError: the file cannot be opened or breaks a rule of its format.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with _open_regular(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map: mmap.mmap | None = None
            if self.size:  # an empty file cannot be mapped; `_parse` says what is wrong with it
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
            try:
                self._infos = self._parse(file)
            except BaseException:
                self.close()
                raise
        self.names = tuple(sorted(self._infos))

    @abstractmethod
    def _parse(self, file: BinaryIO) -> dict[str, TensorInfo]:
        """Check the whole file and return its tensors by name."""

    def __enter__(self: _Self) -> _Self:
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

        (Two kinds come as an aligned, row-major copy: data at an odd address, and a tensor that the
        file stores transposed or with gaps.)

        Raises:
          CheckpointError: no such tensor, or a BOOL tensor holding a byte other than 0 and 1.
          ValueError: the file was closed.
        """
        info = self.info(name)
        view = self._mapping()
        if info.nbytes == 0:
            out = np.empty(info.shape, info.dtype)
        else:
            flat = np.frombuffer(view, np.uint8, info.span, info.offset)
            if info.offset % info.dtype.itemsize:
                flat = flat.copy()
            # a byte that is neither 0 nor 1 must not become a bool before it is looked at
            stored = flat.view(np.uint8 if info.dtype == np.bool_ else info.dtype)
            if info.strides is None:
                out = stored.reshape(info.shape)
            else:
                steps = [step * info.dtype.itemsize for step in info.strides]
                out = as_strided(stored, info.shape, steps, writeable=False).copy()
            if info.dtype == np.bool_:
                if out.max() > 1:
                    problem = f"tensor {quote(name)}: BOOL holds the byte {out.max()}, not 0 or 1"
                    raise CheckpointError(self.path, problem)
                out = out.view(np.bool_)
        out.flags.writeable = False
        return out

    def release(self, name: str) -> None:
        """Lets the pages of one tensor go, so that streaming a file does not fill memory.

        Arrays read before stay valid: the system reads their pages again when they are touched.
        """
        info = self.info(name)
        self._drop(info.offset, info.span)

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
