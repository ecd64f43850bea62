"""Quantised checkpoints: one orbax checkpoint per layer plus a `manifest.json`.

    DIR/manifest.json               what every tensor is, its digest, recipe, config, versions
    DIR/params/outer/               orbax PyTree: everything outside the stacks
    DIR/params/double_blocks.3/     orbax PyTree: one layer of a stack

A layer at a time is written, so a converter need not hold the tree. The folder appears under its
name only when whole.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from lowbit_jax.checkpoint_leaves import (
    abstract_leaf,
    damage,
    restore_leaf,
    store_leaf,
    stored_arrays,
)
from lowbit_jax.checkpoint_parts import OUTER, Part, assemble, iter_parts
from lowbit_jax.quant.qtensor import LAYOUT_VERSION
from lowbit_jax.quant.recipe import Recipe

__all__ = [
    "OUTER",
    "OutputError",
    "Part",
    "SavedModel",
    "SavedModelError",
    "Writer",
    "abstract_parts",
    "assemble",
    "check_output",
    "iter_parts",
    "library_versions",
    "load",
    "read_manifest",
    "read_part",
    "save",
]

FORMAT_VERSION = 1

# asyncio logs, when it forgets them, the failed reads beside the one that was raised
logging.getLogger("asyncio").addFilter(lambda r: "tensorstore_spec" not in r.getMessage())


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
    when the `with` block is left without it. Missing parents of `folder` are made (and removed
    again); a link is followed.

    Args:
        folder: where the checkpoint will be.
        overwrite: replace a checkpoint that exists.
        archive: store ternary codes five to the byte (`packing.pack_trits`); unpacked on load.

    Attributes:
        parts: manifest entries of what was written so far, see `abstract_parts`.

    Raises:
        OutputError: the folder exists and may not be replaced, or cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike, *, overwrite: bool = False, archive: bool = False
    ):
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.archive = archive
        self.parts: dict[str, dict[str, Any]] = {}
        check_output(self.folder, overwrite)
        self._target = Path(os.path.realpath(self.folder))
        name = f".{self._target.name}.partial-{secrets.token_hex(4)}"
        self._temporary = self._target.with_name(name)
        self._replaced = self._target.with_name(f"{name}-replaced")
        self._made = [p for p in self._target.parents if not p.exists()]  # innermost first

    def __enter__(self) -> Writer:
        try:
            with _disk_errors(self.folder):
                (self._temporary / "params").mkdir(parents=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        for parent in self._made:
            with contextlib.suppress(OSError):  # it holds the checkpoint, or what others put there
                parent.rmdir()

    def write(self, name: str, part: Part) -> None:
        """Store one part; arrays may be numpy or jax."""
        arrays: dict[str, np.ndarray] = {}
        self.parts[name] = {
            path: store_leaf(path, leaf, arrays, self.archive) for path, leaf in part.items()
        }
        path = self._temporary / "params" / _file_name(name)
        with _disk_errors(self.folder), _quiet_orbax():
            self._check_space(sum(array.nbytes for array in arrays.values()))
            try:
                _orbax().save(path, args=ocp.args.PyTreeSave(arrays))
            except BaseException:
                self._discard_after_failure()
                raise

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
            check_output(self.folder, self.overwrite)  # again: it took a while
            self._rename()

    def _check_space(self, needed: int) -> None:
        disk = shutil.disk_usage(self._temporary)
        if disk.free < needed and disk.total:
            raise OutputError(
                f"{self.folder}: the disk is full: {disk.free / 1e6:,.1f} MB free, the next layer "
                f"takes {needed / 1e6:,.1f} MB"
            )

    def _discard_after_failure(self) -> None:
        """Orbax leaves writes under way when one fails; they make the folder anew for a while."""
        atexit.register(shutil.rmtree, self._temporary, ignore_errors=True)
        for _ in range(20):
            shutil.rmtree(self._temporary, ignore_errors=True)
            time.sleep(0.05)

    def _rename(self) -> None:
        """Put the new folder in the place of the old one, which stays whole until then."""
        try:
            if self._target.exists():
                self._target.rename(self._replaced)
            self._temporary.rename(self._target)
        except BaseException:
            with contextlib.suppress(OSError):
                self._replaced.rename(self._target)
            raise
        finally:
            shutil.rmtree(self._replaced, ignore_errors=True)


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
        parts = (
            (name, read_part(folder, manifest, name, verify)) for name in manifest["parts"].keys()
        )
        return SavedModel(
            params=assemble(parts),
            model=manifest["model"],
            config=manifest["config"],
            recipe=Recipe.from_json(manifest["recipe"]),
            manifest=manifest,
        )
    except SavedModelError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        raise SavedModelError(f"{folder}: manifest.json {reason}") from error


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The parsed manifest.

    Raises:
        SavedModelError: there is none, or its version is unknown.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise SavedModelError(
            f"{folder}: no manifest.json, so not a finished lowbit-jax checkpoint"
        )
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
    names = [stored for stored, _ in stored_arrays(specs)]
    path = (Path(folder) / "params" / _file_name(name)).absolute()
    if not path.is_dir():
        raise SavedModelError(f"{path}: missing; convert again")
    try:
        with _quiet_orbax():
            wanted = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
            arrays = _orbax().restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    except Exception as error:
        raise SavedModelError(
            f"{path}: cannot be read ({_reason(error)}); convert again"
        ) from error
    absent = sorted(set(names) - set(arrays))
    problem = f"tensor {absent[0]} is missing" if absent else None
    if problem is None and verify:
        problem = damage(specs, arrays)
    if problem is not None:
        raise SavedModelError(f"{path}: {problem}; convert again")
    return {leaf: restore_leaf(leaf, spec, arrays) for leaf, spec in specs.items()}


def abstract_parts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """The parts a manifest describes, as shapes; ternary codes as they are in memory."""
    for name, specs in manifest["parts"].items():
        yield name, {path: abstract_leaf(spec) for path, spec in specs.items()}


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
    if not folder.is_dir() or not (_is_checkpoint(folder) or not any(folder.iterdir())):
        raise OutputError(
            f"{folder}: not a lowbit-jax checkpoint and nothing else, so --overwrite will not "
            "delete it"
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, of any version, and holds nothing besides."""
    if {path.name for path in folder.iterdir()} != {"manifest.json", "params"}:
        return False
    try:
        return json.loads((folder / "manifest.json").read_text())["format"] == "lowbit-jax"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_name(part: str) -> str:
    return part.replace("/", ".")


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))


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


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system, or orbax for it, says about a disk into `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and _os_code(error) is None:
            raise
        raise OutputError(f"{folder}: cannot be written: {_reason(error)}") from error


def _os_code(error: Exception) -> int | None:
    """The system's number of an error; tensorstore puts it into the text of a ValueError."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def _reason(error: Exception) -> str:
    """An error in a few words."""
    code = _os_code(error)
    if code == errno.ENOSPC:
        return "the disk is full"
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        return "another process has written it meanwhile"
    if code is not None:
        return os.strerror(code)
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
