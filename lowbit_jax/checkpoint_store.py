"""One part of a checkpoint on disk: a folder of arrays by orbax, made durable, and its digest.

Orbax's handler is used without its `Checkpointer`, and without OCDBT: those add random names and
times. So a part is one zarr array per tensor, and equal tensors give equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

# asyncio logs, when it forgets them, the failed reads beside the one that was raised
logging.getLogger("asyncio").addFilter(lambda r: "tensorstore_spec" not in r.getMessage())


class OutputError(OSError):
    """The output folder cannot be written; the message says why and what to do."""


def part_folder(folder: Path, name: str) -> Path:
    """Where a checkpoint keeps a part."""
    return folder / "params" / name.replace("/", ".")


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a new folder; on failure some of it may be there."""
    path.mkdir()
    with _quiet_orbax():
        _handler().save(path, args=ocp.args.PyTreeSave(dict(arrays)))


def restore_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read these arrays; also of folders with OCDBT, which earlier versions wrote."""
    wanted = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
    with _quiet_orbax():
        return _handler().restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (folders: POSIX only)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` everything below a folder, and the folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def tree_digest(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def space_problem(path: Path, needed: int) -> str:
    """The two numbers of a disk that is full; files too, where their number is what is limited."""
    free = shutil.disk_usage(path).free
    text = f"the disk is full: {free / 1e6:,.1f} MB free, the next layer takes {needed / 1e6:,.1f}"
    files = os.statvfs(path) if hasattr(os, "statvfs") else None
    if files and files.f_files and files.f_favail < 100:
        return f"{text} MB; {files.f_favail} more files can be made"
    return f"{text} MB"


@contextlib.contextmanager
def disk_errors(folder: Path, where: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Turn what the system, or orbax for it, says about a disk into `OutputError`.

    With `where`, a folder on that disk, and the bytes that were to be written, a full disk is
    described by its numbers.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        code = _os_code(error)
        if not isinstance(error, OSError) and code is None:
            raise
        if code == errno.ENOSPC and where is not None:
            raise OutputError(f"{folder}: {space_problem(where, needed)}") from error
        raise OutputError(f"{folder}: cannot be written: {reason(error)}") from error


def reason(error: Exception) -> str:
    """An error in a few words."""
    code = _os_code(error)
    if code == errno.ENOSPC:
        return "the disk is full"
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        return "another process has written it meanwhile"
    if code is not None:
        return os.strerror(code)
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep orbax from warning about what is meant here, and from logging what it raises anyway."""
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda event: None
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # what else was under way ends and finds nobody to tell
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _os_code(error: Exception) -> int | None:
    """The system's number of an error; tensorstore puts it into the text of a ValueError."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)
