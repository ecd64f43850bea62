"""A converted pipeline: a folder with one checkpoint per part, tokenisers, scheduler, an index.

DIR/pipeline.json                    which pipeline it is, and of which models
DIR/transformer/, text_encoder/, text_encoder_2/, vae/      checkpoints, see lowbit_jax.checkpoint
DIR/tokenizer/, tokenizer_2/         the publisher's files
DIR/scheduler/scheduler_config.json  the publisher's file
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "pipeline.json"
FORMAT = {"format": "lowbit-jax-pipeline", "format_version": 1}


class PipelineError(ValueError):
    """A pipeline folder that is incomplete, or whose parts do not fit each other."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a pipeline's folder holds.

    Attributes:
        name: in the index.
        models: part -> model of `lowbit_jax.models.registry`.
        files: folder -> file names, of which one set must be there, all of it.
    """

    name: str
    models: Mapping[str, str]
    files: Mapping[str, tuple[tuple[str, ...], ...]]


FLUX = Layout(
    name="flux",
    models={
        "text_encoder": "clip-text",
        "text_encoder_2": "t5",
        "transformer": "flux",
        "vae": "autoencoder-kl",
    },
    files={
        "tokenizer": (("vocab.json", "merges.txt"), ("tokenizer.json",)),
        "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
        "scheduler": (("scheduler_config.json",),),
    },
)


def missing(folder: str | os.PathLike[str], layout: Layout) -> list[str]:
    """What a folder in diffusers' arrangement or ours lacks of a pipeline, a line each."""
    folder, found = Path(folder), []
    for part, model in layout.models.items():
        if not (folder / part).is_dir():
            found.append(f"part '{part}' ({model}) is missing")
    for name, sets in layout.files.items():
        if not any(all((folder / name / file).is_file() for file in files) for files in sets):
            wanted = " or ".join(" and ".join(files) for files in sets)
            found.append(f"part '{name}' is missing, or lacks {wanted}")
    return found


def misfits(configs: Mapping[str, Any]) -> list[str]:
    """Which sizes of FLUX's parts do not fit each other, a line each, from their configs."""
    flux, vae = configs["transformer"], configs["vae"]
    pairs = (
        (
            "joint_attention_dim",
            flux.context_in_dim,
            "text_encoder_2",
            configs["text_encoder_2"].d_model,
        ),
        (
            "pooled_projection_dim",
            flux.vec_in_dim,
            "text_encoder",
            configs["text_encoder"].hidden_size,
        ),
        ("in_channels", flux.in_channels, "vae", 4 * vae.latent_channels),
    )
    return [
        f"transformer takes {field} {wanted}, {part} gives {given}"
        for field, wanted, part, given in pairs
        if wanted != given
    ]


def write_index(folder: Path, layout: Layout) -> None:
    """Write the index, which says that the folder is whole."""
    document = {**FORMAT, "pipeline": layout.name, "models": dict(layout.models)}
    with (folder / INDEX).open("w") as file:
        file.write(json.dumps(document, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_folder(folder: str | os.PathLike[str], layout: Layout) -> None:
    """Check that a folder is a converted pipeline of this layout, and whole.

    Raises:
        PipelineError: it is not; names everything that is missing.
    """
    path = Path(folder) / INDEX
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(
            f"{folder}: no {INDEX}, so no converted pipeline; make one with convert_and_quantize "
            "from a diffusers folder that holds model_index.json"
        ) from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: cannot be read ({error})") from None
    expected = {**FORMAT, "pipeline": layout.name, "models": dict(layout.models)}
    for key, value in expected.items():
        found = document.get(key) if isinstance(document, dict) else None
        if found != value:
            raise PipelineError(f"{path}: {key} is {found!r}, this pipeline reads {value!r}")
    if problems := missing(folder, layout):
        raise PipelineError(f"{folder}: {'; '.join(problems)}")
