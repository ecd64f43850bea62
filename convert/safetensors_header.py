"""The safetensors header: its dtypes, its parser, and every check made before data is touched.

A file is a u64-LE header length, that many bytes of JSON, then the data. The checks are those of
the reference reader and five it leaves out: a duplicate key with an identical range, leading white
space, extra keys in a record, an empty name, and a name that could climb out of a folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from convert.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_AXES = 32  # what numpy 1 can hold; published weights have at most 5
_MAX_TENSOR_BYTES = 2**63 - 1

# In the order of the reference writer, which sorts by it (descending) so that data is aligned.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}

# What people hand over under this name instead, by its first bytes.
_IMPOSTORS = (
    (b"version ", "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    (b"GGUF", "is a GGUF file: give the original .safetensors instead"),
    (b"PK\x03\x04", "is a zip, probably a PyTorch checkpoint: rename it to .pt"),
    (b"\x80\x02", "is a Python pickle, perhaps a PyTorch checkpoint: rename it to .pt"),
    ((b"<!", b"<html"), "is a web page, not the weights: download the file again"),
)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file, from byte `offset` of `path`.

    Attributes:
        nbytes: of the dense array.
        strides: step along each axis in elements, where the file holds it in another order than
            row-major or with gaps; None for the usual one.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Bytes of the file from the first element to the end of the last."""
        if self.strides is None or self.nbytes == 0:
            return self.nbytes
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (1 + last) * self.dtype.itemsize


def impostor(first: bytes) -> str | None:
    """What a file is, that is not what its name says, by its first bytes; None when unknown."""
    return next((problem for magic, problem in _IMPOSTORS if first.startswith(magic)), None)


def quote(value: Any) -> str:
    """A printable, short form of a value from an untrusted file (one line, no escapes)."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= 120 else ascii(value[:117]) + "..."
    if isinstance(value, (list, dict)):
        # never repr a container: it may be nested deeper than the interpreter's stack
        if isinstance(value, list) and len(value) <= MAX_AXES + 1:
            if not any(isinstance(item, (list, dict)) for item in value):
                return "[" + ", ".join(quote(item) for item in value) + "]"
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)


def parse_json(raw: bytes) -> tuple[Any, list[str]]:
    """Parses strict JSON: (value, problems). The value is None when it cannot be parsed.

    Refuses what Python's parser lets pass: duplicate keys, NaN and Infinity, integers over 20
    digits or a negative zero (they become floats, which no field accepts), and deep nesting.
    """
    duplicates: dict[str, None] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                duplicates[key] = None
            found[key] = value
        return found

    def integer(text: str) -> int | float:
        return float(text) if text == "-0" or len(text) > 20 else int(text)

    def constant(text: str) -> None:
        raise ValueError(f"the literal {text} is not JSON")

    hooks: dict[str, Any] = {"parse_int": integer, "parse_constant": constant}
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, **hooks)
    except UnicodeDecodeError as error:
        return None, [f"is not UTF-8 at byte {error.start} of its JSON"]
    except RecursionError:
        return None, ["nests its JSON too deeply; the file is damaged or hostile"]
    except ValueError as error:
        return None, [f"is not valid JSON: {error}"]
    return value, [f"the key {quote(key)} appears twice" for key in duplicates]


def name_problem(name: str) -> str | None:
    """Why a tensor must not be called this, or None."""
    if not name:
        return "a tensor has an empty name"
    if "\0" in name or not _encodes(name):
        return f"tensor {quote(name)}: the name holds a NUL or a lone surrogate"
    if name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
        return f"tensor {quote(name)}: the name is a path that leaves its folder"
    return None


def metadata_problems(metadata: Any) -> list[str]:
    """Why `__metadata__` is not a plain str -> str object; empty when it is."""
    if not isinstance(metadata, dict):
        return [f"__metadata__ must be an object of strings, it is {quote(metadata)}"]
    return [
        f"__metadata__[{quote(key)}] must be a string, it is {quote(value)}"
        for key, value in metadata.items()
        if not (isinstance(key, str) and isinstance(value, str) and _encodes(key + value))
    ]


def array_bytes(shape: Iterable[int], dtype: np.dtype) -> int:
    """Bytes of a dense array."""
    return math.prod(shape) * dtype.itemsize


def read_header(
    file: BinaryIO, path: Path, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of an open file of `size` bytes: (infos by name, metadata).

    Nothing is allocated from a number in the file before that number was checked.

    Raises:
      CheckpointError: every problem of the header and of the data's layout, at once.
    """
    length = _header_length(file.read(8), path, size)
    raw = file.read(length)
    if len(raw) != length:
        raise CheckpointError(path, f"header: read {len(raw)} of {length} bytes; file changed?")
    if raw[:1] != b"{":
        raise CheckpointError(path, f"the header must start with '{{', it starts {raw[:8]!r}")
    table, problems = parse_json(raw)
    if table is None:
        raise CheckpointError(path, [f"the header {problem}" for problem in problems])
    metadata = table.pop("__metadata__", {})
    problems += metadata_problems(metadata)

    infos: dict[str, TensorInfo] = {}
    for name, record in table.items():
        found = _read_record(name, record, problems)
        if found is not None:
            dtype, shape, (begin, end) = found
            at = 8 + length + begin
            infos[name] = TensorInfo(
                name=name, dtype=dtype, shape=shape, nbytes=end - begin, path=path, offset=at
            )
    # a hole next to a record that could not be read is that record's, not one more problem
    problems += _layout_problems(infos.values(), 8 + length, size, len(infos) == len(table))
    if problems:
        raise CheckpointError(path, problems)
    return infos, metadata


def _header_length(first: bytes, path: Path, size: int) -> int:
    if len(first) < 8:
        raise CheckpointError(path, f"is truncated: {size} bytes, a header needs at least 8")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        if problem := impostor(first):
            raise CheckpointError(path, problem)
        limit = f"the format allows {MAX_HEADER_BYTES}"
        raise CheckpointError(path, f"header length {length}, {limit}; not a safetensors file?")
    if length > size - 8:
        have = f"the file has {size - 8} after it: truncated, download it again"
        raise CheckpointError(path, f"header length {length}, {have}")
    return length


def _read_record(
    name: str, record: Any, problems: list[str]
) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]] | None:
    """One record as (dtype, shape, span), or None after appending what is wrong with it."""
    before = len(problems)
    problem = name_problem(name)
    if problem:
        problems.append(problem)
    label = f"tensor {quote(name)}: "
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        has = [str(key) for key in record] if isinstance(record, dict) else record
        problems.append(
            f"{label}the record must be {{dtype, shape, data_offsets}}, it has {quote(has)}"
        )
        return None
    code, shape, span = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        problems.append(f"{label}dtype {quote(code)} is not one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or len(shape) > MAX_AXES:
        rule = f"at most {MAX_AXES} non-negative integers"
        problems.append(f"{label}shape must be {rule}, it is {quote(shape)}")
    if not _is_sizes(span) or len(span) != 2 or span[0] > span[1]:
        rule = "two integers, begin <= end"
        problems.append(f"{label}data_offsets must be {rule}, they are {quote(span)}")
    if len(problems) > before:
        return None
    dtype, text = DTYPES[code], f"{label}shape {quote(shape)} of {code}"
    # zeros left out: an empty array with a huge other axis cannot be indexed either
    if array_bytes((axis for axis in shape if axis), dtype) > _MAX_TENSOR_BYTES:
        problems.append(f"{text} overflows 63 bits")
    elif array_bytes(shape, dtype) != span[1] - span[0]:
        size = f"{array_bytes(shape, dtype)} bytes, its data_offsets hold {span[1] - span[0]}"
        problems.append(f"{text} needs {size}")
    else:
        return dtype, tuple(shape), (span[0], span[1])
    return None


def _layout_problems(
    infos: Iterable[TensorInfo], start: int, size: int, complete: bool
) -> list[str]:
    """Overlaps, holes, trailing bytes and ranges beyond the file, in bytes of the data section."""
    spans = sorted((t.offset - start, t.offset - start + t.nbytes, t.name) for t in infos)
    beyond = [span for span in spans if span[1] > size - start]
    problems = []
    if beyond:
        reach = f"{len(beyond)} tensor(s) reach beyond it, the first is {_span(*beyond[0])}"
        problems.append(f"the data has {size - start} bytes but {reach}: truncated?")
    cursor, last = 0, "the header"
    for begin, end, name in spans:
        if begin < cursor:
            problems.append(f"{_span(begin, end, name)} overlaps {last}, ending at {cursor}")
        elif begin > cursor and complete:
            problems.append(f"{_span(begin, end, name)} leaves a hole after {last}, at {cursor}")
        cursor, last = max((cursor, last), (end, quote(name)))
    if complete and cursor < size - start:
        extra = f"the tensors end at byte {cursor} of the data, which has {size - start}"
        problems.append(f"{size - start - cursor} trailing bytes: {extra}")
    return problems


def _span(begin: int, end: int, name: str) -> str:
    return f"tensor {quote(name)} [{begin}, {end})"


def _is_sizes(value: Any) -> bool:
    """A list of non-negative ints; `type is int` because True is an int too."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _encodes(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell and UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
