"""Prompts as FLUX.1's own text encoders see them: those of the pipeline a checkpoint is part of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32
from rich.console import Console
from rich.progress import track

from convert.checkpoint_files import open_checkpoint
from convert.job import Job, plan
from convert.pipeline import find_pipeline
from convert.port import port
from convert.prompts import PromptEncoder, Prompts, minilm, read_prompts
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines import folder as folders
from lowbit_jax.pipelines.flux_programs import pooled_vector, text_states
from lowbit_jax.pipelines.flux_text import CLIP, T5, FluxTokenizers, text_length
from lowbit_jax.quant.recipe import RECIPES

DTYPE = jnp.bfloat16  # that the encoders are published to be run in
NEEDED = (CLIP, T5, "tokenizer", "tokenizer_2")


def read_flux_prompts(job: Job, path: Path) -> Prompts:
    """Prompts for a FLUX; text is encoded by the encoders of its pipeline, where it is in one.

    Args:
        job: the planned conversion of the transformer.
        path: see `convert.prompts`.

    Raises:
        ValueError, OSError: see `read_prompts`; encoders or tokenisers that do not fit.
    """
    config, folder = job.config, find_encoders(Path(job.checkpoint.source))
    encoder = minilm() if folder is None else pipeline_encoder(folder, text_length(config))
    return read_prompts(
        path, context=config.context_in_dim, pooled=config.vec_in_dim, encoder=encoder
    )


def find_encoders(source: Path) -> Path | None:
    """Folder of the FLUX pipeline that a checkpoint is part of, if its text parts are all there.

    Args:
        source: `transformer/`, a file in it, or Black Forest Labs' file beside it.
    """
    for folder in (source.parent, source.parent.parent):
        whole = find_pipeline(folder) is folders.FLUX
        if whole and all((folder / part).is_dir() for part in NEEDED):
            return folder
    return None


def pipeline_encoder(folder: Path, tokens: int) -> PromptEncoder:
    """The two text encoders of a pipeline as one; they are read when they are called.

    One is in memory at a time, and one prompt goes through it at a time.

    Args:
        folder: of the pipeline, diffusers'.
        tokens: of T5.
    """

    def encode(
        texts: Sequence[str],
    ) -> tuple[Float32[np.ndarray, "p t k"], Float32[np.ndarray, "p v"]]:
        configs = {part: _config(folder / part) for part in (CLIP, T5)}
        ids = FluxTokenizers.read(folder, configs)(texts, tokens, warnings.warn)
        pooled = _run(folder / CLIP, pooled_vector, ids[CLIP])
        return _run(folder / T5, text_states, ids[T5]), pooled

    return PromptEncoder(encode)


def _config(folder: Path) -> Any:
    with open_checkpoint(folder) as checkpoint:
        return plan(checkpoint, RECIPES["float"]).config


def _run(
    folder: Path, program: Callable[..., jax.Array], ids: Int32[np.ndarray, "p t"]
) -> Float32[np.ndarray, "p ..."]:
    saved = port(folder, dtype=DTYPE)
    model = build(saved.model, saved.config, DTYPE)
    console = Console(stderr=True)
    rows = track(
        ids,
        f"prompts, {folder.name}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return np.concatenate(
        [np.asarray(program(model, saved.params, row[None]), np.float32) for row in rows]
    )
