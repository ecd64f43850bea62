"""What a PyTorch checkpoint may hold, as inert values, and the names it may mention.

`convert.torch_pickle` reads a file into these; nothing here is a torch object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from convert.safetensors_header import MAX_AXES, array_bytes, quote

_TYPES = {
    "Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
    "Char": np.int8, "Short": np.int16, "Int": np.int32, "Long": np.int64, "Byte": np.uint8,
    "Bool": np.bool_,
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": np.dtype(type_) for name, type_ in _TYPES.items()} | {
    "torch.storage.UntypedStorage": np.dtype(np.uint8)
}
DTYPES = {
    f"torch.{name}": np.dtype(type_)
    for name, type_ in {
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
        "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32,
        "float64": np.float64, "int8": np.int8, "int16": np.int16, "int32": np.int32,
        "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
        "uint64": np.uint64, "bool": np.bool_,
    }.items()
}  # fmt: skip
# classes that training programs keep beside the weights
INERT = frozenset(
    [
        "argparse.Namespace", "collections.defaultdict", "collections.Counter", "_codecs.encode",
        "pathlib.PosixPath", "pathlib.PurePosixPath", "torch.device",
        "numpy.dtype", "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
          for name in ("scalar", "_reconstruct")),
        *(f"{module}.{name}" for module in ("builtins", "__builtin__")
          for name in ("bool", "dict", "float", "int", "list", "set", "str", "tuple")),
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle refers to; never the thing itself."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for an object of a class that is not read; only its name is kept."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A run of `count` elements that the file keeps under `key`."""

    key: str
    dtype: np.dtype
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A view of a storage: offset and strides in elements; it lies inside the storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def outside(
    storage: Storage,
    dtype: np.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> str | None:
    """Why a view does not lie in its storage, element for element, or None."""
    have = storage.nbytes // dtype.itemsize
    last = -1  # nothing is touched
    if 0 not in shape:
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    text = f"shape {quote(list(shape))}, stride {quote(list(strides))}, offset {offset}"
    if offset + last >= have and offset + last >= 0:
        return f"{text} leaves storage {quote(storage.key)} of {have} elements"
    if array_bytes((axis for axis in shape if axis), dtype) >= 2**63:
        return f"{text} overflows 63 bits"
    if array_bytes(shape, dtype) > have * dtype.itemsize:
        return f"{text} repeats the {have} elements of its storage: re-save it contiguous"
    return None


def is_size(value: Any) -> bool:
    """A number from 0 that fits 63 bits; `type is int` because True is an int too."""
    return type(value) is int and 0 <= value < 2**63


def is_sizes(value: Any) -> bool:
    """A tuple of sizes, as shapes and strides are."""
    return type(value) is tuple and len(value) <= MAX_AXES and all(map(is_size, value))
