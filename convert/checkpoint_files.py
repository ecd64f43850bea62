"""Opens a published model: one safetensors file, a sharded set, or the folder that holds either.

    with open_checkpoint("DiT-XL-2-256") as checkpoint:
        print(checkpoint.config["_class_name"], checkpoint.total_bytes)

Where the weights lie is settled here, whether a file is sound in `convert.safetensors_header`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.safetensors import TensorFile, no_such_tensor
from convert.safetensors_header import TensorInfo, parse_json, quote

MAX_JSON_BYTES = 64 << 20
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.safetensors$")
_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call weights
_PICKLE = (
    "is a PyTorch pickle, which can run code when it is loaded: in an environment you trust, load "
    "it with torch.load(path, weights_only=True), write it with safetensors.torch.save_file, and "
    "give that file"
)
_FOREIGN = {
    **dict.fromkeys((".bin", ".ckpt", ".pt", ".pth", ".pkl"), _PICKLE),
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
      files: paths of the safetensors files, sorted.
      total_bytes: bytes of all tensors (the files are larger by their headers).
    """

    def __init__(self, source: Path, files: Iterable[TensorFile], config: dict[str, Any] | None):
        self.source = source
        self.config = config
        self._files = sorted(files, key=lambda file: file.path)
        self._owner = {name: file for file in self._files for name in file.names}
        self.names = tuple(sorted(self._owner))
        self.files = [file.path for file in self._files]
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
        """A tensor as a read-only view of its file; see `TensorFile.read` (also for Raises)."""
        return self._file(name).read(name)

    def release(self, name: str) -> None:
        """Lets the pages of a tensor go; see `TensorFile.release`."""
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

    def _file(self, name: str) -> TensorFile:
        try:
            return self._owner[name]
        except KeyError:
            raise CheckpointError(self.source, no_such_tensor(name, self.names)) from None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model and checks all its headers; no tensor is read yet.

    Args:
      path: a `.safetensors` file; a `*.safetensors.index.json`, whose shards must lie beside it; or
        a folder. In a folder, in this order: `diffusion_pytorch_model` or `model` (one file or an
        index), the folder `transformer/`, the only index, the only `.safetensors`.

    The index is the authority: a tensor that it does not list, lists elsewhere, or that two shards
    hold is refused. (Its `total_size` is not read: published ones are often wrong.)

    Raises:
      CheckpointError: nothing suitable is there, or something in it is wrong (everything, at once).
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(path, "does not exist; download the model first and give its folder")
    source = _find_in_folder(path) if path.is_dir() else path
    if source.name.endswith(_INDEX):
        return _open_sharded(source)
    if source.suffix != ".safetensors":
        known = f"expected .safetensors, *{_INDEX} or a folder"
        raise CheckpointError(source, _foreign(source) or known)
    config = _read_config(source.parent)
    return Checkpoint(source, [TensorFile(source)], config)


def _foreign(path: Path) -> str | None:
    """What to say about a file of another format, by its name."""
    if path.name.endswith(".bin.index.json"):
        return "is the index of a pickled checkpoint: give the model's .safetensors version"
    return _FOREIGN.get(path.suffix.lower())


def _find_in_folder(folder: Path) -> Path:
    for stem in _STEMS:
        pair = [folder / f"{stem}.safetensors", folder / f"{stem}{_INDEX}"]
        here = [path for path in pair if path.exists()]
        if len(here) == 2:
            both = f"holds both {pair[0].name} and {pair[1].name}; give the path of one"
            raise CheckpointError(folder, both)
        if here:
            return here[0]
    if (folder / "transformer").is_dir():
        return _find_in_folder(folder / "transformer")
    for pattern in (f"*{_INDEX}", "*.safetensors"):
        # hidden files are temporary ones, or the resource forks of another system
        found = sorted(path for path in folder.glob(pattern) if path.name[0] != ".")
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
        if _foreign(path):
            return f"holds no .safetensors; {path.name} {_foreign(path)}"
    names = _listed(path.name for path in sorted(folder.iterdir()))
    return f"holds no .safetensors and no transformer/ folder, only: {names or 'nothing'}"


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


def _open_sharded(index: Path) -> Checkpoint:
    weight_map, problems = _read_weight_map(index)
    config = _read_config(index.parent)
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        problem = _shard_problem(index.parent, shard)
        if problem:
            problems.append(problem)
            continue
        try:
            files[shard] = TensorFile(index.parent / shard)
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


def _shard_problem(folder: Path, shard: str) -> str | None:
    """Why a shard named by an index must not be opened, or None."""
    label = f"shard {quote(shard)}"
    plain = re.fullmatch(r"[^/\\:\x00-\x1f\ud800-\udfff]+\.safetensors", shard)
    if not plain or len(shard.encode()) > 255:
        return f"{label} must be the plain name of a .safetensors file beside the index"
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


def _index_problems(weight_map: dict[str, str], files: dict[str, TensorFile]) -> list[str]:
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
