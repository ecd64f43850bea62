"""Opens a published model: one file of weights, a sharded set, or the folder that holds either.

    with open_checkpoint("DiT-XL-2-256") as checkpoint:
        print(checkpoint.config["_class_name"], checkpoint.total_bytes)

Where the weights lie is settled here; whether a file is sound, by its reader: `convert.safetensors`
or, for PyTorch's own files, `convert.torch_file`. A folder with both is read as safetensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.mapped_file import MappedFile, no_such_tensor
from convert.safetensors import TensorFile
from convert.safetensors_header import TensorInfo, parse_json, quote
from convert.torch_file import SUFFIXES, TorchFile, Weights, no_choice

MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class _Format:
    """How files of weights are called: `suffixes`, the first one where there are shards."""

    suffixes: tuple[str, ...]
    stems: tuple[str, ...]  # what diffusers and transformers call weights

    @property
    def index(self) -> str:
        return f"{self.suffixes[0]}.index.json"

    def files(self, folder: Path, *suffixes: str) -> list[Path]:
        """Files of these suffixes; hidden ones are temporary, or another system's forks."""
        visible = (path for path in folder.iterdir() if path.name[0] != ".")
        return sorted(path for path in visible if path.name.endswith(suffixes))


_SAFETENSORS = _Format(suffixes=(".safetensors",), stems=("diffusion_pytorch_model", "model"))
_TORCH = _Format(suffixes=SUFFIXES, stems=("diffusion_pytorch_model", "pytorch_model"))
_FORMATS = (_SAFETENSORS, _TORCH)
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.(safetensors|bin)$")
_FOREIGN = {
    ".pkl": "is a Python pickle: if torch.save wrote it, rename it to .pt",
    ".gguf": "is a GGUF file, quantised already: give the original .safetensors instead",
    ".onnx": "is an ONNX graph: give the .safetensors it was exported from",
    ".msgpack": "is a Flax checkpoint: give the PyTorch model's .safetensors",
    ".h5": "is a Keras checkpoint: give the PyTorch model's .safetensors",
}


class Checkpoint:
    """The tensors of one model, wherever its files put them. Opened by `open_checkpoint`.

    Attributes:
      source: the path that was opened: a file, an index, or what a folder led to.
      names: all tensors, sorted, so that the order is the same however the model is sharded.
      config: the `config.json` beside the weights, parsed; None when there is none.
      files: paths of the files of weights, sorted.
      notes: which part of the files was taken, and what was left, a line each.
      total_bytes: bytes of all tensors (the files are larger by their headers).
    """

    def __init__(self, source: Path, files: Iterable[MappedFile], config: dict[str, Any] | None):
        self.source = source
        self.config = config
        self._files = sorted(files, key=lambda file: file.path)
        self._owner = {name: file for file in self._files for name in file.names}
        self.names = tuple(sorted(self._owner))
        self.files = [file.path for file in self._files]
        self.notes = tuple(
            f"{file.path.name}: {note}" for file in self._files for note in file.notes
        )
        self.total_bytes = sum(self.info(name).nbytes for name in self.names)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file; arrays already read stay valid."""
        for file in self._files:
            file.close()

    def info(self, name: str) -> TensorInfo:
        """A tensor's dtype, shape, bytes and file. Raises CheckpointError for an unknown name."""
        return self._file(name).info(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of its file; see `MappedFile.read` (also for Raises)."""
        return self._file(name).read(name)

    def release(self, name: str) -> None:
        """Lets the pages of a tensor go; see `MappedFile.release`."""
        self._file(name).release(name)

    def digests(self, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
        """SHA-256 (hex) of each file by its name, streamed; `progress(bytes_done, bytes_all)`."""
        total = sum(file.size for file in self._files)
        done = 0

        def step(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        return {file.path.name: file.sha256(step) for file in self._files}

    def _file(self, name: str) -> MappedFile:
        try:
            return self._owner[name]
        except KeyError:
            raise CheckpointError(self.source, no_such_tensor(name, self.names)) from None


def open_checkpoint(path: str | os.PathLike[str], weights: Weights = "auto") -> Checkpoint:
    """Opens a model and checks all its headers; no tensor is read yet.

    Args:
      path: a file of weights (`.safetensors`, or PyTorch's `.pt`, `.pth`, `.bin`, `.ckpt`); an
        index (`*.safetensors.index.json`, `*.bin.index.json`), whose shards must lie beside it; or
        a folder. In a folder, in this order: `diffusion_pytorch_model` or `model` (`pytorch_model`
        of PyTorch's; one file or an index), the folder `transformer/`, the only index, the only
        file of weights.
      weights: "ema" or "model": that part of a training checkpoint. "auto": the moving average
        where there is one; `Checkpoint.notes` says what was taken.

    The index is the authority: a tensor that it does not list, lists elsewhere, or that two shards
    hold is refused. (Its `total_size` is not read: published ones are often wrong.)

    Raises:
      CheckpointError: nothing suitable is there, or something in it is wrong (everything, at once).
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(path, "does not exist; download the model first and give its folder")
    source = _find_in_folder(path) if path.is_dir() else path
    for form in _FORMATS:
        if source.name.endswith(form.index):
            _check_choice(source, weights)
            return _open_sharded(source, form)
    if not source.name.endswith(_SAFETENSORS.suffixes + _TORCH.suffixes):
        known = (
            f"expected {', '.join(_SAFETENSORS.suffixes + _TORCH.suffixes)}, an index or a folder"
        )
        raise CheckpointError(source, _FOREIGN.get(source.suffix.lower()) or known)
    config = _read_config(source.parent)
    return Checkpoint(source, [_open_file(source, weights)], config)


def _open_file(path: Path, weights: Weights = "auto") -> MappedFile:
    if path.name.endswith(_TORCH.suffixes):
        return TorchFile(path, weights)
    _check_choice(path, weights)
    return TensorFile(path)


def _check_choice(path: Path, weights: Weights) -> None:
    if weights != "auto":
        raise CheckpointError(path, no_choice(weights))


def _find_in_folder(folder: Path) -> Path:
    form = _SAFETENSORS
    if not form.files(folder, form.suffixes[0], form.index):
        form = _TORCH
    for stem in form.stems:
        pair = [folder / f"{stem}{form.suffixes[0]}", folder / f"{stem}{form.index}"]
        here = [path for path in pair if path.exists()]
        if len(here) == 2:
            both = f"holds both {pair[0].name} and {pair[1].name}; give the path of one"
            raise CheckpointError(folder, both)
        if here:
            return here[0]
    if (folder / "transformer").is_dir():
        return _find_in_folder(folder / "transformer")
    for suffixes in ((form.index,), form.suffixes):
        found = form.files(folder, *suffixes)
        names = _listed(path.name for path in found)
        if any(_SHARD.search(path.name) for path in found):
            raise CheckpointError(folder, f"holds shards without their index: {names}; get it")
        if len(found) > 1:
            raise CheckpointError(folder, f"holds {len(found)} candidates, give one: {names}")
        if found:
            return found[0]
    raise CheckpointError(folder, _nothing_in(folder))


def _nothing_in(folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        if foreign := _FOREIGN.get(path.suffix.lower()):
            return f"holds no weights that are read here; {path.name} {foreign}"
    names = _listed(path.name for path in sorted(folder.iterdir()))
    return f"holds no file of weights and no transformer/ folder, only: {names or 'nothing'}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(quote, names[:10])) + more


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(path, "is not a regular file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(path, f"is {size} bytes of JSON, over {MAX_JSON_BYTES}; wrong file?")
    value, problems = parse_json(path.read_bytes())
    if not problems and not isinstance(value, dict):
        problems = [f"must hold a JSON object, it holds {quote(value)}"]
    if problems:
        raise CheckpointError(path, problems)
    return value


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return _read_json(path) if path.exists() else None


def _open_sharded(index: Path, form: _Format) -> Checkpoint:
    weight_map, problems = _read_weight_map(index)
    config = _read_config(index.parent)
    files: dict[str, MappedFile] = {}
    for shard in sorted(set(weight_map.values())):
        problem = _shard_problem(index.parent, shard, form.suffixes[0])
        if problem:
            problems.append(problem)
            continue
        try:
            files[shard] = _open_file(index.parent / shard)
        except CheckpointError as error:
            problems += [f"shard {quote(shard)}: {problem}" for problem in error.problems]
    problems += _index_problems(weight_map, files)
    if problems:
        for file in files.values():
            file.close()
        raise CheckpointError(index, problems)
    return Checkpoint(index, files.values(), config)


def _read_weight_map(index: Path) -> tuple[dict[str, str], list[str]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = quote(weight_map)
        raise CheckpointError(index, f"weight_map must map tensors to files, it is {found}")
    problems = [
        f"weight_map[{quote(name)}] must be a file name, it is {quote(shard)}"
        for name, shard in weight_map.items()
        if not isinstance(shard, str)
    ]
    return {name: s for name, s in weight_map.items() if isinstance(s, str)}, problems


def _shard_problem(folder: Path, shard: str, suffix: str) -> str | None:
    """Why a shard named by an index must not be opened, or None."""
    label = f"shard {quote(shard)}"
    plain = re.fullmatch(r"[^/\\:\x00-\x1f\ud800-\udfff]+", shard)
    if not plain or not shard.endswith(suffix) or len(shard.encode()) > 255:
        return f"{label} must be the plain name of a {suffix} file beside the index"
    path = folder / shard
    if not path.exists():
        return f"{label} is named by the index but is not in the folder: download it"
    target, home = path.resolve(), folder.resolve()
    if target.parent == home or any(target.is_relative_to(blobs) for blobs in _blobs(home)):
        return None
    return f"{label} is a link that leaves the folder, to {quote(str(target))}"


def _blobs(home: Path) -> list[Path]:
    """Where the Hugging Face cache keeps what `snapshots/<revision>/...` links to."""
    return [up.parent / "blobs" for up in home.parents if up.name == "snapshots"]


def _index_problems(weight_map: dict[str, str], files: dict[str, MappedFile]) -> list[str]:
    holders: dict[str, list[str]] = {}
    for shard, file in files.items():
        for name in file.names:
            holders.setdefault(name, []).append(shard)
    problems = []
    for name, shards in sorted(holders.items()):
        listed = weight_map.get(name)
        where = " and ".join(map(quote, shards))
        if len(shards) > 1:
            problems.append(f"tensor {quote(name)} is in {len(shards)} shards: {where}")
        elif listed is None:
            problems.append(f"tensor {quote(name)} is in {where} but not in the index")
        elif listed != shards[0]:
            problems.append(f"tensor {quote(name)} is in {where}, the index says {quote(listed)}")
    for name, shard in sorted(weight_map.items()):
        if name not in holders and shard in files:
            problems.append(f"tensor {quote(name)} is in the index but not in {quote(shard)}")
    return problems
