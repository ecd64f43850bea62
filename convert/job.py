"""A conversion: plan it from shapes, then stream it, one leaf and one layer at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint_files import Checkpoint
from convert.registry import SOURCES, recognise
from convert.table import Layout, Leaf, check, expand, read_leaf, release_leaf
from lowbit_jax.checkpoint import Part, iter_parts
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.recipe import Recipe, Rule
from lowbit_jax.quant.report import SizeReport, size_report
from lowbit_jax.quant.transform import NonFiniteError, nonfinite_message, quantize, quantize_weight

# measured: jax, orbax and their buffers before any weight is read, and float32 temporaries of a leaf
BASE_BYTES = 400e6
LEAF_TEMPORARIES = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything decided about a conversion before a weight is read.

    Attributes:
        checkpoint: the open source.
        model: name of the network.
        layout: how the source names its tensors.
        config: the network's config.
        recipe: how to quantise.
        dtype: dtype of the parameters that stay in floating point.
        leaves: what to read, part by part.
        rules: deciding rule of each layer path; None keeps the kernel.
        abstract: the output tree as shapes.
    """

    checkpoint: Checkpoint
    model: str
    layout: Layout
    config: Any
    recipe: Recipe
    dtype: Any
    leaves: list[Leaf]
    rules: dict[str, Rule | None]
    abstract: dict[str, Any]

    def sizes(self, archive: bool = False) -> SizeReport:
        """Bytes before and after, from shapes."""
        width = jnp.dtype(self.dtype).itemsize
        return size_report(iter_parts(self.abstract), float_bytes=width, archive=archive)

    def peak_bytes(self) -> int:
        """Estimated peak memory: one leaf with its temporaries and one layer being written."""
        leaf = max(np.prod(leaf.shape, dtype=np.int64) for leaf in self.leaves) * 4
        sizes = [size_report([part]).after for part in iter_parts(self.abstract)]
        return int(BASE_BYTES + LEAF_TEMPORARIES * leaf + 4 * max(sizes))


def plan(checkpoint: Checkpoint, recipe: Recipe, *, model: str = "auto", dtype: Any = jnp.bfloat16) -> Job:
    """Recognise a checkpoint, check every name, shape and dtype, and lay out the result; no memory.

    Raises:
        CheckpointError: not a known model, or tensors that are unknown, missing or mis-shaped.
        RecipeError: a rule that decides nothing.
    """
    model, layout = recognise(checkpoint, model)
    config = SOURCES[model].read_config(checkpoint, layout)
    params = NETWORKS[model].abstract_params(config, dtype)
    shapes = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in iter_parts(params)}
    leaves = expand(layout, config, shapes)
    check(checkpoint, leaves, f"{model} ({layout.name} layout)")
    kernels = [_layer_path(leaf) for leaf in leaves if leaf.is_kernel]
    chosen = recipe.assign(kernels)
    rules = {path: None if rule is None else recipe.rules[rule] for path, rule in chosen.items()}
    keep = _nonfinite(checkpoint, leaves, rules) if recipe.on_nonfinite == "keep" else []
    return Job(
        checkpoint=checkpoint,
        model=model,
        layout=layout,
        config=config,
        recipe=recipe,
        dtype=dtype,
        leaves=leaves,
        rules=rules | dict.fromkeys(keep),
        abstract=jax.eval_shape(partial(quantize, recipe=recipe, keep=keep), params),
    )


def run(
    job: Job,
    write: Callable[[str, Part], None],
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
    cancelled: threading.Event | None = None,
) -> None:
    """Stream the checkpoint into `write(part name, part)`, one part at a time.

    Args:
        job: see `plan`.
        write: takes finished parts: `checkpoint.Writer.write`, or a list's append.
        progress: called with the parameter's path and the source bytes just done.
        cancelled: stops between leaves when set.

    Raises:
        NonFiniteError: NaN or inf anywhere; names every such parameter.
    """
    bad: list[str] = []
    for part, leaves in groupby(job.leaves, key=lambda leaf: leaf.part):
        done: Part = {}
        for leaf in leaves:
            if cancelled is not None and cancelled.is_set():
                return
            value, finite = _convert(job, leaf)
            name = f"{part}/{leaf.path}"
            if finite or job.recipe.on_nonfinite == "keep":
                done[leaf.path] = value
            else:
                bad.append(name)
            progress(name, sum(job.checkpoint.info(source).nbytes for source in leaf.sources))
            release_leaf(job.checkpoint, leaf)
        if not bad:
            write(part, done)
    if bad:
        raise NonFiniteError(nonfinite_message(bad, job.recipe))


def manifest(job: Job, digests: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint's manifest says about its origin."""
    return {
        "model": job.model,
        "config": dataclasses.asdict(job.config),
        "recipe": job.recipe.to_json(),
        "dtype": str(jnp.dtype(job.dtype)),
        "source": {"layout": job.layout.name, "files": digests},
    }


def _convert(job: Job, leaf: Leaf) -> tuple[Any, bool]:
    array = read_leaf(job.checkpoint, leaf)
    rule = job.rules[_layer_path(leaf)] if leaf.is_kernel else None
    if rule is not None:
        tensor, finite = _quantize_leaf(array, rule)
        return jax.device_get(tensor), bool(finite)
    value, finite = _port_leaf(array, jnp.dtype(job.dtype), leaf.is_kernel)
    return np.asarray(value), bool(finite)


@partial(jax.jit, static_argnames="rule")
def _quantize_leaf(array: jax.Array, rule: Rule):
    return quantize_weight(array, rule), jnp.isfinite(array).all()


@partial(jax.jit, static_argnames=("dtype", "transpose"))
def _port_leaf(array: jax.Array, dtype: Any, transpose: bool):
    # checked after the cast: a float32 value beyond float16's range is not finite there
    cast = array.astype(dtype)
    return (cast.T if transpose else cast), jnp.isfinite(cast).all()


def _nonfinite(checkpoint: Checkpoint, leaves: list[Leaf], rules: dict[str, Rule | None]) -> list[str]:
    """Layer paths of kernels to be quantised that hold NaN or inf; reads the whole checkpoint."""
    found = []
    for leaf in leaves:
        if leaf.is_kernel and rules[_layer_path(leaf)] is not None:
            if not bool(jnp.isfinite(jnp.asarray(read_leaf(checkpoint, leaf))).all()):
                found.append(_layer_path(leaf))
            release_leaf(checkpoint, leaf)
    return found


def _layer_path(leaf: Leaf) -> str:
    linear = leaf.path.rsplit("/", 1)[0]
    return f"{leaf.part}/{linear}" if "/" in leaf.part else linear
