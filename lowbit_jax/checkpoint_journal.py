"""The journal of a checkpoint in the making: a locked file of lines that survive a crash.

Every line is the SHA-256 of a JSON document and the document. A line counts when the two agree; one
without its end was being written when the process or the machine stopped, and is cut off.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lowbit_jax.checkpoint_store import OutputError, sync

NAME = "journal"
_SHOWN = 80  # characters of a value in a message
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Journal:
    """The journal in a folder, made if absent, and the only one open on it.

    Args:
        folder: an existing folder.

    Attributes:
        entries: the documents of all lines that count.

    Raises:
        OutputError: another process, or another `Journal` of this one, has it open.
    """

    def __init__(self, folder: Path):
        path = folder / NAME
        self._file: BinaryIO = path.open("a+b", buffering=0)
        try:
            # the folder may have been finished, and removed, between the two lines above and below
            if not _lock(self._file) or not _is_at(self._file, path):
                raise OutputError(f"{folder}: another conversion is writing there; wait for it")
            self._file.seek(0)
            raw = self._file.read()
            self.entries, self._end = _whole_lines(raw)
            self._file.truncate(self._end)
        except BaseException:
            self.close()
            raise
        sync(folder)

    def append(self, entry: Any) -> None:
        """Add a document; it is on the disk when this returns, and not there when it raises."""
        document = json.dumps(entry).encode()
        line = hashlib.sha256(document).hexdigest().encode() + b" " + document + b"\n"
        try:
            written = 0
            while written < len(line):  # a disk that fills up takes a piece first
                written += os.write(self._file.fileno(), line[written:])
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self._end)
            raise
        self._end += len(line)
        self.entries.append(entry)

    def close(self) -> None:
        """Give the lock back."""
        self._file.close()


def is_locked(folder: Path) -> bool:
    """Whether somebody is writing the journal of a folder."""
    try:
        with open(folder / NAME, "rb") as file:
            return not _lock(file)
    except OSError:
        return False


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first place where two JSON documents differ, with both values; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        places: Iterator[Any] = iter(dict.fromkeys([*old, *new]))
        pairs = [(key, old.get(key), new.get(key)) for key in places]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        if old == new:
            return None
        return f"{path} was {_short(old)}, is now {_short(new)}"
    found = (difference(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs)
    return next((place for place in found if place is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _whole_lines(raw: bytes) -> tuple[list[Any], int]:
    """(documents of the lines that are what their digest says, bytes up to the last line's end)."""
    end = raw.rfind(b"\n") + 1
    entries = []
    for line in raw[:end].split(b"\n"):
        digest, _, document = line.partition(b" ")
        if hashlib.sha256(document).hexdigest().encode() == digest:
            entries.append(json.loads(document))
    return entries, end


def _lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed or its process ends, however; False if another has."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some file systems have none
            raise
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
