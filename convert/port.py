"""A published checkpoint straight into memory, without a converted folder between."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax.numpy as jnp

from convert.checkpoint_files import open_checkpoint
from convert.job import Job, plan, run
from convert.torch_file import Weights
from lowbit_jax.calibration.statistics import Statistics
from lowbit_jax.checkpoint import Part, SavedModel, assemble
from lowbit_jax.quant.recipe import Recipe, Rule, load_recipe


def port(
    path: str | os.PathLike[str],
    recipe: str | Recipe = "float",
    *,
    model: str = "auto",
    weights: Weights = "auto",
    dtype: Any = jnp.bfloat16,
    statistics: str | os.PathLike[str] | Statistics | None = None,
) -> SavedModel:
    """Port a PyTorch checkpoint to a Flax parameter tree, quantising on the way.

    Args:
        path: a .safetensors, .pt, .pth, .bin or .ckpt file, an index of shards, or a diffusers
            folder.
        recipe: name, JSON file or `Recipe`; "float" ports only.
        model: network, or "auto".
        weights: part of a training checkpoint, see `open_checkpoint`.
        dtype: of parameters that stay in floating point.
        statistics: of the model's activations, or their file, for recipes that need them.

    Returns:
        What `lowbit_jax.checkpoint.load` gives for a converted folder; the manifest is empty.

    Raises:
        CheckpointError, RecipeError, StatisticsError, NonFiniteError: see `convert.job`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    parts: list[tuple[str, Part]] = []
    with open_checkpoint(path, weights) as checkpoint:
        job = plan(checkpoint, recipe, model=model, dtype=dtype, statistics=statistics)
        run(job, lambda name, part, bad: parts.append((name, part)))
    return SavedModel(
        params=assemble(parts),
        model=job.model,
        config=dataclasses.asdict(job.config),
        recipe=recipe,
        manifest={},
    )


def float_params(job: Job, dtype: Any = jnp.float32) -> Any:
    """The parameters of a planned conversion before anything is quantised, LoRA files merged.

    Args:
        job: its checkpoint is open.
        dtype: of all of them.

    Raises:
        CheckpointError, NonFiniteError: see `convert.job.run`.
    """
    rules: dict[str, Rule | None] = dict.fromkeys(job.rules)
    parts: list[tuple[str, Part]] = []
    plain = dataclasses.replace(job, rules=rules, dtype=dtype)
    run(plain, lambda name, part, bad: parts.append((name, part)))
    return assemble(parts)
