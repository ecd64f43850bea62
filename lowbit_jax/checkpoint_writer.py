"""Writes a checkpoint part by part, so that it is whole or not there, and can be gone on with.

    .NAME.partial/journal           what is being made, then a line for every finished part
    .NAME.partial/checkpoint/       what will be renamed to NAME
    .NAME.partial/replaced/         the earlier NAME, between two renames

A part is finished once its files are on the disk and after them its line in the journal.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_jax import checkpoint_journal
from lowbit_jax.checkpoint_journal import Journal, difference
from lowbit_jax.checkpoint_leaves import store_leaf
from lowbit_jax.checkpoint_parts import Part, part_order
from lowbit_jax.checkpoint_store import (
    OutputError,
    disk_errors,
    part_folder,
    remove,
    save_arrays,
    shutil,
    space_problem,
    sync,
    sync_tree,
    tree_digest,
)
from lowbit_jax.quant.qtensor import LAYOUT_VERSION

FORMAT_VERSION = 3  # 1 had no masks, rotations and static scales, 2 no asymmetric activations


class Writer:
    """Writes a checkpoint part by part; use as a context manager, then call `finish`.

    Everything goes to a folder beside `folder`, `.NAME.partial`, and gets its name by `finish`.
    When the `with` block is left without it, the partial folder is removed; but kept, with a note
    added to the exception, if it is `resumable`, some part is finished, and the exception is none
    of what was to be written (a ValueError). Missing parents of `folder` are made (and removed
    again); a link is followed.

    Args:
        folder: where the checkpoint will be.
        manifest: what the manifest says besides its parts. Two conversions with equal manifests
            (and `archive`) must give equal parts: that is what `resume` relies on.
        overwrite: replace a checkpoint that exists.
        archive: store ternary codes five to the byte (`packing.pack_trits`); unpacked on load.
        resumable: keep finished parts when the conversion is interrupted.
        resume: go on with an interrupted conversion where there is one. Parts whose files are not
            what the journal says are made again.

    Attributes:
        parts: manifest entries of the finished parts, see `abstract_parts`; under `resume` also of
            those that were there.
        nonfinite: for each finished part, its parameters with NaN or inf.
        discarded: what an interruption left and is made again: part -> what is wrong with it.
        complete: whether the checkpoint had been finished before, so that `finish` only tidies up.

    Raises:
        OutputError: the folder exists and may not be replaced, cannot be written, is being written
            by somebody else, or holds an interrupted conversion that may not be gone on with.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        manifest: Mapping[str, Any],
        *,
        overwrite: bool = False,
        archive: bool = False,
        resumable: bool = False,
        resume: bool = False,
    ):
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.archive = archive
        self.resumable = resumable
        self.resume = resume
        self.parts: dict[str, dict[str, Any]] = {}
        self.nonfinite: dict[str, list[str]] = {}
        self.discarded: dict[str, str] = {}
        self.complete = False
        document = {
            "format": "lowbit-jax",
            "format_version": FORMAT_VERSION,
            "layout_version": LAYOUT_VERSION,
            "versions": library_versions(),
            **manifest,
            "archive": archive,
        }
        self._manifest = json.loads(json.dumps(document))  # as it will be read back
        self._target = Path(os.path.realpath(self.folder))
        self._partial = partial_folder(self.folder)
        self._data = self._partial / "checkpoint"
        self._replaced = self._partial / "replaced"
        self._journal: Journal | None = None
        self._ours = False  # whether the partial folder is this writer's to remove
        self._made = [p for p in self._target.parents if not p.exists()]  # innermost first

    def __enter__(self) -> Writer:
        try:
            check_output(self.folder, self.overwrite, self.resume)
            with disk_errors(self.folder):
                self._open()
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, kind: Any = None, error: BaseException | None = None, *_: object) -> None:
        if self._ours:
            # a ValueError will come again: the source or the recipe is at fault
            count = len(self._journaled()) if self.resumable and not self.complete else 0
            if count and error is not None and not isinstance(error, ValueError):
                error.add_note(
                    f"{count} finished part(s) are kept in {self._partial}; "
                    "--resume goes on from there"
                )
            else:
                self._remove()
        if self._journal is not None:
            self._journal.close()
        for parent in self._made:
            with contextlib.suppress(OSError):  # it holds the checkpoint, or what others put there
                parent.rmdir()

    def write(self, name: str, part: Part, nonfinite: Sequence[str] = ()) -> None:
        """Store one part; arrays may be numpy or jax. On return it is on the disk.

        Args:
            name: of the part, see `iter_parts`.
            part: its parameters.
            nonfinite: those of them that hold NaN or inf, for the manifest.
        """
        assert self._journal is not None, "used outside its `with` block"
        arrays: dict[str, np.ndarray] = {}
        leaves = {path: store_leaf(path, leaf, arrays, self.archive) for path, leaf in part.items()}
        path = part_folder(self._data, name)
        needed = sum(array.nbytes for array in arrays.values())
        with disk_errors(self.folder, self._partial, needed):
            self._check_space(needed)
            try:
                save_arrays(path, arrays)
                sync_tree(path)
                sync(path.parent)
                entry = {"part": name, "nonfinite": list(nonfinite), "leaves": leaves}
                self._journal.append({**entry, "sha256": tree_digest(path)})
            except BaseException:
                self._discard_after_failure(path)
                raise
        self.parts[name], self.nonfinite[name] = leaves, list(nonfinite)

    def finish(self) -> None:
        """Write the manifest and give the folder its name."""
        if self.complete:
            return
        text = json.dumps(self._document(), indent=1)
        with disk_errors(self.folder, self._partial, len(text)):
            with open(self._data / "manifest.json", "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            sync(self._data)
            _check_replaceable(self.folder, self.overwrite)  # again: it took a while
            self._rename()
        self.complete = True

    def _open(self) -> None:
        there = self._partial.exists()
        if self.resume and not there and self._take_finished():
            return
        if not self.resume or not there:
            for parent in reversed(self._made):
                parent.mkdir(exist_ok=True)
            self._partial.mkdir()  # fails if another process was faster
        self._journal = Journal(self._partial)
        entries = self._journal.entries
        params = self._data / "params"
        if "part" in entries[0] if entries else params.exists() and any(params.iterdir()):
            raise OutputError(
                f"{self.folder}: what was being made in {self._partial} is not known, as the first "
                "line of its journal is damaged; remove that folder to begin anew"
            )
        if not entries:
            self._ours = True
            if not self._take_finished():
                self._begin()
            return
        changed = difference(entries[0], self._manifest)
        if changed is not None:
            raise OutputError(
                f"{self.folder}: the interrupted conversion in {self._partial} was another one: "
                f"{changed}; resume it with what it was started with, or remove that folder"
            )
        self._ours = True
        if not self._take_finished():
            self._take_parts(self._journaled())

    def _journaled(self) -> dict[str, dict[str, Any]]:
        """The journal's last word about every part."""
        lines = self._journal.entries[1:] if self._journal is not None else []
        return {line["part"]: line for line in lines}

    def _begin(self) -> None:
        assert self._journal is not None
        remove(self._data)
        (self._data / "params").mkdir(parents=True)
        sync_tree(self._partial)
        sync(self._partial.parent)
        self._journal.append(self._manifest)

    def _take_finished(self) -> bool:
        """Under `resume`: whether the checkpoint is there already, and is what is asked for.

        Raises:
            OutputError: another one is there, and it may not be replaced.
        """
        if not self.resume or self._data.exists() or not self._target.exists():
            return False
        found = _read_manifest(self._target)
        parts, nonfinite = found.pop("parts", None), found.pop("nonfinite", None)
        if parts is None or nonfinite is None or found != self._manifest:
            _check_replaceable(self.folder, self.overwrite)
            return False
        self.parts, self.nonfinite, self.complete = parts, nonfinite, True
        return True

    def _take_parts(self, lines: Mapping[str, dict[str, Any]]) -> None:
        """Keep the parts whose files are those of the journal, remove everything else."""
        _check_replaceable(self.folder, self.overwrite)
        for name, line in lines.items():
            path = part_folder(self._data, name)
            if not path.is_dir():
                self.discarded[name] = "is missing"
            elif tree_digest(path) != line["sha256"]:
                self.discarded[name] = "is not what the journal says"
            else:
                self.parts[name], self.nonfinite[name] = line["leaves"], line["nonfinite"]
        params = self._data / "params"
        params.mkdir(parents=True, exist_ok=True)
        kept = {part_folder(self._data, name) for name in self.parts}
        known = {part_folder(self._data, name) for name in self.discarded}
        for path in sorted({*params.iterdir(), *self._data.iterdir()} - {params, *kept}):
            if path not in known:
                self.discarded[str(path.relative_to(self._data))] = "was half written"
            remove(path)
        sync_tree(self._data)

    def _document(self) -> dict[str, Any]:
        """The manifest: the same in whatever order the parts came to be there."""
        names = sorted(self.parts, key=part_order)
        bad = {name: self.nonfinite[name] for name in names if self.nonfinite[name]}
        return {
            **self._manifest,
            "nonfinite": bad,
            "parts": {name: self.parts[name] for name in names},
        }

    def _check_space(self, needed: int) -> None:
        disk = shutil.disk_usage(self._partial)
        if disk.free < needed and disk.total:
            raise OutputError(f"{self.folder}: {space_problem(self._partial, needed)}")

    def _discard_after_failure(self, path: Path) -> None:
        """Orbax leaves writes under way when one fails; they make the folder anew for a while."""
        atexit.register(_remove_late, path, self._partial)
        for _ in range(20):
            remove(path)
            time.sleep(0.05)

    def _rename(self) -> None:
        """Put the new folder in the place of the old one, which stays whole until then."""
        try:
            if self._target.exists():
                self._target.rename(self._replaced)
            self._data.rename(self._target)
        except BaseException:
            with contextlib.suppress(OSError):
                self._replaced.rename(self._target)
            raise
        sync(self._partial.parent)

    def _remove(self) -> None:
        """The partial folder, its journal last: until then an interruption can be resumed."""
        if self._replaced.exists() and not self._target.exists():
            return  # the only copy of the earlier checkpoint
        with contextlib.suppress(OSError):
            for path in self._partial.iterdir():
                if path.name != checkpoint_journal.NAME:
                    remove(path)
        remove(self._partial)


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is made that will be called `folder`."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.partial")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what is written."""
    names = ("lowbit-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "ml_dtypes")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_output(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise `OutputError` when `folder` may not be written.

    With `resume`, an interrupted conversion may be there, and so may a checkpoint: whether it is
    what is asked for is the `Writer`'s to say.
    """
    partial = partial_folder(folder)
    if partial.exists() and checkpoint_journal.is_locked(partial):
        raise OutputError(f"{folder}: another conversion is writing {partial}; wait for it")
    if resume and _read_manifest(folder):
        return
    _check_replaceable(folder, overwrite)
    if partial.exists() and not resume:
        lost = partial / "replaced"
        holds = f" (it holds the only copy of the earlier {folder.name}, in {lost})"
        raise OutputError(
            f"{folder}: an interrupted conversion is in {partial}"
            f"{holds if lost.exists() and not folder.exists() else ''}; "
            "pass --resume to go on with it, or remove that folder"
        )


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise OutputError(f"{folder}: exists already; choose another --out or pass --overwrite")
    if not folder.is_dir() or not (_read_manifest(folder) or not any(folder.iterdir())):
        raise OutputError(
            f"{folder}: not a lowbit-jax checkpoint and nothing else, so --overwrite will not "
            "delete it"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that is a checkpoint, of any version, and no more; else empty."""
    try:
        if {path.name for path in folder.iterdir()} != {"manifest.json", "params"}:
            return {}
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest if manifest["format"] == "lowbit-jax" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remove_late(path: Path, partial: Path) -> None:
    """At exit: what orbax made after the partial folder was removed.

    Where there is a journal the folder was kept, and may be somebody else's by now.
    """
    if (partial / checkpoint_journal.NAME).exists():
        return
    remove(path)
    for parent in path.parents:
        with contextlib.suppress(OSError):
            parent.rmdir()
        if parent == partial:
            break
