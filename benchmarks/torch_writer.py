"""Writes the files of `torch.save` without torch, one tensor in memory at a time."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.safetensors import TensorSpec

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


def write_torch(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """A state dict as a zip of one storage for each tensor; float32, float16 and bfloat16."""
    items = b"".join(
        _text(name) + _tensor(str(key), spec) for key, (name, spec) in enumerate(tensors.items())
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + items + b"u.")
        archive.writestr("archive/byteorder", "little")
        for key, spec in enumerate(tensors.values()):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(spec.make()).reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


# the opcodes of pickle's protocol 2 that push a value
def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def _tensor(key: str, spec: TensorSpec) -> bytes:
    kind = f"ctorch\n{_STORAGES[np.dtype(spec.dtype)]}\n".encode()
    count = int(np.prod(spec.shape, dtype=np.int64))
    stored = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _number(count)) + b"Q"
    strides = [
        int(np.prod(spec.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(spec.shape))
    ]
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = _tuple(
        stored,
        _number(0),
        _tuple(*map(_number, spec.shape)),
        _tuple(*map(_number, strides)),
        b"\x89",
        hooks,
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
