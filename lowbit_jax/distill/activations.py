"""What the blocks of a model are called with, of many forwards, block after block.

Rows of activations are float32 on the host, or in files; the device holds `CHUNK` of them.
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

from lowbit_jax.calibration.collect import Run
from lowbit_jax.distill.trajectories import Trajectories, shuffled
from lowbit_jax.models.layers import BlockStack
from lowbit_jax.quant.stacks import Tree, segments

CHUNK = 32  # rows of a forward that only gives activations


@dataclass
class Activations:
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


class Store:
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


def stacks_of(run: Run, params: Tree, batch: Any) -> dict[str, Callable[[int], nn.Module]]:
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
        module = context.module
        if isinstance(module, BlockStack) and module.length and context.method_name == "__call__":
            see("/".join(context.module.path), context.module, args)
        return call(*args, **kwargs)

    def apply(*inputs, **named):
        with nn.intercept_methods(interceptor):
            return run.model.apply({"params": params}, *inputs, **named)

    return run.denoise(apply, batch["x"], batch["timestep"], batch["conditions"])


def entry(
    run: Run, params: Tree, stack: str, data: Trajectories, seed: int, store: Store, kind: str
) -> Activations:
    """What the first block of a stack is called with, of all rows."""
    rows = store.rows
    if rows > len(data) * data.steps:
        raise ValueError(f"{rows} rows are asked for, {len(data) * data.steps} forwards are there")

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
    return Activations(tuple(carry), constants, per_row, structure)


def advance(
    block: nn.Module, tree: Tree, given: Activations, store: Store, name: str
) -> Activations:
    """What the next block is called with."""
    carry = store.make(name, [leaf.shape[1:] for leaf in given.carry])
    for start in range(0, store.rows, CHUNK):
        at = slice(start, min(start + CHUNK, store.rows))
        rows, constants = given.batch(at)
        found = _apply(block, tree, tuple(rows), constants)
        for array, part in zip(carry, found, strict=True):
            array[at] = part
    return Activations(tuple(carry), given.constants, given.per_row, given.structure)


@partial(jax.jit, static_argnums=0)
def _apply(block: nn.Module, tree: Tree, carry: tuple, constants: list):
    found: Any = block.apply({"params": tree}, *carry, *constants)
    return tuple(leaf.astype(jnp.float32) for leaf in found)


def node_of(tree: Tree, path: str) -> Any:
    """What is at a path."""
    for part in path.split("/"):
        tree = tree[part]
    return tree


def with_node(tree: Tree, path: str, node: Any) -> dict[str, Any]:
    """The tree with another node at a path."""
    first, _, rest = path.partition("/")
    return dict(tree) | {first: with_node(tree[first], rest, node) if rest else node}


def layers_of(stack: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """(layer, its tree) of a stack."""
    for first, length, tree in segments(stack):
        for i in range(length):
            yield first + i, jax.tree.map(lambda leaf, at=i: leaf[at], tree)


def restack(stack: Mapping[str, Any], layers: list[Any]) -> dict[str, Any]:
    """A stack of these layers, cut as it was."""
    return {
        str(first): jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[first : first + length])
        for first, length, _ in segments(stack)
    }
