"""`shard(params, mesh, plan)`: parameters on the devices of a mesh, each device its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowbit_jax.checkpoint_parts import OUTER, Part
from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.qtensor import is_qtensor
from lowbit_jax.sharding.kernel import Lie, ShardedKernel, Split, is_lie, lies
from lowbit_jax.sharding.plan import Decision, Plan, PlanError, decide, map_leaves


def shard(params: Mapping[str, Any], mesh: Mesh | AbstractMesh, plan: Plan) -> dict[str, Any]:
    """A model's parameters on the devices of a mesh; `model.apply` takes them as any others.

    Kernels become `ShardedKernel`s; biases, norms and tables are whole on every device. Packed
    codes are parted between blocks and groups only. In a program of several processes each has the
    parameters and keeps what its devices hold; `checkpoint.load(folder, place=...)` with `placer`
    holds a layer at a time instead.

    Args:
        params: arrays, quantised or not, or shapes (`jax.ShapeDtypeStruct`): those come back with
            their shardings, which costs no memory and may be for a mesh that is not there.
        mesh: the devices, such as `jax.make_mesh((4,), ("model",))`.
        plan: from `plans.named_plan`, or your own.

    Raises:
        PlanError: see `plan.decide`; layers of one stacked segment that are to lie differently.
    """
    mesh = automatic(mesh)
    return _shard(params, mesh, decide(params, mesh, plan))


def automatic(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The same devices with axes of type Auto: sharding is the compiler's matter between products.

    `jax.make_mesh` makes axes of type Explicit, under which every operation of a model would have
    to say how its result is sharded.
    """
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, types)
    return Mesh(mesh.devices, mesh.axis_names, types)


def placer(mesh: Mesh, plan: Plan) -> Callable[[str, Part], Part]:
    """The `place` of `checkpoint.load`: what it reads goes to the devices, one layer at a time.

    Every process reads whole tensors (a file holds one, and its digest is of all of it) and keeps
    its devices' shares.
    """

    devices = automatic(mesh)

    def place(name: str, part: Part) -> Part:
        prefix = "" if name == OUTER else f"{name}/"
        return _place_part(part, devices, plan, prefix)

    return place


def _place_part(part: Part, mesh: Any, plan: Plan, prefix: str) -> Part:
    out = {}
    for path, leaf in part.items():
        layer, _, name = f"{prefix}{path}".rpartition("/")
        tree = {name: leaf}
        decisions = decide(tree, mesh, plan, part=f"{layer}/")
        out[path] = _shard(tree, mesh, decisions, f"{layer}/")[name]
    return out


def _shard(params, mesh, decisions: dict[str, Decision], prefix: str = "") -> dict[str, Any]:
    put_whole = partial(jax.tree.map, partial(_put, mesh=mesh, lie=Lie(P(), -1, None)))

    def change(paths: tuple[str, ...], name: str, leaf: Any) -> Any:
        if name != "kernel":
            return put_whole(leaf)
        splits = {decisions[path].split for path in paths}
        if len(splits) > 1:
            raise PlanError(
                f"{paths[0]} and the {len(paths) - 1} layers stacked behind it lie differently"
            )
        (split,) = splits
        if isinstance(leaf, LoraKernel):  # the branch is small, and whole
            base = kernel(leaf.base, split)
            return LoraKernel(base, put_whole(leaf.down), put_whole(leaf.up))
        return kernel(leaf, split)

    def kernel(leaf: Any, split: Split) -> Any:
        found = lies(leaf, split, stored=True)
        put = lambda lie, array: _put(array, mesh=mesh, lie=lie)  # noqa: E731
        placed = jax.tree.map(put, found, leaf, is_leaf=is_lie)
        # the compiler partitions a floating product of whole matrices by itself
        plain = split.how == "whole" and not is_qtensor(leaf)
        return placed if plain else ShardedKernel(placed, split)

    return map_leaves(params, change, (prefix,))


def _put(array: Any, *, mesh: Any, lie: Lie) -> Any:
    """An array, or a shape, on the mesh."""
    sharding = NamedSharding(mesh, lie.spec)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    source = np.asarray(array)

    def share(index: Any) -> np.ndarray:
        if lie.order is None:
            return source[index]
        wanted = list(index)
        wanted[lie.axis] = lie.order[index[lie.axis]]
        return source[tuple(wanted)]

    return jax.make_array_from_callback(source.shape, sharding, share, dtype=source.dtype)
