"""Kernels with one balance for each timestep range (ViDiT-Q v1), and choosing among them.

A mask divides the weights before they are quantised, so each range has integers of its own: no
factor on the input makes one range's integers those of another. A `RangedKernel` holds them all,
and `at_timestep(params, t)` takes the ones of a step: an index into arrays, so that one compiled
program serves all timesteps and ranges. What it costs: r ranges store r times the bytes of the
kernels that are balanced this way, and every step copies the chosen range's once (as many bytes as
the products then read). A mask for all timesteps and a rotation (v2) cost neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.quant.stacks import Tree, map_kernels, map_stacks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RangedKernel:
    """One kernel for each timestep range.

    Attributes:
        kernels: with an axis of ranges in the leaves, after that of stacked layers.
        edges: of the ranges, see `TimestepRanges`.
    """

    kernels: QTensor | TransformedKernel
    edges: tuple[float, ...] = field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(k, n) of one layer."""
        k, n = self.kernels.shape[-2:]
        return (n, k) if isinstance(self.kernels, QTensor) else (k, n)


def at_timestep(params: Tree, t: Float[Array, "*b"] | Int[Array, "*b"]) -> Tree:
    """The parameters of a step: every `RangedKernel` replaced by its kernel for timestep `t`.

    Params without any are returned as they are. A timestep outside all ranges, or NaN, takes the
    nearest range, or the first.

    Args:
        params: parameters of a model.
        t: the timestep the model is told; of a batch, whose entries must be at the same one, the
            first is taken. May be traced.
    """
    edges = _edges(params)
    if not edges:
        return params
    now = jnp.asarray(t, jnp.float32).reshape(-1)[0]
    index = {e: TimestepRanges(e).index(jnp.clip(now, 0, e[-1])) for e in edges}

    def take(kernel: Any, axis: int) -> Any:
        if not _is_ranged(kernel):
            return kernel
        at = jnp.maximum(index[kernel.edges], 0)  # NaN has no range
        pick = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at, axis, keepdims=False)  # noqa: E731
        return jax.tree.map(pick, kernel.kernels)

    def stack(path: tuple[str, ...], stack: Tree) -> dict[str, Any]:
        return {
            key: map_kernels(tree, lambda _, kernel: take(kernel, 1)) for key, tree in stack.items()
        }

    return map_stacks(params, stack, lambda _, kernel: take(kernel, 0))


def has_ranges(params: Tree) -> bool:
    """Whether any kernel differs between timesteps."""
    return bool(_edges(params))


def _edges(params: Tree) -> set[tuple[float, ...]]:
    leaves = jax.tree.leaves(params, is_leaf=_is_ranged)
    return {leaf.edges for leaf in leaves if _is_ranged(leaf)}


def _is_ranged(value: Any) -> bool:
    return isinstance(value, RangedKernel)
