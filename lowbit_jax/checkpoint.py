"""Quantised checkpoints: one orbax checkpoint per layer plus a `manifest.json`.

    DIR/manifest.json               what every tensor is, its digest, recipe, config, versions
    DIR/params/outer/               zarr arrays, an orbax PyTree: everything outside the stacks
    DIR/params/double_blocks.3/     one layer of a stack

A layer at a time is written, so a converter need not hold the tree. The folder appears under its
name only when whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_jax.checkpoint_leaves import abstract_leaf, damage, restore_leaf, stored_arrays
from lowbit_jax.checkpoint_parts import OUTER, Part, assemble, iter_parts
from lowbit_jax.checkpoint_store import OutputError, part_folder, reason, restore_arrays
from lowbit_jax.checkpoint_writer import FORMAT_VERSION, Writer, check_output, library_versions
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


class SavedModelError(ValueError):
    """A saved model that is missing, incomplete, damaged or of another version."""


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
    manifest = {
        "model": model,
        "config": dict(config),
        "recipe": recipe.to_json(),
        "source": source,
    }
    with Writer(folder, manifest, overwrite=overwrite, archive=archive) as writer:
        for name, part in iter_parts(params):
            writer.write(name, part)
        writer.finish()


def load(
    folder: str | os.PathLike,
    *,
    verify: bool = True,
    place: Callable[[str, Part], Part] | None = None,
) -> SavedModel:
    """Load a checkpoint, checking the digest of every tensor.

    Args:
        folder: a folder written by `save` or `convert_and_quantize`.
        verify: compare digests (sha256); switch off only for files you have just checked.
        place: puts a part where it belongs once it is read, such as `sharding.place.placer`, which
            leaves no more than one layer on the host.

    Raises:
        SavedModelError: not a finished checkpoint, a newer version, or a damaged tensor (named).
    """
    manifest = read_manifest(folder)
    try:
        parts = (
            (name, part if place is None else place(name, part))
            for name in manifest["parts"].keys()
            for part in (read_part(folder, manifest, name, verify),)
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
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        raise SavedModelError(f"{folder}: manifest.json {problem}") from error


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
    versions = {"format_version": range(1, FORMAT_VERSION + 1), "layout_version": [LAYOUT_VERSION]}
    for key, known in versions.items():
        if manifest.get(key) not in known:
            raise SavedModelError(
                f"{path}: {key} is {manifest.get(key)}, this library reads "
                f"{', '.join(map(str, known))}; update lowbit-jax or convert again"
            )
    return manifest


def read_part(folder: str | os.PathLike, manifest: Mapping, name: str, verify: bool = True) -> Part:
    """One part as numpy arrays and `QTensor`s of numpy arrays."""
    specs = manifest["parts"][name]
    names = [stored for stored, _ in stored_arrays(specs)]
    path = part_folder(Path(folder), name).absolute()
    if not path.is_dir():
        raise SavedModelError(f"{path}: missing; convert again")
    try:
        arrays = restore_arrays(path, names)
    except Exception as error:
        raise SavedModelError(f"{path}: cannot be read ({reason(error)}); convert again") from error
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
