"""Block-wise reconstruction: one block after the other learns what the float block gives.

A block of the quantised model is given what the quantised blocks before it make of the calibration
inputs, and trained towards what the float block gives in the float model: so it also makes up for
what was lost before it (Li et al. 2021, BRECQ, with the inputs of Wei et al. 2022, QDrop, never
dropped). Only one block, its gradients and its optimiser's state are in memory, and rows of
activations: of the batch on the device, of all samples on the host or in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from rich.console import Console

from lowbit_jax.calibration.collect import Run
from lowbit_jax.distill import latent
from lowbit_jax.distill.split import split
from lowbit_jax.distill.train import Fit, Options, fit
from lowbit_jax.distill.trajectories import Trajectories, shuffled
from lowbit_jax.models.layers import BlockStack
from lowbit_jax.quant.stacks import Tree, segments

CODES = r".*(/kernel/(growth|weight)|/bias|_norm/scale)"  # names within one block
CHUNK = 32  # rows of a forward that only gives activations


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """What came out.

    Attributes:
        params: the quantised tree.
        fits: by layer, "double_blocks/1": losses are errors relative to what the block adds.
    """

    params: dict[str, Any]
    fits: dict[str, Fit]


def reconstruct(
    run: Run,
    params: Tree,
    quantized: Tree,
    data: Trajectories,
    options: Options,
    *,
    rows: int = 1024,
    folder: Path | None = None,
    trained: str = CODES,
    exact_scale: bool = False,
    minutes: float = float("inf"),
    console: Console | None = None,
) -> Reconstructed:
    """Train the blocks of `quantized` one by one.

    Args:
        run: what is run; its model's dtype is the dtype of the computation.
        params: float parameters.
        quantized: the same tree quantised, stacks cut alike; where training starts.
        data: where forwards are taken from.
        options: of the training of each block.
        rows: forwards that are used, the first `rows` of the order of `options.seed`.
        folder: where checkpoints and activations are kept; an interrupted call is gone on with.
        trained: regular expression for the names, within a block, of what is trained.
        exact_scale: see `latent.latents`.
        minutes: for all blocks; what is not begun by then stays as it was.
        console: for progress.

    Raises:
        DivergedError: with the block's name, see `fit`.
        ValueError: a model without stacks, or stacks cut otherwise; not enough data.
    """
    if rows > len(data) * data.steps:
        raise ValueError(f"{rows} rows are asked for, {len(data) * data.steps} forwards are there")
    out, fits = dict(quantized), {}
    stacks = _stacks(run, params, data.batch(0, 2, 0))
    for stack, make_block in stacks.items():
        store = _Store(folder, rows)
        teacher = _entry(run, params, stack, data, rows, options.seed, store, "teacher")
        student = _entry(run, out, stack, data, rows, options.seed, store, "student")
        node = dict(_node(out, stack))
        floats = dict(_layers(_node(params, stack)))
        done = []
        for layer, tree in _layers(node):
            name = f"{stack}/{layer}"
            block = make_block(layer)
            target = _advance(block, floats[layer], teacher, store, f"teacher-{layer}")
            fitted = _fit_block(
                block,
                latent.latents(floats[layer], tree, exact_scale=exact_scale),
                _Rows.of(student, teacher, target),
                options,
                trained,
                folder and folder / name.replace("/", "."),
                about=data.digest,
                name=name,
                minutes=minutes,
                console=console,
            )
            fits[name], tree = fitted
            minutes -= fits[name].seconds / 60
            done.append(tree)
            student = _advance(block, tree, student, store, f"student-{layer}")
            teacher = target
        out = _with(out, stack, _restack(node, done))
        store.close()
    return Reconstructed(params=out, fits=fits)


@dataclass
class _Activations:
    """What a block is called with, of all rows: carry and constants, numpy; some are shared."""

    carry: tuple[np.ndarray, ...]
    constants: list[Any]  # leaves
    per_row: list[bool]
    structure: Any

    def batch(self, at: np.ndarray | slice):
        """(carry, constants) of some rows."""
        leaves = [
            leaf[at] if per_row else leaf
            for leaf, per_row in zip(self.constants, self.per_row, strict=True)
        ]
        return tuple(leaf[at] for leaf in self.carry), self.structure.unflatten(leaves)


@dataclass
class _Rows:
    """What one block is trained on.

    Attributes:
        student: what the block is given.
        target: what it shall give.
        scale: mean square of what the float block adds, for each part of its carry.
    """

    student: _Activations
    target: _Activations
    scale: tuple[np.float32, ...]

    @staticmethod
    def of(student: _Activations, teacher: _Activations, target: _Activations) -> _Rows:
        head = slice(4 * CHUNK)  # enough rows for a mean square
        scale = tuple(
            np.float32(max(np.mean(np.square(np.subtract(b[head], a[head]))), 1e-12))
            for a, b in zip(teacher.carry, target.carry, strict=True)
        )
        return _Rows(student, target, scale)

    def batch(self, size: int, seed: int, step: int) -> dict[str, Any]:
        index = shuffled(len(self.student.carry[0]), step, size, seed)
        carry, constants = self.student.batch(index)
        target, _ = self.target.batch(index)
        return {"carry": carry, "constants": constants, "target": target, "scale": self.scale}


def _fit_block(
    block: nn.Module, tree: Tree, rows: _Rows, options: Options, trained: str, folder, **named: Any
) -> tuple[Fit, Tree]:
    parts = split(tree, trained)
    batches = partial(rows.batch, options.batch, options.seed)
    found = fit(_BlockLoss(block), parts, batches, options, folder, **named)
    return found, latent.tensors(parts.join(found.trained, parts.frozen))


class _BlockLoss:  # equal for equal blocks, so that one program serves all of a stack
    """Squared error of the block's output, relative to what the float block adds to its input."""

    def __init__(self, block: nn.Module):
        self._block = block

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BlockLoss) and other._block == self._block

    def __hash__(self) -> int:
        return hash(type(self._block))

    def __call__(self, tree, batch) -> Float[Array, ""]:
        variables = {"params": latent.values(tree)}
        found = self._block.apply(variables, *batch["carry"], *batch["constants"])
        errors = [
            jnp.mean(jnp.square(a.astype(jnp.float32) - b)) / scale
            for a, b, scale in zip(found, batch["target"], batch["scale"], strict=True)
        ]
        return jnp.stack(errors).mean()


class _Store:
    """Where activations of all rows are: in files of a folder, or in memory."""

    def __init__(self, folder: Path | None, rows: int):
        self._folder, self.rows = folder and folder / "activations", rows
        self._files: dict[str, list[Path]] = {}

    def make(self, name: str, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Arrays of float32; those made two names ago of the same kind are given up."""
        if self._folder is None:
            return [np.empty((self.rows, *shape), np.float32) for shape in shapes]
        self._folder.mkdir(parents=True, exist_ok=True)
        paths = [self._folder / f"{name}.{i}.npy" for i in range(len(shapes))]
        self._drop(name.split("-")[0], keep=1)
        self._files[name] = paths
        return [
            np.lib.format.open_memmap(path, "w+", np.float32, (self.rows, *shape))
            for path, shape in zip(paths, shapes, strict=True)
        ]

    def _drop(self, kind: str, keep: int) -> None:
        names = [name for name in self._files if name.split("-")[0] == kind]
        for name in names[: len(names) - keep]:
            for path in self._files.pop(name):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files: they can be made again."""
        for kind in ("teacher", "student"):
            self._drop(kind, keep=0)


def _stacks(run: Run, params: Tree, batch: Any) -> dict[str, Callable[[int], nn.Module]]:
    """The stacks of a model in the order they are called, with what makes their blocks."""
    found: dict[str, Callable[[int], nn.Module]] = {}

    def forward(params, batch):
        return _watched(
            run, params, batch, lambda path, module, args: found.update({path: module.make_block})
        )

    jax.eval_shape(forward, params, batch)
    if not found:
        raise ValueError(f"{run.name} has no stack of blocks to reconstruct")
    return found


def _watched(run: Run, params: Tree, batch: Any, see: Callable[[str, BlockStack, Any], object]):
    """One forward that calls `see(path, module, arguments)` for every stack."""

    def interceptor(call, args, kwargs, context):
        if isinstance(context.module, BlockStack) and context.method_name == "__call__":
            see("/".join(context.module.path), context.module, args)
        return call(*args, **kwargs)

    def apply(*inputs, **named):
        with nn.intercept_methods(interceptor):
            return run.model.apply({"params": params}, *inputs, **named)

    return run.denoise(apply, batch["x"], batch["timestep"], batch["conditions"])


def _entry(
    run: Run,
    params: Tree,
    stack: str,
    data: Trajectories,
    rows: int,
    seed: int,
    store: _Store,
    kind: str,
) -> _Activations:
    """What the first block of a stack is called with, of all rows."""

    def call(params, batch):
        found: dict[str, Any] = {}
        _watched(run, params, batch, lambda path, module, args: found.update({path: args}))
        carry, *constants = found[stack]  # XLA drops what comes after it
        return tuple(carry), constants

    (one, two) = (jax.eval_shape(call, params, data.batch(0, size, seed)) for size in (2, 3))
    structure = jax.tree.structure(one[1])
    leaves = [jax.tree.leaves(tree[1]) for tree in (one, two)]
    per_row = [a.shape != b.shape for a, b in zip(*leaves, strict=True)]
    carry = store.make(f"{kind}-entry", [leaf.shape[1:] for leaf in one[0]])
    constants: list[Any] = [
        np.empty((rows, *leaf.shape[1:]), leaf.dtype) if is_per_row else None
        for leaf, is_per_row in zip(leaves[0], per_row, strict=True)
    ]
    program = jax.jit(call)
    index = shuffled(len(data) * data.steps, 0, rows, seed)
    for start in range(0, rows, CHUNK):
        at = slice(start, min(start + CHUNK, rows))
        found_carry, found_constants = jax.device_get(program(params, data.take(index[at])))
        for array, found in zip(carry, found_carry, strict=True):
            array[at] = found
        for i, found in enumerate(jax.tree.leaves(found_constants)):
            if per_row[i]:
                constants[i][at] = found
            else:
                constants[i] = found
    return _Activations(tuple(carry), constants, per_row, structure)


def _advance(
    block: nn.Module, tree: Tree, given: _Activations, store: _Store, name: str
) -> _Activations:
    """What the next block is called with."""
    carry = store.make(name, [leaf.shape[1:] for leaf in given.carry])
    for start in range(0, store.rows, CHUNK):
        at = slice(start, min(start + CHUNK, store.rows))
        rows, constants = given.batch(at)
        found = _apply(block, tree, tuple(rows), constants)
        for array, part in zip(carry, found, strict=True):
            array[at] = part
    return _Activations(tuple(carry), given.constants, given.per_row, given.structure)


@partial(jax.jit, static_argnums=0)
def _apply(block: nn.Module, tree: Tree, carry: tuple, constants: list):
    found: Any = block.apply({"params": tree}, *carry, *constants)
    return tuple(leaf.astype(jnp.float32) for leaf in found)


def _node(tree: Tree, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _with(tree: Tree, path: str, node: Any) -> dict[str, Any]:
    first, _, rest = path.partition("/")
    return dict(tree) | {first: _with(tree[first], rest, node) if rest else node}


def _layers(stack: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """(layer, its tree) of a stack."""
    for first, length, tree in segments(stack):
        for i in range(length):
            yield first + i, jax.tree.map(lambda leaf, at=i: leaf[at], tree)


def _restack(stack: Mapping[str, Any], layers: list[Any]) -> dict[str, Any]:
    """A stack of these layers, cut as it was."""
    return {
        str(first): jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[first : first + length])
        for first, length, _ in segments(stack)
    }
