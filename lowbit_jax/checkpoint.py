"""Quantised checkpoints: one orbax checkpoint per layer plus a `manifest.json`.

    DIR/manifest.json               what every tensor is, its digest, recipe, config, versions
    DIR/params/outer/               orbax PyTree: everything outside the stacks
    DIR/params/double_blocks.3/     orbax PyTree: one layer of a stack

A layer at a time is written and read, so neither side ever holds more than one layer besides the
tree itself, and a converter need not hold the tree. The folder appears under its name only when whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lowbit_jax.quant.qtensor import LAYOUT_VERSION, QTensor
from lowbit_jax.quant.recipe import Recipe
from lowbit_jax.quant.stacks import is_stack, runs, segments
from pallas_kernels import packing

FORMAT_VERSION = 1
OUTER = "outer"  # the part that holds everything outside the stacks

Part = dict[str, Any]  # "img_attn/qkv/kernel" -> array or QTensor


class SavedModelError(ValueError):
    """A saved model that is missing, incomplete, damaged or of another version."""


class OutputError(OSError):
    """The output folder cannot be written; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A loaded checkpoint.

    Attributes:
        params: parameter tree, jax arrays and `QTensor`s, stacked for `BlockStack`.
        model: name of the network in `lowbit_jax.models.registry`.
        config: its config fields.
        recipe: how it was quantised.
        manifest: the whole manifest.
    """

    params: dict[str, Any]
    model: str
    config: dict[str, Any]
    recipe: Recipe
    manifest: dict[str, Any]


class Writer:
    """Writes a checkpoint part by part; use as a context manager, then call `finish`.

    Everything goes to a temporary folder beside `folder`, which is renamed by `finish` and removed
    when the `with` block is left without it.

    Args:
        folder: where the checkpoint will be.
        overwrite: replace a folder that exists.
        archive: store ternary codes five to the byte (`packing.pack_trits`); unpacked on load.

    Raises:
        OutputError: the folder exists and may not be replaced, or the disk is full.
    """

    def __init__(self, folder: str | os.PathLike, *, overwrite: bool = False, archive: bool = False):
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.archive = archive
        self.parts: dict[str, dict[str, Any]] = {}
        self._temporary = self.folder.with_name(f".{self.folder.name}.partial-{os.getpid()}")
        check_output(self.folder, overwrite)

    def __enter__(self) -> Writer:
        with _disk_errors(self.folder):
            (self._temporary / "params").mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def write(self, name: str, part: Part) -> None:
        """Store one part; arrays may be numpy or jax."""
        arrays: dict[str, np.ndarray] = {}
        self.parts[name] = {path: self._describe(path, leaf, arrays) for path, leaf in part.items()}
        with _disk_errors(self.folder), _quiet_orbax():
            _orbax().save(self._temporary / "params" / _file_name(name), args=ocp.args.PyTreeSave(arrays))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and give the folder its name."""
        document = {
            "format": "lowbit-jax",
            "format_version": FORMAT_VERSION,
            "layout_version": LAYOUT_VERSION,
            "versions": library_versions(),
            **manifest,
            "parts": self.parts,
        }
        with _disk_errors(self.folder):
            with open(self._temporary / "manifest.json", "w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            check_output(self.folder, self.overwrite)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self._temporary.rename(self.folder)

    def _describe(self, path: str, leaf: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        if not isinstance(leaf, QTensor):
            return {"kind": "array", **_store(path, leaf, arrays)}
        spec: dict[str, Any] = {
            "kind": "qtensor",
            "format": leaf.format,
            "shape": list(leaf.shape),
            "group": leaf.group,
            "act_bits": leaf.act_bits,
        }
        codes = leaf.codes
        if self.archive and leaf.format == "ternary":
            codes = packing.pack_trits(packing.unpack(jnp.asarray(codes), 2, leaf.shape[1]))
            spec["codes_as"] = "trits"
        spec["codes"] = _store(f"{path}/codes", codes, arrays)
        spec["scale"] = _store(f"{path}/scale", leaf.scale, arrays)
        if leaf.zero is not None:
            spec["zero"] = _store(f"{path}/zero", leaf.zero, arrays)
        return spec


def save(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    *,
    model: str,
    config: Mapping[str, Any],
    recipe: Recipe,
    overwrite: bool = False,
    archive: bool = False,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Save a parameter tree with what is needed to load it: no recipe has to be given then.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    with Writer(folder, overwrite=overwrite, archive=archive) as writer:
        for name, part in iter_parts(params):
            writer.write(name, part)
        writer.finish(
            {"model": model, "config": dict(config), "recipe": recipe.to_json(), "source": source}
        )


def load(folder: str | os.PathLike, *, verify: bool = True) -> SavedModel:
    """Load a checkpoint, checking the digest of every tensor.

    Args:
        folder: a folder written by `save` or `convert_and_quantize`.
        verify: compare digests (sha256); switch off only for files you have just checked.

    Raises:
        SavedModelError: not a finished checkpoint, a newer version, or a damaged tensor (named).
    """
    manifest = read_manifest(folder)
    try:
        recipe = Recipe.from_json(manifest["recipe"])
        parts = ((name, read_part(folder, manifest, name, verify)) for name in manifest["parts"])
        params = assemble(parts)
        return SavedModel(
            params=jax.tree.map(jnp.asarray, params),
            model=manifest["model"],
            config=manifest["config"],
            recipe=recipe,
            manifest=manifest,
        )
    except KeyError as error:
        raise SavedModelError(f"{folder}: manifest.json lacks {error}") from None


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The parsed manifest; raises `SavedModelError` when there is none or its version is unknown."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise SavedModelError(f"{folder}: no manifest.json, so not a finished lowbit-jax checkpoint")
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SavedModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "lowbit-jax":
        raise SavedModelError(f"{path}: not a lowbit-jax manifest")
    for key, known in (("format_version", FORMAT_VERSION), ("layout_version", LAYOUT_VERSION)):
        if manifest.get(key) != known:
            raise SavedModelError(
                f"{path}: {key} is {manifest.get(key)}, this library reads {known}; "
                "update lowbit-jax or convert again"
            )
    return manifest


def read_part(folder: str | os.PathLike, manifest: Mapping, name: str, verify: bool = True) -> Part:
    """One part as numpy arrays and `QTensor`s of numpy arrays."""
    specs = manifest["parts"][name]
    path = (Path(folder) / "params" / _file_name(name)).absolute()
    try:
        with _quiet_orbax():
            wanted = dict.fromkeys(_stored_names(specs), ocp.RestoreArgs(restore_type=np.ndarray))
            arrays = _orbax().restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SavedModelError(f"{path}: cannot be read ({reason[:200]}); convert again") from error
    if verify:
        _verify(path, specs, arrays)
    return {leaf: _restore_leaf(leaf, spec, arrays) for leaf, spec in specs.items()}


def abstract_parts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """The parts a manifest describes, as shapes; ternary codes as they are in memory."""
    for name, specs in manifest["parts"].items():
        yield name, {path: _abstract_leaf(spec) for path, spec in specs.items()}


def iter_parts(params: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """Cut a parameter tree into parts: `OUTER` first, then "stack/layer" for every stacked layer.

    Works on trees of `jax.ShapeDtypeStruct` too.
    """
    yield OUTER, dict(_flatten({k: v for k, v in params.items() if not is_stack(v)}))
    for key, stack in params.items():
        if not is_stack(stack):
            continue
        for first, length, tree in segments(stack):
            flat = dict(_flatten(tree))
            for index in range(length):
                yield f"{key}/{first + index}", {p: _layer(v, index) for p, v in flat.items()}


def assemble(parts: Iterable[tuple[str, Part]]) -> dict[str, Any]:
    """Inverse of `iter_parts`: consecutive layers of equal structure and formats become one segment."""
    params: dict[str, Any] = {}
    stacks: dict[str, dict[int, Part]] = {}
    for name, part in parts:
        if name == OUTER:
            params.update(_unflatten(part))
        else:
            key, layer = name.rsplit("/", 1)
            stacks.setdefault(key, {})[int(layer)] = part
    for key, layers in stacks.items():
        if sorted(layers) != list(range(len(layers))):
            raise SavedModelError(f"{key}: layers {sorted(layers)} are not 0 to {len(layers) - 1}")
        params[key] = _stack_layers([layers[i] for i in range(len(layers))])
    return params


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what is written."""
    names = ("lowbit-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "ml_dtypes")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise `OutputError` when `folder` may not be written."""
    if not folder.exists():
        return
    if not overwrite:
        raise OutputError(f"{folder}: exists already; choose another --out or pass --overwrite")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "manifest.json").is_file()):
        raise OutputError(f"{folder}: not a lowbit-jax checkpoint, so --overwrite will not delete it")


def _layer(value: Any, index: int) -> Any:
    """One layer of a stacked array, QTensor, or shape."""

    def take(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[index]

    return jax.tree.map(take, value)


def _stack_layers(layers: list[Part]) -> dict[str, Any]:
    signatures = [_signature(layer) for layer in layers]
    out = {}
    for start, stop in runs(signatures):
        run = layers[start:stop]
        out[str(start)] = _unflatten(
            {path: jax.tree.map(lambda *leaf: np.stack(leaf), *(p[path] for p in run)) for path in run[0]}
        )
    return out


def _signature(layer: Part) -> tuple:
    leaves, structure = jax.tree.flatten(layer)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _unflatten(part: Part) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in part.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _file_name(part: str) -> str:
    return part.replace("/", ".")


def _store(path: str, leaf: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    array = np.ascontiguousarray(leaf)
    arrays[path.replace("/", ".")] = array
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _digest(array)}


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _stored(specs: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(stored name, {shape, dtype, sha256}) of every array of a part."""
    for path, spec in specs.items():
        name = path.replace("/", ".")
        if spec["kind"] == "array":
            yield name, spec
        else:
            for field in ("codes", "scale", "zero"):
                if field in spec:
                    yield f"{name}.{field}", spec[field]


def _stored_names(specs: Mapping[str, Any]) -> list[str]:
    return [name for name, _ in _stored(specs)]


def _verify(path: Path, specs: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    for name, expected in _stored(specs):
        array = arrays[name]
        found = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _digest(array)}
        for key, value in found.items():
            if value != expected[key]:
                raise SavedModelError(
                    f"{path}: tensor {name} is damaged ({key} {value}, manifest says {expected[key]})"
                )


def _restore_leaf(path: str, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    name = path.replace("/", ".")
    if spec["kind"] == "array":
        return arrays[name]
    codes = arrays[f"{name}.codes"]
    if spec.get("codes_as") == "trits":
        codes = np.asarray(packing.pack(packing.unpack_trits(jnp.asarray(codes), spec["shape"][1]), 2, pad=1))
    return _qtensor(spec, codes, arrays[f"{name}.scale"], arrays.get(f"{name}.zero"))


def _abstract_leaf(spec: Mapping[str, Any]) -> Any:
    def shape(field: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(field["shape"]), jnp.dtype(field["dtype"]))

    if spec["kind"] == "array":
        return shape(spec)
    codes = shape(spec["codes"])
    if spec.get("codes_as") == "trits":
        n, k = spec["shape"]
        codes = jax.ShapeDtypeStruct((n, packing.packed_size(k, 2)), jnp.uint8)
    zero = shape(spec["zero"]) if "zero" in spec else None
    return _qtensor(spec, codes, shape(spec["scale"]), zero)


def _qtensor(spec: Mapping[str, Any], codes: Any, scale: Any, zero: Any) -> QTensor:
    return QTensor(
        codes=codes,
        scale=scale,
        zero=zero,
        format=spec["format"],
        shape=tuple(spec["shape"]),
        group=spec["group"],
        act_bits=spec["act_bits"],
    )


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax warns about temporary folders and missing shardings, which are meant here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn whatever a full or read-only disk makes orbax and the system raise into `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "ENOSPC" in text:
            free = shutil.disk_usage(folder.absolute().parent).free
            raise OutputError(f"{folder}: the disk is full ({free / 1e6:.0f} MB free)") from error
        if isinstance(error, OSError):
            raise OutputError(f"{folder}: cannot be written: {error.strerror or text}") from error
        raise
