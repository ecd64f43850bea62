"""Parameter trees in parts: what lies outside the stacks, then one layer of a stack at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax.quant.stacks import is_stack, runs, segments

OUTER = "outer"  # the part that holds everything outside the stacks

Part = dict[str, Any]  # "img_attn/qkv/kernel" -> array or QTensor


def iter_parts(params: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """Cut a parameter tree into parts: `OUTER` first, then "stack/layer" for every stacked layer.

    Works on trees of `jax.ShapeDtypeStruct` too.
    """
    yield OUTER, dict(_flatten({k: v for k, v in params.items() if not is_stack(v)}))
    for key, stack in params.items():
        if not is_stack(stack):
            continue
        for first, length, tree in segments(stack):
            flat = dict(_flatten(tree))
            for index in range(length):
                yield f"{key}/{first + index}", {p: _layer(v, index) for p, v in flat.items()}


def part_order(name: str) -> tuple[bool, str, int]:
    """Sorts part names: `OUTER`, then stack by stack, layer by layer."""
    stack, _, layer = name.rpartition("/")
    return name != OUTER, stack, int(layer) if stack else 0


def leaf_at(params: Mapping[str, Any], part: str, path: str) -> Any:
    """`dict(iter_parts(params))[part][path]` without cutting up the rest; KeyError if absent."""
    stack, _, layer = part.partition("/")
    if not layer:
        return _descend(params, path)
    for first, length, tree in segments(params[stack]):
        if first <= int(layer) < first + length:
            return _layer(_descend(tree, path), int(layer) - first)
    raise KeyError(part)


def _descend(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("/"):
        node = node[key]
    return node


def assemble(parts: Iterable[tuple[str, Part]]) -> dict[str, Any]:
    """Inverse of `iter_parts`, as jax arrays.

    Consecutive layers of equal structure and formats become one segment.

    Raises:
        ValueError: a stack with gaps.
    """
    params: dict[str, Any] = {}
    stacks: dict[str, dict[int, Part]] = {}
    for name, part in parts:
        if name == OUTER:
            params.update(_unflatten(jax.tree.map(jnp.asarray, part)))
        else:
            key, layer = name.rsplit("/", 1)
            stacks.setdefault(key, {})[int(layer)] = dict(part)
    for key, layers in stacks.items():
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(f"{key}: layers {sorted(layers)} are not 0 to {len(layers) - 1}")
        params[key] = _stack_layers([layers[i] for i in range(len(layers))])
    return params


def _layer(value: Any, index: int) -> Any:
    """One layer of a stacked array, QTensor, or shape."""

    def take(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[index]

    return jax.tree.map(take, value)


def _stack_layers(layers: list[Part]) -> dict[str, Any]:
    signatures = [_signature(layer) for layer in layers]
    out = {}
    for start, stop in runs(signatures):
        run = layers[start:stop]
        # popped, so that no more than one parameter of the stack is in memory twice
        stacked = {path: _stack([layer.pop(path) for layer in run]) for path in list(run[0])}
        out[str(start)] = _unflatten(stacked)
    return out


def _stack(leaves: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: _stack_arrays(list(arrays)), *leaves)


def _stack_arrays(arrays: list[Any]) -> jax.Array:
    """Layers in one array; those already on devices stay there, each device with its own share."""
    sharding = getattr(arrays[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.asarray(np.stack(arrays))
    stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=stacked)(*arrays)


def _signature(layer: Part) -> tuple:
    leaves, structure = jax.tree.flatten(layer)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _unflatten(part: Part) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in part.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
