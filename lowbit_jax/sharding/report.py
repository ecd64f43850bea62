"""What every device of a mesh will hold under a plan, from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from rich import box
from rich.table import Table

from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.quant.report import OTHERS
from lowbit_jax.sharding.kernel import Split
from lowbit_jax.sharding.place import shard
from lowbit_jax.sharding.plan import Plan, decide, leaves


@dataclass(kw_only=True)
class Holding:
    """All linears of one kind, over all layers, with their biases; or all norms and tables.

    Attributes:
        name: layer path with layer numbers as "*".
        how: what becomes of the kernels, in words.
        total: bytes of the model's parameters.
        device: bytes of them on one device; the same on every device of the mesh.
    """

    name: str
    how: str
    total: int = 0
    device: int = 0


def holdings(params: Mapping[str, Any], mesh: Mesh | AbstractMesh, plan: Plan) -> list[Holding]:
    """What `shard` would put on each device; nothing is placed.

    Args:
        params: arrays or shapes, quantised or not.
        mesh: `jax.sharding.AbstractMesh((8,), ("model",))` for devices that are not there.
        plan: as for `shard`.

    Raises:
        PlanError: as `shard`.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    decisions = decide(shapes, mesh, plan)
    groups: dict[tuple[str, str], Holding] = {}
    for paths, _, leaf in leaves(shard(shapes, mesh, plan)):
        decision = decisions.get(paths[0])
        name = OTHERS if decision is None else re.sub(r"/\d+(?=/)", "/*", paths[0])
        how = "whole" if decision is None else decision.note or _in_words(decision.split)
        group = groups.setdefault((name, how), Holding(name=name, how=how))
        group.total += tree_bytes(leaf)
        group.device += sum(_share(array) for array in jax.tree.leaves(leaf))
    return sorted(groups.values(), key=lambda group: -group.total)


def device_bytes(params: Mapping[str, Any], mesh: Mesh | AbstractMesh, plan: Plan) -> int:
    """Bytes of parameters on each device."""
    return sum(group.device for group in holdings(params, mesh, plan))


def holdings_table(found: list[Holding], title: str) -> Table:
    """Holdings as a table of 80 columns, largest first. MB is 1e6 bytes."""
    table = Table(title=title, box=box.SIMPLE, padding=0)
    table.add_column("layers")
    table.add_column(" each device has")
    for column in (" MB in all", " MB a device"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in found:
        table.add_row(group.name, f" {group.how}", *_megabytes(group.total, group.device))
    table.add_section()
    total, device = (sum(getattr(group, name) for group in found) for name in ("total", "device"))
    table.add_row("total", "", *_megabytes(total, device), style="bold")
    return table


def _in_words(split: Split) -> str:
    if split.how == "whole":
        return "whole" if split.stored is None else f"1/{split.mesh.shape[split.stored]}, gathered"
    what = "inputs" if split.how == "inputs" else "outputs"
    parts = f" of {len(split.parts)} parts" if len(split.parts) > 1 else ""
    return f"1/{split.shards} of the {what}{parts}"


def _share(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    shape = array.sharding.shard_shape(array.shape)
    return math.prod(shape) * jnp.dtype(array.dtype).itemsize


def _megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:,.2f}" for size in sizes]
