"""Walking parameter trees: kernels, and the stacks of layers that `models.layers.BlockStack` scans.

A stack is a dict whose keys are all layer numbers: `{first layer: tree with a leading layer axis}`.
A *layer path* names one linear of one layer, "double_blocks/3/img_attn/qkv", wherever it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lowbit_jax.quant.qtensor import QTensor

Tree = Mapping[str, Any]


def is_stack(node: Any) -> bool:
    """Whether a tree node holds segments of stacked layers."""
    return isinstance(node, Mapping) and bool(node) and all(key.isdigit() for key in node)


def kernels(tree: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of the linear, kernel) of every kernel below a stack-free tree, in sorted order."""
    for key in sorted(tree):
        value = tree[key]
        if key == "kernel":
            yield prefix, value
        elif isinstance(value, Mapping):
            yield from kernels(value, (*prefix, key))


def segments(stack: Tree) -> list[tuple[int, int, Tree]]:
    """(first layer, number of layers, tree) of each segment of a stack, in order of layers."""
    found = []
    for first in sorted(stack, key=int):
        leaf = jax.tree.leaves(stack[first])[0]
        found.append((int(first), leaf.shape[0], stack[first]))
    return found


def layer_paths(params: Tree) -> list[str]:
    """Layer paths of all kernels of a model, stacked layers counted one by one."""
    return [path for path, _, _ in iter_layers(params)]


def iter_layers(params: Tree) -> Iterator[tuple[str, Any, int | None]]:
    """(layer path, kernel, index along its leading layer axis or None) of every kernel."""

    def walk(node: Tree, prefix: tuple[str, ...]):
        for key in sorted(node):
            value = node[key]
            if key == "kernel":
                yield "/".join(prefix), value, None
            elif is_stack(value):
                for first, length, tree in segments(value):
                    for index in range(length):
                        for path, kernel in kernels(tree):
                            yield "/".join((*prefix, key, str(first + index), *path)), kernel, index
            elif isinstance(value, Mapping):
                yield from walk(value, (*prefix, key))

    yield from walk(params, ())


def map_kernels(tree: Tree, fn: Callable[[tuple[str, ...], Any], Any], prefix=()) -> dict[str, Any]:
    """A copy of a stack-free tree with every kernel replaced by `fn(path, kernel)`."""
    return {
        key: fn(prefix, value)
        if key == "kernel"
        else map_kernels(value, fn, (*prefix, key))
        if isinstance(value, Mapping)
        else value
        for key, value in tree.items()
    }


def map_stacks(params: Tree, stack_fn: Callable, kernel_fn: Callable, prefix=()) -> dict[str, Any]:
    """A copy of a model's tree with stacks and the other kernels replaced.

    By `stack_fn(path, stack)` and `kernel_fn(path, kernel)`.
    """
    out = {}
    for key, value in params.items():
        if key == "kernel":
            out[key] = kernel_fn(prefix, value)
        elif is_stack(value):
            out[key] = stack_fn((*prefix, key), value)
        elif isinstance(value, Mapping):
            out[key] = map_stacks(value, stack_fn, kernel_fn, (*prefix, key))
        else:
            out[key] = value
    return out


def slice_layers(tree: Tree, start: int, stop: int) -> Tree:
    """Layers start..stop of a segment; the tree itself when that is all of it."""
    leaves = jax.tree.leaves(tree)
    if start == 0 and stop == leaves[0].shape[0]:
        return tree
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def runs(items: list[Any]) -> list[tuple[int, int]]:
    """(start, stop) of each run of equal consecutive items."""
    starts = [i for i, item in enumerate(items) if i == 0 or item != items[i - 1]]
    return list(zip(starts, [*starts[1:], len(items)], strict=True))


def is_quantized(params: Tree) -> bool:
    """Whether any kernel of a model is a QTensor."""
    return any(isinstance(kernel, QTensor) for _, kernel, _ in iter_layers(params))
