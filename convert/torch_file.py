"""PyTorch checkpoints (.pt, .pth, .bin, .ckpt) without torch and without running their pickle.

    with TorchFile("DiT-XL-2-256x256.pt") as file:
        print(file.notes)            # which of its parts was taken, what was left
        use(file.read(file.names[0]))

Only tensors in plain containers are read, see `convert.torch_pickle`; where they lie is
`convert.torch_zip` and `convert.torch_legacy`. A training program saves more than one set of
weights: the moving average is preferred, as the published samplers prefer it.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO, Literal, get_args

from convert.errors import CheckpointError
from convert.mapped_file import MappedFile
from convert.safetensors_header import TensorInfo, array_bytes, impostor, name_problem, quote
from convert.torch_legacy import read_legacy
from convert.torch_values import Opaque, StoredTensor
from convert.torch_zip import read_zip

Weights = Literal["auto", "ema", "model"]
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")  # the first one is that of shards
# what training programs call them: DiT and Latte, PixArt; and DeepSpeed's
PARTS = {"ema": ("ema", "state_dict_ema"), "model": ("model", "state_dict", "module")}
PREFIXES = ("module.", "_orig_mod.")  # of parallel and of compiled modules


class TorchFile(MappedFile):
    """One file of `torch.save`; see `MappedFile`.

    Args:
        path: the file.
        weights: "ema" or "model" for one part of a training checkpoint; "auto" takes the moving
            average where there is one. `notes` says what was taken.

    Raises:
        CheckpointError: damaged, asking for anything but tensors, or without such a part.
    """

    def __init__(self, path: str | os.PathLike[str], weights: Weights = "auto"):
        if weights not in get_args(Weights):
            raise ValueError(f"weights {weights!r} is none of: {', '.join(get_args(Weights))}")
        self._weights = weights
        super().__init__(path)

    def _parse(self, file: BinaryIO) -> dict[str, TensorInfo]:
        first = file.read(16)
        if first.startswith(b"PK\x03\x04"):
            content, starts = read_zip(self._mapping(), self.path, self.size)
        elif first.startswith(b"\x80"):
            content, starts = read_legacy(self._mapping(), self.path, self.size)
        else:
            unknown = f"starts {first[:8]!r}, not as a file of torch.save does"
            raise CheckpointError(self.path, impostor(first) or unknown)
        tensors = self._choose(content.value)
        self._check(tensors)
        tensors = self._strip(tensors)
        return {name: self._info(name, value, starts) for name, value in tensors.items()}

    def _choose(self, value: Any) -> dict[Any, Any]:
        """The weights among what the file holds; `notes` says which."""
        if type(value) is not dict or not value:
            kind = value.name if isinstance(value, Opaque) else f"a {type(value).__name__}"
            raise CheckpointError(self.path, f"holds {kind}, not a dict of tensors")
        found = {
            part: [key for key in keys if type(value.get(key)) is dict]
            for part, keys in PARTS.items()
        }
        if not (found["ema"] or found["model"]):
            if self._weights != "auto":
                raise CheckpointError(self.path, no_choice(self._weights))
            return value
        part = self._weights
        if part == "auto":
            part = "ema" if found["ema"] else "model"
        if len(found[part]) != 1:
            keys = ", ".join(map(quote, found[part])) or f"none of {', '.join(PARTS[part])}"
            raise CheckpointError(self.path, f"weights '{part}': it holds {keys}; {_keys(value)}")
        key = found[part][0]
        if not value[key]:
            raise CheckpointError(self.path, f"{quote(key)} is empty; {_keys(value)}")
        left = ", ".join(quote(other) for other in value if other != key)
        self.notes = (f"took {quote(key)}; left {left or 'nothing'}",)
        return value[key]

    def _check(self, tensors: dict[Any, Any]) -> None:
        """Refuse, all at once, what is not a tensor under a usable name."""
        problems = []
        for name, value in tensors.items():
            if type(name) is not str:
                problems.append(f"{quote(name)} is not the name of a tensor")
            elif not _is_tensor(value):
                kind = value.name if isinstance(value, Opaque) else type(value).__name__
                problems.append(f"{quote(name)} is no tensor but {quote(kind)}")
            elif problem := name_problem(name):
                problems.append(problem)
        if problems and not any(map(_is_tensor, tensors.values())):
            problems = [f"holds no tensors and none of {PARTS['ema'] + PARTS['model']}; "
                        f"{_keys(tensors)}"]  # fmt: skip
        if problems:
            raise CheckpointError(self.path, problems)

    def _strip(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Take a wrapper's prefix off the names, if every one of them has it."""
        for prefix in PREFIXES:
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                self.notes += (f"took the prefix '{prefix}' off every name",)
        return tensors

    def _info(self, name: str, tensor: StoredTensor, starts: dict[str, int]) -> TensorInfo:
        dtype, shape = tensor.dtype, tensor.shape
        return TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            nbytes=array_bytes(shape, dtype),
            path=self.path,
            offset=starts[tensor.storage.key] + tensor.offset * dtype.itemsize,
            strides=None if _is_row_major(tensor) else tensor.strides,
        )


def no_choice(weights: Weights) -> str:
    """The problem line for a part asked of a file that has only one."""
    return f"holds one set of tensors, --weights {weights} has nothing to choose; leave it out"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor)


def _is_row_major(tensor: StoredTensor) -> bool:
    expected = 1
    for n, step in zip(tensor.shape[::-1], tensor.strides[::-1], strict=True):
        if n != 1 and step != expected:  # the step along an axis of one element means nothing
            return 0 in tensor.shape
        expected *= n
    return True


def _keys(value: dict[Any, Any]) -> str:
    keys = [quote(key) for key in value]
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return f"its keys are {', '.join(keys[:10])}{more}"
