"""A whole diffusers pipeline as a source: what it must hold, and where its parts are converted to.

.NAME.pipeline/     parts as they are finished; renamed to NAME when all are there
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError
from lowbit_jax.checkpoint import OutputError
from lowbit_jax.checkpoint_store import remove, sync
from lowbit_jax.pipelines import folder as folders
from lowbit_jax.pipelines.flux_text import FluxTokenizers
from lowbit_jax.samplers.flow_euler import FlowSchedule

# diffusers' classes of pipelines that are ported, in model_index.json
PIPELINES = {"FluxPipeline": folders.FLUX}


def find_pipeline(folder: Path) -> folders.Layout | None:
    """The pipeline whose `model_index.json` is in a folder; None for one that is not ported.

    Raises:
        CheckpointError: the file is not JSON.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(path, f"is not JSON: {error}") from None
    return PIPELINES.get(str(document.get("_class_name"))) if isinstance(document, dict) else None


def check_complete(folder: Path, layout: folders.Layout) -> None:
    """Check that every part is there, before any is read.

    Raises:
        CheckpointError: names all that are not.
    """
    problems = folders.missing(folder, layout)
    if problems:
        hint = f"for the transformer alone give {folder / 'transformer'}"
        raise CheckpointError(folder, [*problems, hint] if len(problems) > 1 else problems)


def check_fit(folder: Path, configs: Mapping[str, Any]) -> list[str]:
    """Check that parts, tokenisers and scheduler are those of one pipeline.

    Args:
        folder: of the source.
        configs: of the models, by part.

    Returns:
        What could not be checked, a line each: tokenisers, where their package is not installed.

    Raises:
        CheckpointError: sizes that do not fit each other, or a scheduler that is not ported.
        PipelineError: a tokeniser of another encoder.
    """
    problems = folders.misfits(configs)
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        FlowSchedule.from_json(json.loads(path.read_text()))
    except ValueError as error:
        problems.append(f"scheduler/{path.name}: {error}")
    if problems:
        raise CheckpointError(folder, problems)
    try:
        FluxTokenizers.read(folder, configs)
    except ModuleNotFoundError:
        return ["the tokenisers were not checked: the package tokenizers is not installed"]
    return []


def copy_files(source: Path, target: Path, layout: folders.Layout) -> None:
    """Copy what is not converted: the files of tokenisers and scheduler."""
    for name in layout.files:
        (target / name).mkdir(exist_ok=True)
        for path in sorted((source / name).iterdir()):
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, target / name / path.name)
                sync(target / name / path.name)
        sync(target / name)


@contextlib.contextmanager
def staged(out: Path, layout: folders.Layout, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """A folder for the parts, which becomes `out` when the block is left without an exception.

    With one, it stays to be gone on with; but not after a ValueError, which would come again.

    Raises:
        OutputError: `out` exists and may not be replaced, or an interrupted conversion is there
            and `resume` is not given.
    """
    target = Path(os.path.realpath(out))
    staging = target.with_name(f".{target.name}.pipeline")
    replaced = staging.with_name(f"{staging.name}.replaced")
    check_replaceable(out, overwrite)
    if staging.exists() and not resume:
        raise OutputError(
            f"{out}: an interrupted conversion is in {staging}; pass --resume to go on with it, or "
            "remove that folder"
        )
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        folders.write_index(staging, layout)
        sync(staging)  # what is in it has been synced as it was written
        check_replaceable(out, overwrite)  # again: it took a while
        try:
            if target.exists():
                target.rename(replaced)
            staging.rename(target)
        except BaseException:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
        sync(target.parent)
        remove(replaced)
    except ValueError:
        remove(staging)
        raise
    except BaseException as error:
        if not any(staging.iterdir()):
            staging.rmdir()
        elif not getattr(error, "__notes__", []):
            error.add_note(f"finished parts are kept in {staging}; --resume goes on from there")
        raise


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raise `OutputError` when a pipeline may not be written to `out`."""
    if not out.exists():
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another --out or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / folders.INDEX).is_file()):
        raise OutputError(f"{out}: no lowbit-jax pipeline, so --overwrite will not delete it")
