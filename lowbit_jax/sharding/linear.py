"""Products with a `ShardedKernel`: each device runs the kernels it would run alone, on its share.

In `jax.shard_map`, which is what jax recommends for Pallas kernels: the compiler cannot partition
them (on GPUs it gathers their operands, on TPUs it refuses), and `custom_partitioning` does not
reach TPUs (jax-ml/jax#38196). The models see global arrays and know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from lowbit_jax.quant.asymmetric import asymmetric_product, asymmetric_rows
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, static_rows, transform_rows
from lowbit_jax.sharding.kernel import ShardedKernel, is_lie, lies, local
from lowbit_jax.sharding.parts import cut, join, offsets
from pallas_kernels import api
from pallas_kernels.reference import epilogue
from pallas_kernels.reference_rows import ROTATIONS
from pallas_kernels.rows import QuantizedRows


def sharded_linear(
    one: Callable[..., Array],
    x: Any,
    kernel: ShardedKernel,
    bias: Float[Array, "n"] | None,
    *,
    before: Any,
    gate: Float[Array, "b ... n"] | None,
    residual: Float[Array, "... n"] | None,
    parts: tuple[int, ...] | None,
) -> Any:
    """`ops.linear` with a kernel on several devices; `one` is `ops.linear` itself, for one share.

    Split by outputs, x is whole on every device and each output is summed on one device, as it
    would be alone. Split by inputs, x is split too, and products are summed over devices: those of
    integers as float32 before any scale, so they are exact in any order as long as they are below
    2^24 (ternary weights: always, at the widths of these networks); a row has one scale whatever
    the number of devices. The gradient is that of the floating-point product, left to XLA.
    """
    found = _product(one, x, kernel, bias, before, gate, residual)
    if parts is not None and tuple(part.shape[-1] for part in found) != parts:
        return cut(join(found), parts)
    return join(found) if parts is None else found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(one, x, kernel, bias, before, gate, residual) -> tuple[Array, ...]:
    return _FORMS[kernel.split.how](one, x, kernel, bias, before, gate, residual)


def _product_fwd(one, *operands):
    return _product(one, *operands), operands


def _product_bwd(one, operands, grads):
    def as_floats(x, kernel, bias, before, gate, residual):
        whole = kernel.natural()
        y = one(x, whole, bias, before=before, gate=gate, residual=residual)
        return cut(y, [grad.shape[-1] for grad in grads])

    return jax.vjp(as_floats, *operands)[1](grads)


_product.defvjp(_product_fwd, _product_bwd)


def _by_outputs(one, x, kernel, bias, before, gate, residual):
    split, x = kernel.split, join(x)
    rows = _rows(split, x, before, gate)
    sizes = [size // split.shards for size in split.parts]
    gate, residual = (None if v is None else cut(v, split.parts) for v in (gate, residual))

    def share(x, weight, bias, before, gate, residual):
        bias = None if bias is None else _own(bias, split)
        gate, residual = (None if v is None else join(v) for v in (gate, residual))
        y = one(x, local(weight), bias, before=before, gate=gate, residual=residual)
        ys = cut(y, sizes)
        if split.how == "outputs":
            return ys
        return tuple(lax.all_gather(y, split.axis, axis=y.ndim - 1, tiled=True) for y in ys)

    operands = [
        (x, _lie(rows, x)),
        (kernel.kernel, _specs(kernel)),
        (bias, P()),  # whole, as all biases are stored: cut outside, shares would be sent about
        (before, _lie(rows, before)),
        (gate, _lie(rows, gate, split.axis)),
        (residual, _lie(rows, residual, split.axis)),
    ]
    last = split.axis if split.how == "outputs" else None
    return _shard_map(share, split, operands, _lie(rows, x, last))


def _by_inputs(one, x, kernel, bias, before, gate, residual):
    del one
    split = kernel.split
    xs = tuple(x) if isinstance(x, tuple | list) else (x,)
    if tuple(part.shape[-1] for part in xs) != split.parts:
        xs = cut(join(xs), split.parts)
    rows = _rows(split, xs[0], before, gate)
    # what comes before acts on every input alone, or needs whole rows on every device
    alone = before is None or getattr(before, "elementwise", False)

    def share(xs, weight, bias, before, gate, residual):
        y = _summed(join(xs), local(weight), before, split, alone)
        n = y.shape[-1]
        gate, residual = (None if v is None else v.reshape(-1, n) for v in (gate, residual))
        y = epilogue(y.reshape(-1, n), bias, gate, residual, xs[0].dtype)
        return (y.reshape(*xs[0].shape[:-1], n),)

    operands = [
        (xs, _lie(rows, xs, split.axis if alone else None)),
        (kernel.kernel, _specs(kernel)),
        (bias, P()),
        (before, _lie(rows, before)),
        (gate, _lie(rows, gate)),
        (residual, _lie(rows, residual)),
    ]
    return _shard_map(share, split, operands, _lie(rows, xs[0]))


def _whole(one, x, kernel, bias, before, gate, residual):
    split, x = kernel.split, join(x)
    rows = _rows(split, x, before, gate)

    def share(x, weight, bias, before, gate, residual):
        return (one(x, local(weight), bias, before=before, gate=gate, residual=residual),)

    operands = [
        (x, _lie(rows, x)),
        (kernel.kernel, _specs(kernel)),
        (bias, P()),
        (before, _lie(rows, before)),
        (gate, _lie(rows, gate)),
        (residual, _lie(rows, residual)),
    ]
    return _shard_map(share, split, operands, _lie(rows, x))


_FORMS = {"outputs": _by_outputs, "gathered": _by_outputs, "inputs": _by_inputs, "whole": _whole}


def _summed(x, weight, before, split, alone: bool) -> Float32[Array, "... n"]:
    """`before(x) @ kernel` summed over devices, in float32, scaled."""
    axis, dtype = split.axis, x.dtype
    bits = weight.act_bits if isinstance(weight, QTensor) else None
    mask, rotation = getattr(weight, "mask", None), getattr(weight, "rotation", None)
    transformed = mask is not None or rotation is not None
    if bits is not None or transformed:  # as the kernels: float32 up to the codes
        x = x.astype(jnp.float32)
        before = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), before)
    if before is not None:
        x = before(x)
    if not alone:
        x = _own(x, split)
    if bits is not None:
        return _summed_codes(x.reshape(-1, x.shape[-1]), weight, axis)
    if transformed:
        x = transform_rows(x, mask, rotation).astype(dtype)
    if not isinstance(weight, QTensor):
        matrix = weight.kernel if isinstance(weight, TransformedKernel) else weight
        y = jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
        return lax.psum(y, axis)
    return lax.psum(_matmul(x.reshape(-1, x.shape[-1]), weight, weight.scale), axis)


def _summed_codes(x: Float32[Array, "m k"], weight: QTensor, axis: str) -> Float32[Array, "m n"]:
    """The product of quantised rows, summed over devices before any scale if it can be."""
    if not weight.act_symmetric:
        assert weight.act_bits is not None
        floats = transform_rows(x, weight.mask, weight.rotation)
        shifted = asymmetric_rows(floats, weight.act_bits, axis)
        return asymmetric_product(shifted, weight, partial(lax.psum, axis_name=axis))
    rows = _quantized_rows(x, weight, axis)
    if weight.scale.shape[-1] > 1:  # a scale in every group, so sums are no integers
        return lax.psum(_matmul(rows, weight, weight.scale), axis)
    ones = rows._replace(scale=jnp.ones_like(rows.scale))
    y = _matmul(ones, weight, jnp.ones_like(weight.scale))
    return lax.psum(y, axis) * rows.scale * weight.scale[:, 0]


def _quantized_rows(x: Float32[Array, "m k"], weight: QTensor, axis: str) -> QuantizedRows:
    """This device's share of rows that have one scale over all devices."""
    bits, mask, rotation = weight.act_bits, weight.mask, weight.rotation
    assert bits is not None
    if weight.act_scale is None and rotation in (None, *ROTATIONS):
        return api.quantize_split_rows(x, bits, axis, mask, rotation)
    x = transform_rows(x, mask, rotation)
    if weight.act_scale is None:
        return api.quantize_split_rows(x, bits, axis)
    broken = ~jnp.isfinite(x).all(axis=-1, keepdims=True)
    finite = lax.psum(broken.astype(jnp.int32), axis) == 0
    return static_rows(x, bits, weight.act_scale, finite)


def _matmul(x, weight: QTensor, scale) -> Float32[Array, "m n"]:
    named: dict[str, Any] = {"format": weight.format, "group": weight.group}
    return api.matmul(x, weight.codes, scale, weight.zero, **named)


def _own(x: Float[Array, "... k"], split) -> Float[Array, "... k/d"]:
    """This device's share of every part of a fused axis."""
    device = lax.axis_index(split.axis)
    shares = []
    for start, size in zip(offsets(split.parts), split.parts, strict=True):
        own = size // split.shards
        shares.append(lax.dynamic_slice_in_dim(x, start + device * own, own, axis=-1))
    return join(shares)


def _shard_map(share, split, operands, out):
    values, specs = zip(*operands, strict=True)
    # pallas_call does not say over which axes its results vary
    run = jax.shard_map(share, mesh=split.mesh, in_specs=specs, out_specs=out, check_vma=False)
    return run(*values)


def _specs(kernel: ShardedKernel):
    found = lies(kernel.kernel, kernel.split, stored=False)
    return jax.tree.map(lambda lie: lie.spec, found, is_leaf=is_lie)


def _rows(split, x, *vectors) -> str | None:
    """The mesh axis for the leading axis of x: none where it does not divide, or where what goes
    with each row is not led by the same axis.
    """
    if split.rows is None or x.ndim < 2 or x.shape[0] % split.mesh.shape[split.rows]:
        return None
    alike = all(v.ndim < 2 or v.shape[0] == x.shape[0] for v in jax.tree.leaves(vectors))
    return split.rows if alike else None


def _lie(rows: str | None, arrays: Any, last: str | None = None) -> Any:
    """Specs of arrays whose leading axis is that of rows and whose last axis is of features."""

    def spec(array):
        return P(last) if array.ndim < 2 else P(rows, *[None] * (array.ndim - 2), last)

    return jax.tree.map(spec, arrays)
