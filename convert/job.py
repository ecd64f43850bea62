"""A conversion: plan it from shapes, then stream it, one leaf and one layer at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint_files import Checkpoint
from convert.lora import Lora, read_loras
from convert.registry import ALL_SOURCES, recognise
from convert.statistics import load_statistics
from convert.table import (
    Constant,
    Layout,
    Leaf,
    check,
    check_constants,
    check_copies,
    expand,
    read_leaf,
    release_leaf,
)
from lowbit_jax.calibration.statistics import Statistics
from lowbit_jax.checkpoint import Part, iter_parts
from lowbit_jax.models.registry import MODELS
from lowbit_jax.quant.lora import LowRank
from lowbit_jax.quant.needs import check_feedback, given_of
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.quant.ranged import RangedKernel
from lowbit_jax.quant.recipe import Recipe, RecipeError, Rule
from lowbit_jax.quant.report import SizeReport, size_report
from lowbit_jax.quant.transform import NonFiniteError, nonfinite_message, quantize
from lowbit_jax.quant.weights import (
    Given,
    factor_of,
    mask_of,
    quantize_weight,
    rotation_of,
    sample_of,
    static_scale,
    transform_weight,
)

# measured with benchmarks/convert.py: jax, orbax and their buffers before a weight is read; float32
# temporaries of the rows being treated; a part being made, one being written, and in orbax twice
BASE_BYTES = 400e6
ROW_TEMPORARIES = 5
PARTS_IN_MEMORY = 4
ROWS = 256  # quantised at a time: bounds the temporaries, and few shapes have to be compiled
THREADS = min(4, os.cpu_count() or 1)


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
        constants: what the source stores and the model computes: values to compare with.
        rules: how each layer path is treated; None keeps the kernel.
        statistics: of the model's activations, where the recipe needs any.
        abstract: the output tree as shapes, if every weight is finite.
        loras: LoRA files that are added to the weights before anything else.
        updates: what they add, by layer path.
    """

    checkpoint: Checkpoint
    model: str
    layout: Layout
    config: Any
    recipe: Recipe
    dtype: Any
    leaves: list[Leaf]
    constants: dict[Constant, np.ndarray]
    rules: dict[str, Rule | None]
    abstract: dict[str, Any]
    statistics: Statistics | None = None
    loras: tuple[Lora, ...] = ()
    updates: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)

    def sizes(self, archive: bool = False) -> SizeReport:
        """Bytes before and after, from shapes."""
        width = jnp.dtype(self.dtype).itemsize
        return size_report(iter_parts(self.abstract), float_bytes=width, archive=archive)

    def peak_bytes(self) -> int:
        """Estimated peak memory, from shapes; see the constants above."""
        leaf = max(_source_bytes(self.checkpoint, leaf.sources) for leaf in self.leaves)
        rows = max(_float_bytes_at_once(leaf, self.rule(leaf)) for leaf in self.leaves)
        part = max(size_report([part]).after for part in iter_parts(self.abstract))
        merged = max((4 * math.prod(x.shape) for x in self.leaves if self.update(x)), default=0)
        grams = max(_gram_bytes(leaf, self.rule(leaf)) for leaf in self.leaves)
        # a leaf twice: the pages read, and the matrix fused from them
        return int(
            BASE_BYTES + grams + 2 * leaf + merged + ROW_TEMPORARIES * rows + PARTS_IN_MEMORY * part
        )

    def source_bytes(self, parts: Collection[str]) -> int:
        """Bytes that are read to make these parts."""
        leaves = (leaf for leaf in self.leaves if leaf.part in parts)
        return sum(_source_bytes(self.checkpoint, leaf.source_shapes()) for leaf in leaves)

    def update(self, leaf: Leaf) -> LowRank | None:
        """What LoRA files add to a leaf; None when that is nothing."""
        return self.updates.get(leaf.layer_path) if leaf.is_kernel else None

    def rule(self, leaf: Leaf) -> Rule | None:
        """How a leaf is treated; None when it stays as it is."""
        return self.rules[leaf.layer_path] if leaf.is_kernel else None

    def given(self, leaf: Leaf, rule: Rule) -> Given:
        """What a leaf's rule needs beside the weights."""
        return given_of(rule, leaf.layer_path, leaf.shape[1], self.recipe, self.statistics)


def plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    model: str = "auto",
    dtype: Any = jnp.bfloat16,
    statistics: str | os.PathLike[str] | Statistics | None = None,
    loras: Sequence[Lora] = (),
) -> Job:
    """Recognise a checkpoint, check every name, shape and dtype, and lay out the result; no memory.

    Args:
        checkpoint: the open source.
        recipe: how to treat its matrices.
        model: network, or "auto".
        dtype: of the parameters that stay in floating point.
        statistics: of the model's activations, or their file, for recipes that need them.

    Raises:
        CheckpointError: not a known model, or tensors that are unknown, missing or mis-shaped;
            no readable file of statistics; a LoRA file that does not fit it (`lora.read_lora`).
        RecipeError: a rule that decides nothing; no statistics where they are needed, or some where
            they are not.
        StatisticsError: statistics of another model.
        ValueError: a width that cannot be rotated as the recipe says.
    """
    model, layout = recognise(checkpoint, model)
    config = ALL_SOURCES[model].read_config(checkpoint, layout)
    params = MODELS[model].abstract_params(config, dtype)
    shapes = {
        part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in iter_parts(params)
    }
    leaves = expand(layout, config, shapes, checkpoint.names)
    constants = {constant: np.asarray(constant.value(config)) for constant in layout.constants}
    check(checkpoint, leaves, f"{model} ({layout.name} layout)", constants)
    kernels = [leaf.layer_path for leaf in leaves if leaf.is_kernel]
    if statistics is not None and not recipe.needs_statistics:
        raise RecipeError(f"recipe '{recipe.name}' needs no statistics; leave them out")
    if isinstance(statistics, str | os.PathLike):
        fields = dataclasses.asdict(config)
        statistics = load_statistics(statistics, params, model=model, config=fields)
    return Job(
        checkpoint=checkpoint,
        model=model,
        layout=layout,
        config=config,
        recipe=recipe,
        dtype=dtype,
        leaves=leaves,
        constants=constants,
        rules=recipe.assign(kernels),
        abstract=jax.eval_shape(partial(quantize, recipe=recipe, statistics=statistics), params),
        statistics=statistics,
        loras=tuple(loras),
        updates=read_loras(loras, model, config),
    )


def run(
    job: Job,
    write: Callable[[str, Part, list[str]], object],
    progress: Callable[[str, int], object] = lambda name, nbytes: None,
    done: Collection[str] = (),
) -> list[str]:
    """Stream the checkpoint into `write(part name, part, bad)`, one part at a time.

    Args:
        job: see `plan`.
        write: takes finished parts, and the names of those parameters in them that hold NaN or inf:
            `checkpoint.Writer.write`, or something that collects them; called in order, in another
            thread, while the next part is converted.
        progress: called with the parameter's path (or the name of a tensor that was only compared)
            and the source bytes just done; what it raises ends the conversion.
        done: parts that are there already: they are neither read nor written.

    Returns:
        Parameters with NaN or inf that the recipe keeps; such kernels stay in floating point.

    Raises:
        CheckpointError: tensors that the source stores more than once are not equal, or one that
            the model computes is another.
        NonFiniteError: NaN or inf anywhere, and the recipe does not keep them; names all of them.
    """
    keep = job.recipe.on_nonfinite == "keep"
    bad: list[str] = []
    check_copies(job.checkpoint, job.leaves)
    check_constants(job.checkpoint, job.constants)
    for constant in job.constants:
        if constant.source in job.checkpoint.names:
            progress(constant.source, _source_bytes(job.checkpoint, [constant.source]))
    with ThreadPoolExecutor(1) as background:
        written: Future[object] = background.submit(lambda: None)
        for part, leaves in groupby(job.leaves, key=lambda leaf: leaf.part):
            if part in done:
                continue
            made: Part = {}
            bad_here: list[str] = []
            for leaf in leaves:
                made[leaf.path], finite = _convert(job, leaf, keep)
                name = f"{part}/{leaf.path}"
                if not finite:
                    bad_here.append(name)
                progress(name, _source_bytes(job.checkpoint, leaf.source_shapes()))
                release_leaf(job.checkpoint, leaf)
            bad += bad_here
            written.result()  # one part is written at a time, while the next is converted
            if keep or not bad:
                written = background.submit(write, part, made, bad_here)
        written.result()
    if bad and not keep:
        raise NonFiniteError(nonfinite_message(bad, job.recipe))
    return bad


def manifest(job: Job, digests: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint's manifest says about its origin."""
    loras = {"loras": [lora.to_json() for lora in job.loras]} if job.loras else {}
    known = {} if job.statistics is None else {"statistics": _origin(job.statistics)}
    return {
        **known,
        "model": job.model,
        "config": dataclasses.asdict(job.config),
        "recipe": job.recipe.to_json(),
        "dtype": str(jnp.dtype(job.dtype)),
        "source": {
            "layout": job.layout.name,
            "files": digests,
            "notes": list(job.checkpoint.notes),
            **loras,
        },
    }


def _origin(statistics: Statistics) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in sorted(statistics.layers):
        digest.update(name.encode() + statistics.layers[name].absmax.tobytes())
    return {
        "samples": statistics.samples,
        "ranges": statistics.ranges.edges,
        "run": statistics.digest,
        "absmax_sha256": digest.hexdigest(),
    }


def _convert(job: Job, leaf: Leaf, keep: bool) -> tuple[Any, bool]:
    array = read_leaf(job.checkpoint, leaf)
    if update := job.update(leaf):
        array = _merge(array, update)
    rule = job.rule(leaf)
    if rule is not None:
        tensor, finite = _treat_ranges(array, rule, job, leaf)
        if finite and rule.needs_grams:
            check_feedback(leaf.layer_path, tensor)
        if finite or not keep:
            return tensor, finite
    return _port_leaf(array, jnp.dtype(job.dtype), leaf.is_kernel)


def _merge(array: np.ndarray, update: LowRank) -> np.ndarray:
    """A matrix (n, k) and its update, in float32: a small one must not be rounded away."""
    down, up = (np.ascontiguousarray(part.T, np.float32) for part in update)
    merged = np.empty(array.shape, np.float32)
    for start in range(0, len(array), ROWS):
        rows = slice(start, start + ROWS)
        merged[rows] = array[rows].astype(np.float32) + up[rows] @ down
    return merged


def _treat_ranges(array: np.ndarray, rule: Rule, job: Job, leaf: Leaf) -> tuple[Any, bool]:
    """`_treat_leaf`; with a balance for each timestep range, all of them one after the other."""
    given, dtype = job.given(leaf, rule), jnp.dtype(job.dtype)
    if rule.balance is None or rule.balance.ranges is None:
        return _treat_leaf(array, rule, given, dtype)
    assert job.statistics is not None
    each = map(given.of_range, range(rule.balance.ranges))
    made = [_treat_leaf(array, rule, one, dtype) for one in each]
    kernels = jax.tree.map(lambda *parts: np.stack(parts), *(kernel for kernel, _ in made))
    return RangedKernel(kernels, job.statistics.ranges.edges), made[0][1]


def _treat_leaf(
    array: np.ndarray, rule: Rule, given: Given, dtype: np.dtype
) -> tuple[QTensor | TransformedKernel, bool]:
    """Treat a matrix (n, k), some rows at a time and side by side, and whether all is finite."""
    rows = _rows_at_once(len(array), rule)
    pieces = [array[start : start + rows] for start in range(0, len(array), rows)]
    columns = np.zeros(array.shape[1], np.float32)
    if rule.balance is not None:  # a mask needs all rows before the first can be treated
        for piece in pieces:
            columns = np.maximum(columns, np.abs(piece).max(axis=0).astype(np.float32))
    mask = _mask_of(rule, columns, given, sample_of(array))
    rotation = rotation_of(rule, array.shape[1])
    static = static_scale(rule, given, mask)
    factor = factor_of(rule, given, mask, rotation)
    treat = partial(
        _treat_rows, mask=mask, factor=factor, rule=rule, rotation=rotation, dtype=dtype
    )
    with ThreadPoolExecutor(THREADS) as pool:
        done = list(pool.map(lambda piece: jax.device_get(treat(piece)), pieces))
    made = [part for part, _ in done]
    finite = all(bool(finite) for _, finite in done)
    mask, static = jax.device_get((mask, static))
    if rule.weights is None:
        kernel: Any = np.concatenate(made).T
        return TransformedKernel(kernel, mask, rotation), finite
    whole = jax.tree.map(
        lambda *leaves: np.concatenate(leaves),
        *(dataclasses.replace(part, shape=array.shape) for part in made),
    )
    return dataclasses.replace(whole, mask=mask, rotation=rotation, act_scale=static), finite


def _rows_at_once(n: int, rule: Rule) -> int:
    return n if rule.weights is not None and rule.weights.granularity == "tensor" else ROWS


def _float_bytes_at_once(leaf: Leaf, rule: Rule | None) -> int:
    """Bytes, as float32, of the rows of a leaf that are being quantised at the same time."""
    if rule is None:
        return 0
    n, k = leaf.shape
    # a masked and a rotated copy, beside what quantising takes
    transformed = 1 if rule.balance is None and rule.rotation is None else 2
    return transformed * 4 * k * min(n, THREADS * _rows_at_once(n, rule))


def _gram_bytes(leaf: Leaf, rule: Rule | None) -> int:
    """Of X^T X, its factor and what is between them, float32, where a leaf needs them."""
    return 4 * 4 * leaf.shape[1] ** 2 if rule is not None and rule.needs_grams else 0


# compiled once per shape: what `mask_of` maps over alphas would else be compiled for every layer
_mask_of = jax.jit(mask_of, static_argnames="rule")


@partial(jax.jit, static_argnames=("rule", "rotation", "dtype"))
def _treat_rows(array: jax.Array, mask, factor, *, rule: Rule, rotation: int | None, dtype):
    finite = jnp.isfinite(array).all()
    weight = transform_weight(array, mask, rotation)
    if rule.weights is None:
        return weight.astype(dtype), finite
    return quantize_weight(weight, rule, factor), finite


def _port_leaf(array: np.ndarray, dtype: Any, transpose: bool) -> tuple[np.ndarray, bool]:
    """A copy in another dtype, a kernel turned to (k, n), and whether all of it is finite."""
    value = np.empty(array.shape[::-1] if transpose else array.shape, dtype)
    rows = value.T if transpose else value
    finite = True
    for start in range(0, len(array), ROWS):  # in numpy: nothing to compile for every shape
        with np.errstate(over="ignore", invalid="ignore"):
            rows[start : start + ROWS] = cast = array[start : start + ROWS].astype(dtype)
        # checked after the cast: a float32 value beyond float16's range is not finite there
        finite = finite and bool(np.isfinite(cast).all())
    return value, finite


def _source_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.info(name).nbytes for name in names)
