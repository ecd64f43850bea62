"""The layout of `torch.save` before PyTorch 1.6, and since with `_use_new_zipfile_serialization`
off: five pickles (a magic number, a version, the writer's system, the object, the storages' keys),
then each storage as a count of elements and its bytes.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.torch_pickle import Pickle, read_pickle

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_legacy(data: mmap.mmap, path: Path, size: int) -> tuple[Pickle, dict[str, int]]:
    """The object of a legacy file and where each of its storages begins (bytes, by key).

    Raises:
        CheckpointError: not this layout, or one whose parts do not fill the file exactly.
    """
    found = read_pickle(data, path, 0, size)
    if found.value != MAGIC or type(found.value) is not int:
        problem = "is a Python pickle, but not one that torch.save wrote"
        raise CheckpointError(path, problem)
    version = read_pickle(data, path, found.end, size)
    if version.value != VERSION or type(version.value) is not int:
        raise CheckpointError(path, f"legacy format: the version is not {VERSION}")
    system = read_pickle(data, path, version.end, size)
    if type(system.value) is not dict or system.value.get("little_endian") is not True:
        raise CheckpointError(path, "legacy format: written on a big-endian machine")
    content = read_pickle(data, path, system.end, size)
    keys = read_pickle(data, path, content.end, size)
    return content, _storages(data, path, size, content, keys)


def _storages(
    data: mmap.mmap, path: Path, size: int, content: Pickle, keys: Pickle
) -> dict[str, int]:
    _check_keys(path, keys.value, content)
    at, starts = keys.end, {}
    for key in keys.value:
        storage = content.storages[key]
        count = int.from_bytes(data[at : at + 8], "little")
        if at + 8 > size or count != storage.count:
            both = f"{count} elements where it lies, {storage.count} where it is used"
            raise CheckpointError(path, f"storage {quote(key)} has {both}: damaged or truncated")
        starts[key] = at + 8
        at += 8 + storage.nbytes
        if at > size:
            ends = f"ends at byte {at}, the file has {size}: truncated"
            raise CheckpointError(path, f"storage {quote(key)} {ends}")
    if at != size:
        raise CheckpointError(path, f"{size - at} trailing bytes after the last storage")
    return starts


def _check_keys(path: Path, keys: Any, content: Pickle) -> None:
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CheckpointError(path, "legacy format: the storages' keys are not a list of strings")
    if len(set(keys)) != len(keys):
        raise CheckpointError(path, "legacy format: a storage's key appears twice")
    if set(keys) != set(content.storages):
        odd = sorted(set(keys) ^ set(content.storages))
        problem = f"storage {quote(odd[0])} is used and not stored, or stored and not used"
        raise CheckpointError(path, problem)
