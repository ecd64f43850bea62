"""LoRA: low-rank updates of kernels, beside quantised weights while they run or merged before.

An update of a kernel (k, n) is `down @ up`, (k, r) and (r, n), its scale folded in (Hu et al. 2021,
section 4.1). `attach` leaves the kernel as it is, quantised or not, and adds `(x @ down) @ up` to
its product: nothing is quantised again, and `detach` gives back what was there. `merge` adds the
update to floating-point kernels, to be quantised afterwards. Files are `convert.lora`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.quant.qtensor import QTensor, is_kernel
from lowbit_jax.quant.stacks import Tree, iter_layers, map_kernels, map_stacks, segments

MAX_LISTED = 20


class LoraError(ValueError):
    """Updates that do not fit a model; the message names every one of them."""


class LowRank(NamedTuple):
    """An update of one kernel.

    Attributes:
        down: what meets the input.
        up: what gives the outputs, scaled.
    """

    down: Float[Array | np.ndarray, "k r"]
    up: Float[Array | np.ndarray, "r n"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraKernel:
    """A kernel with a low-rank branch beside it; `ops.linear` takes it as a kernel.

    Attributes:
        base: the kernel, floating (k, n) or quantised.
        down: of the branch; of stacked layers with a leading axis, zeros where a layer has none.
        up: likewise.
    """

    base: Any
    down: Float[Array, "... k r"]
    up: Float[Array, "... r n"]

    @property
    def shape(self) -> tuple[int, int]:
        """(k, n) of one layer."""
        return self.down.shape[-2], self.up.shape[-1]


def attach(
    params: Tree,
    updates: Mapping[str, LowRank],
    strength: float = 1.0,
    *,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """Run low-rank branches beside the kernels of a model, quantised or not.

    A stack stays one segment: its layers get the largest rank among them, padded with zeros, which
    changes no result. Attaching twice adds both.

    Args:
        params: parameter tree.
        updates: by layer path, such as "double_blocks/3/img_attn/qkv".
        strength: factor of all of them.
        dtype: of the branches; gradients reach them and nothing else that is quantised.

    Raises:
        LoraError: updates of linears that the model does not have, or of other shapes.
    """
    check(params, updates)

    def branch(kernel: Any, found: Sequence[LowRank | None], stacked: bool) -> Any:
        if not any(found):
            return kernel
        k, n = _kernel_shape(kernel)
        rank = max(update.down.shape[1] for update in found if update)
        down = np.zeros((len(found), k, rank), np.float32)
        up = np.zeros((len(found), rank, n), np.float32)
        for i, update in enumerate(found):
            if update:
                down[i, :, : update.down.shape[1]] = update.down
                up[i, : update.up.shape[0]] = strength * np.asarray(update.up, np.float32)
        if not stacked:
            down, up = down[0], up[0]
        both = jnp.asarray(down, dtype), jnp.asarray(up, dtype)
        if isinstance(kernel, LoraKernel):
            both = (
                jnp.concatenate([kernel.down.astype(dtype), both[0]], axis=-1),
                jnp.concatenate([kernel.up.astype(dtype), both[1]], axis=-2),
            )
            kernel = kernel.base
        return LoraKernel(kernel, *both)

    return _map(params, updates, branch)


def detach(params: Tree) -> dict[str, Any]:
    """The tree without its branches: the kernels that `attach` was given."""
    return jax.tree.map(
        lambda leaf: leaf.base if isinstance(leaf, LoraKernel) else leaf,
        dict(params),
        is_leaf=lambda node: isinstance(node, LoraKernel),
    )


def merge(params: Tree, updates: Mapping[str, LowRank], strength: float = 1.0) -> dict[str, Any]:
    """Add updates to floating-point kernels, summed in float32 and kept in the kernel's dtype.

    In bfloat16 what is smaller than half a step of a weight is lost, as wherever LoRA is fused; a
    tree of float32 keeps it, and quantising that is what `convert_and_quantize --lora` does.

    Args:
        params: parameter tree.
        updates: by layer path.
        strength: factor of all of them.

    Raises:
        LoraError: as `attach`; and a kernel that is quantised, or has a branch: merging would mean
            to quantise it again.
    """
    check(params, updates)
    closed = [
        path
        for path, kernel, _ in iter_layers(params)
        if path in updates and (is_kernel(kernel) or isinstance(kernel, LoraKernel))
    ]
    if closed:
        raise LoraError(
            f"{_listed(closed)}: quantised, transformed, or with a branch; merge into the "
            "floating-point model and quantise that, or attach"
        )

    def add(kernel: Array, found: Sequence[LowRank | None], stacked: bool) -> Array:
        if not any(found):
            return kernel
        layers = kernel if stacked else kernel[None]
        sums = [
            layer if update is None else _sum(layer, update, strength)
            for layer, update in zip(layers, found, strict=True)
        ]
        return jnp.stack(sums) if stacked else sums[0]

    return _map(params, updates, add)


def check(params: Tree, updates: Mapping[str, LowRank]) -> None:
    """That every update is of a linear of the model, and of its shape.

    Raises:
        LoraError: with every one that is not.
    """
    shapes = {path: _kernel_shape(kernel) for path, kernel, _ in iter_layers(params)}
    problems = []
    for path, update in updates.items():
        found = update.down.shape[0], update.up.shape[1]
        if path not in shapes:
            problems.append(f"{path}: the model has no such linear")
        elif shapes[path] != found or update.down.shape[1] != update.up.shape[0]:
            problems.append(
                f"{path}: the kernel is {shapes[path]}, the update {update.down.shape} times "
                f"{update.up.shape}"
            )
    if problems:
        more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise LoraError("; ".join(problems[:MAX_LISTED]) + more)


def _map(params: Tree, updates: Mapping[str, LowRank], change: Callable) -> dict[str, Any]:
    """`change(kernel, updates of its layers, stacked)` of every kernel."""

    def stack(path: tuple[str, ...], node: Tree) -> dict[str, Any]:
        out = {}
        for first, length, tree in segments(node):

            def change_stacked(linear, kernel, first=first, length=length):
                paths = ["/".join((*path, str(first + i), *linear)) for i in range(length)]
                return change(kernel, [updates.get(p) for p in paths], True)

            out[str(first)] = map_kernels(tree, change_stacked)
        return out

    def single(path: tuple[str, ...], kernel: Any) -> Any:
        return change(kernel, [updates.get("/".join(path))], False)

    return map_stacks(params, stack, single)


def _sum(kernel: Float[Array, "k n"], update: LowRank, strength: float) -> Float[Array, "k n"]:
    down, up = (jnp.asarray(part, jnp.float32) for part in update)
    return (kernel.astype(jnp.float32) + strength * (down @ up)).astype(kernel.dtype)


def _kernel_shape(kernel: Any) -> tuple[int, ...]:
    return kernel.shape[::-1] if isinstance(kernel, QTensor) else kernel.shape[-2:]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
