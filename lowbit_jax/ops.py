"""The one door from models to kernels: `linear(x, kernel, bias)`, float array or `QTensor`."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lowbit_jax.quant.asymmetric import asymmetric_product, asymmetric_rows
from lowbit_jax.quant.fake import FakeQuantKernel, fake_quantize_rows
from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, static_rows, transform_rows
from lowbit_jax.quant.ranged import RangedKernel
from lowbit_jax.sharding.kernel import ShardedKernel
from lowbit_jax.sharding.linear import sharded_linear
from lowbit_jax.sharding.parts import cut, join, width
from pallas_kernels import api
from pallas_kernels.reference import epilogue
from pallas_kernels.reference_rows import ROTATIONS
from pallas_kernels.rows import QuantizedRows


class Before(Protocol):
    """What happens to the input of a product: a pytree that can be fused with quantising rows.

    Attributes:
        elementwise: whether it acts on every value alone, so that a row may be split over devices.
    """

    elementwise: ClassVar[bool]

    def __call__(self, x: Float[Array, "b t k"]) -> Float[Array, "b t k"]:
        """In floating point."""

    def quantize_rows(
        self,
        x: Float[Array, "b t k"],
        bits: int,
        mask: Float32[Array, "k"] | None = None,
        rotation: int | None = None,
    ) -> QuantizedRows:
        """The same, quantised per row, in one pass where there is a kernel for it.

        After a mask and a rotation of block size 64, 128 or 256: see `api.quantize_rows`.
        """


def linear(
    x: Float[Array, "... k"] | tuple[Array, ...] | list[Array],
    kernel: Float[Array, "k n"]
    | QTensor
    | TransformedKernel
    | LoraKernel
    | FakeQuantKernel
    | ShardedKernel,
    bias: Float[Array, "n"] | None = None,
    *,
    before: Before | None = None,
    gate: Float[Array, "b ... n"] | None = None,
    residual: Float[Array, "... n"] | None = None,
    parts: tuple[int, ...] | None = None,
) -> Any:
    """`residual + gate * (before(x) @ kernel + bias)`, summed in float32, in the dtype of `x`.

    A `QTensor` with `act_bits` quantises each row of the input on the fly and multiplies integers;
    without, its codes are multiplied with the input as it is. On CUDA both are one kernel, with
    what comes after the sum in it (`pallas_kernels.api`); of asymmetric rows it is the product of
    the integers alone. A `FakeQuantKernel` stands for the same
    numbers in float32.

    A `QTensor` or `TransformedKernel` that is balanced or rotated takes `(before(x) * mask) @ R`,
    in float32 up to the codes. Blocks of 64, 128 and 256 are rotated in the pass that quantises,
    other sizes by small matrix products before it.

    The gradient of a quantised product is that of the floating-point product with the weights its
    codes stand for, straight through the rounding of the input; scales have gradients, codes none.
    A `LoraKernel` adds its branch, which sees the input as it is, to the product of its base.

    Args:
        x: input, or its parts, to be joined along the features.
        kernel: weights; on several devices a `ShardedKernel`.
        bias: added to the product.
        before: what happens to x first, such as `models.layers.AdaLN`.
        gate: factors of the outputs, one vector per sample or per frame, see `over_tokens`.
        residual: what the gated product is added to.
        parts: sizes of what the outputs are made of, such as queries, keys and values. The result
            is then a tuple of them, so that none need be put beside the others where they lie on
            several devices.

    Raises:
        ValueError: when k differs, or the parts are not n outputs, with both numbers; a kernel of
            timestep ranges.
    """
    k = logical_shape(kernel)[-2]
    if width(x) != k:
        raise ValueError(f"x has {width(x)} features, the kernel takes {k}")
    named: dict[str, Any] = {"before": before, "gate": gate, "parts": parts}
    if isinstance(kernel, LoraKernel):
        residual = _add_branch(join(x), kernel, before, gate, residual)
        return linear(x, kernel.base, bias, residual=residual, **named)
    if isinstance(kernel, RangedKernel):
        raise ValueError(
            "the kernel has one matrix for each timestep range: call the model with "
            "lowbit_jax.quant.ranged.at_timestep(params, t)"
        )
    if isinstance(kernel, ShardedKernel):
        return sharded_linear(linear, x, kernel, bias, residual=residual, **named)
    y = _linear(join(x), kernel, bias, before, gate, residual)
    return y if parts is None else cut(y, parts)


def over_tokens(vectors: Float[Array, "b ... k"], x: Float[Array, "b ... t k"]) -> Array:
    """`vectors` with axes of size 1 before the last, so that they broadcast over the tokens of `x`.

    One vector per sample, (b, k), or, of a video (b, f, t, k), per frame, (b, f, k).
    """
    ones = (1,) * (x.ndim - vectors.ndim)
    return vectors.reshape(*vectors.shape[:-1], *ones, vectors.shape[-1])


def logical_shape(kernel) -> tuple[int, ...]:
    """Shape of the floating array a parameter stands for: (k, n) for a QTensor's stored (n, k)."""
    if isinstance(kernel, ShardedKernel):
        kernel = kernel.kernel
    return kernel.shape[::-1] if isinstance(kernel, QTensor) else kernel.shape


def _linear(x, kernel, bias, before, gate, residual):
    if isinstance(kernel, FakeQuantKernel):
        return _fake_linear(x, kernel, bias, before, gate, residual)
    if isinstance(kernel, QTensor):
        return _quantized_linear(x, kernel, bias, before, gate, residual)
    if isinstance(kernel, TransformedKernel):
        dtype = x.dtype
        x = _transformed(x, kernel.mask, kernel.rotation, before).astype(dtype)
        kernel, before = kernel.kernel, None
    return _float_linear(x, kernel, bias, before, gate, residual)


def _add_branch(x, kernel: LoraKernel, before, gate, residual):
    """What a low-rank branch adds, as part of the residual: the product is left as it is."""
    side = _float_linear(x, kernel.down.astype(x.dtype), None, before, None, None)
    return _float_linear(side, kernel.up.astype(x.dtype), None, None, gate, residual)


def _float_linear(x, kernel, bias, before, gate, residual):
    if before is not None:
        x = before(x)
    y = _float_matmul(x, kernel.astype(x.dtype))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    y = y.astype(x.dtype)
    if gate is not None:
        y = over_tokens(gate, y) * y
    return y if residual is None else residual + y


def _fake_linear(x, fake: FakeQuantKernel, bias, before, gate, residual):
    """In float32 up to the end, whatever the dtype of x, as the kernels' epilogue is."""
    kernel: Any = fake.kernel
    mask, rotation = None, None
    if isinstance(kernel, TransformedKernel):
        kernel, mask, rotation = kernel.kernel, kernel.mask, kernel.rotation
    rows = fake_quantize_rows(_transformed(x, mask, rotation, before), fake.act_bits)
    return _float_linear(rows, kernel, bias, None, gate, residual).astype(x.dtype)


@jax.custom_vjp
def _float_matmul(x, kernel):
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _float_matmul_fwd(x, kernel):
    return _float_matmul(x, kernel), (x, kernel)


def _float_matmul_bwd(saved, grad):
    # jnp.dot's own transpose would multiply float32 by bfloat16, at the speed of float32
    x, kernel = saved
    grad = grad.astype(x.dtype)
    dx = jnp.dot(grad, kernel.T, preferred_element_type=jnp.float32)
    # contracted over all leading axes as they are: flattened to one, XLA:CPU is six times slower
    leading = tuple(range(x.ndim - 1))
    dkernel = jax.lax.dot_general(
        x, grad, ((leading, leading), ((), ())), preferred_element_type=jnp.float32
    )
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_float_matmul.defvjp(_float_matmul_fwd, _float_matmul_bwd)


@jax.custom_vjp
def _quantized_linear(x, weight: QTensor, bias, before, gate, residual):
    n, k = weight.shape
    gate = None if gate is None else gate.reshape(-1, n)
    residual = None if residual is None else residual.reshape(-1, n)
    out_dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32
    if weight.act_bits is not None and not weight.act_symmetric:
        floats = _transformed(x, weight.mask, weight.rotation, before).reshape(-1, k)
        y = asymmetric_product(asymmetric_rows(floats, weight.act_bits), weight)
        y = epilogue(y, bias, gate, residual, out_dtype)
        return y.astype(x.dtype).reshape(*x.shape[:-1], n)
    if weight.act_bits is None:
        rows = _float_rows(x, weight, before).reshape(-1, k)
    else:
        parts = _quantized_rows(x, weight, before)
        rows = QuantizedRows(*(part.reshape(-1, part.shape[-1]) for part in parts))
    y = api.matmul(
        rows,
        weight.codes,
        weight.scale,
        weight.zero,
        format=weight.format,
        group=weight.group,
        bias=bias,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
    )
    return y.astype(x.dtype).reshape(*x.shape[:-1], n)


def _float_rows(x, weight: QTensor, before):
    if weight.mask is None and weight.rotation is None:
        return x if before is None else before(x)
    return _transformed(x, weight.mask, weight.rotation, before).astype(x.dtype)


def _quantized_rows(x, weight: QTensor, before) -> QuantizedRows:
    assert weight.act_bits is not None
    mask, rotation = weight.mask, weight.rotation
    if weight.act_scale is not None:
        rows = _transformed(x, mask, rotation, before)
        finite = jnp.isfinite(rows).all(axis=-1, keepdims=True)
        return static_rows(rows, weight.act_bits, weight.act_scale, finite)
    if rotation is not None and rotation not in ROTATIONS:
        rows = _transformed(x, mask, rotation, before)
        return api.quantize_rows(rows, weight.act_bits)
    quantize = api.quantize_rows if before is None else before.quantize_rows
    return quantize(x, weight.act_bits, mask, rotation)


def _transformed(x, mask, rotation, before) -> Float32[Array, "... k"]:
    """`(before(x) * mask) @ R`, all of it in float32, as the kernels compute it."""
    x = x.astype(jnp.float32)
    if before is not None:
        x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), before)(x)
    return transform_rows(x, mask, rotation)


def _quantized_linear_fwd(*operands):
    return _quantized_linear(*operands), operands


def _quantized_linear_bwd(operands, grad):
    def as_floats(x, weight, *rest):
        return _float_linear(x, weight.dequantize().T, *rest)

    return jax.vjp(as_floats, *operands)[1](grad)


_quantized_linear.defvjp(_quantized_linear_fwd, _quantized_linear_bwd)
