"""`ShardedKernel`: a matrix on the devices of a mesh, with what a product must know about that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.sharding.parts import device_order
from pallas_kernels.formats import FORMATS
from pallas_kernels.packing import BLOCK

Matrix = Float[Array, "... k n"] | QTensor | TransformedKernel
How = Literal["outputs", "gathered", "inputs", "whole"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one matrix (n outputs, k inputs) lies on a mesh, and how it is multiplied there.

    Attributes:
        mesh: the devices; an `AbstractMesh` where only shapes are asked for.
        how: every device multiplies with its "outputs"; likewise, and they are "gathered" on every
            device; with its "inputs", and the products are summed over devices; or with the "whole"
            matrix.
        axis: the mesh axis whose devices share the matrix; None for "whole".
        parts: sizes of what the split axis is made of; each device has its share of every part.
        rows: the mesh axis over which the leading axis of activations is split, if it divides.
        stored: the mesh axis over which a matrix used whole is stored in shares of its outputs, to
            be gathered, as packed codes, for each product.
    """

    mesh: Mesh | AbstractMesh
    how: How
    axis: str | None = None
    parts: tuple[int, ...] = ()
    rows: str | None = None
    stored: str | None = None

    @property
    def shards(self) -> int:
        """Devices that share the matrix."""
        return 1 if self.axis is None else self.mesh.shape[self.axis]

    @property
    def by_outputs(self) -> bool:
        """Whether each device has some of the outputs."""
        return self.how in ("outputs", "gathered")


class Lie(NamedTuple):
    """How one array lies on a mesh.

    Attributes:
        spec: what is split over what.
        axis: the axis, from the end, that `order` puts in the order of devices.
        order: indices along it; None where it stays as it is.
    """

    spec: P
    axis: int
    order: Int[np.ndarray, "size"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedKernel:
    """A kernel whose fused axis is in the order of devices; `ops.linear` multiplies with it.

    Attributes:
        kernel: of global arrays.
        split: how they lie.
    """

    kernel: Matrix
    split: Split = field(metadata={"static": True})

    def natural(self) -> Float[Array, "k n"]:
        """The floating matrix this stands for, its fused axis in the model's order."""
        kernel = self.kernel
        if isinstance(kernel, QTensor):
            kernel = jnp.swapaxes(kernel.dequantize(), -1, -2)
        elif isinstance(kernel, TransformedKernel):
            kernel = kernel.restore()
        order = device_order(self.split.parts, self.split.shards)
        if order is None:
            return kernel
        axis = -1 if self.split.by_outputs else -2
        return jnp.take(kernel, np.argsort(order), axis=axis)


def lies(kernel: Matrix, split: Split, *, stored: bool) -> Any:
    """The `Lie` of every leaf of a kernel, in a tree like it.

    Args:
        kernel: arrays or shapes, with layer axes or without.
        split: what to do with it.
        stored: as it is kept, not as a product is given it: differs for `Split.stored`.
    """
    outputs = split.axis if split.by_outputs else split.stored if stored else None
    inputs = split.axis if split.how == "inputs" else None
    order = device_order(split.parts, split.shards)
    n_order = order if split.by_outputs else None
    k_order = order if split.how == "inputs" else None

    def lie(leaf, *axes: tuple[int, str | None, Any]) -> Any:
        names: list[str | None] = [None] * leaf.ndim
        moved = (-1, None)
        for axis, name, wanted in axes:
            if leaf.shape[axis] > 1:  # what all outputs or inputs share is not split
                names[axis] = name
                moved = (axis, wanted) if wanted is not None else moved
        return Lie(P(*names), *moved)

    def mask(leaf):
        return None if leaf is None else lie(leaf, (-1, inputs, k_order))

    if isinstance(kernel, TransformedKernel):
        matrix = lie(kernel.kernel, (-1, outputs, n_order), (-2, inputs, k_order))
        return dataclasses.replace(kernel, kernel=matrix, mask=mask(kernel.mask))
    if not isinstance(kernel, QTensor):
        return lie(kernel, (-1, outputs, n_order), (-2, inputs, k_order))
    groups = _in_units(k_order, kernel.group)
    shared = lambda leaf: lie(leaf, (-2, outputs, n_order), (-1, inputs, groups))  # noqa: E731
    return dataclasses.replace(
        kernel,
        codes=lie(
            kernel.codes, (-2, outputs, n_order), (-1, inputs, _byte_order(k_order, kernel.format))
        ),
        scale=shared(kernel.scale),
        zero=None if kernel.zero is None else shared(kernel.zero),
        mask=mask(kernel.mask),
        act_scale=None if kernel.act_scale is None else lie(kernel.act_scale),
    )


def is_lie(node: Any) -> bool:
    """Whether a node of `lies` is one array's."""
    return isinstance(node, Lie)


def local(kernel: Matrix) -> Matrix:
    """A device's share, with the shape that it has there."""
    if not isinstance(kernel, QTensor):
        return kernel
    bits = FORMATS[kernel.format].bits
    k = min(kernel.shape[1], kernel.codes.shape[-1] * 8 // bits)  # a padded tail is never split
    return dataclasses.replace(kernel, shape=(kernel.codes.shape[-2], k))


def unit(kernel: Matrix) -> tuple[int, str]:
    """How many inputs cannot be parted, and why: a block of packed codes, a group, a rotation."""
    size, reasons = 1, []
    if isinstance(kernel, QTensor) and _packed(kernel.format):
        size, reasons = BLOCK, ["a block of packed codes"]
    if isinstance(kernel, QTensor) and kernel.scale.shape[-1] > 1:
        size = int(np.lcm(size, kernel.group))
        reasons.append(f"a group of {kernel.group}")
    if isinstance(kernel, QTensor | TransformedKernel) and kernel.rotation is not None:
        size = int(np.lcm(size, kernel.rotation))
        reasons.append(f"a rotation of {kernel.rotation}")
    return size, " and ".join(reasons)


def _packed(format: str) -> bool:
    return FORMATS[format].bits < 8


def _in_units(order, size: int):
    """An order of inputs as one of groups or blocks of `size`, which it keeps together."""
    return None if order is None else order[::size] // size


def _byte_order(order, format: str):
    """An order of inputs as one of stored bytes."""
    if order is None or not _packed(format):
        return order
    size = FORMATS[format].stored_size(BLOCK)
    return (_in_units(order, BLOCK)[:, None] * size + np.arange(size)).reshape(-1)
