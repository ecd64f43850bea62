"""The one door from models to kernels: `linear(x, kernel, bias)`, float array or `QTensor`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.quant.qtensor import QTensor
from pallas_kernels import reference, reference_rows


def linear(
    x: Float[Array, "... k"],
    kernel: Float[Array, "k n"] | QTensor,
    bias: Float[Array, "n"] | None = None,
) -> Float[Array, "... n"]:
    """`x @ kernel + bias`, accumulated in float32 and returned in the dtype of `x`.

    A `QTensor` with `act_bits` quantises each row of `x` on the fly and multiplies integers;
    without, its codes are multiplied with `x` as it is.

    Raises:
        ValueError: when k differs, with both numbers.
    """
    k, n = logical_shape(kernel)[-2:]
    if x.shape[-1] != k:
        raise ValueError(f"x has {x.shape[-1]} features, the kernel takes {k}")
    if not isinstance(kernel, QTensor):
        y = _float_matmul(x, kernel.astype(x.dtype))
    else:
        matmul = _weight_only_matmul if kernel.act_bits is None else _integer_matmul
        y = matmul(x.reshape(-1, k), kernel).reshape(*x.shape[:-1], n)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def logical_shape(kernel) -> tuple[int, ...]:
    """Shape of the floating array a parameter stands for: (k, n) for a QTensor's stored (n, k)."""
    return kernel.shape[::-1] if isinstance(kernel, QTensor) else kernel.shape


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


def _weight_only_matmul(x, weight: QTensor):
    """Float activations. A channel's scale goes after the product: codes are exact in bf16."""
    if weight.scale.shape[-1] == 1:
        w, after = _centred_codes(weight), weight.scale[:, 0]
    else:
        w, after = weight.dequantize(x.dtype), jnp.float32(1)
    y = jax.lax.dot_general(
        x, w.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y * after


def _integer_matmul(x, weight: QTensor):
    """Per-token integer activations times integer weights; both scales applied after the sum."""
    assert weight.act_bits is not None
    codes, x_scale, sums = reference_rows.quantize_rows(x, weight.act_bits)
    if weight.scale.shape[-1] > 1:
        return x_scale * _grouped(codes, weight)
    y = reference.matmul_codes(codes, weight.unpacked())
    if weight.zero is not None:  # x.(c - z) = x.c - z sum(x): exact, and codes stay within int8
        y = y - sums.astype(jnp.float32) * weight.zero[:, 0].astype(jnp.float32)
    return y * x_scale * weight.scale[:, 0]


def _grouped(codes, weight: QTensor):
    y = reference.grouped_matmul_codes(codes, weight.unpacked(), weight.scale, weight.group)
    if weight.zero is None:
        return y
    groups, group = weight.scale.shape[-1], weight.group
    padded = jnp.pad(codes, ((0, 0), (0, groups * group - codes.shape[-1])))
    sums = _row_sums(padded.reshape(-1, groups, group))[..., 0]
    shift = (weight.scale * weight.zero).astype(jnp.float32)
    return y - jnp.dot(sums, shift.T, precision=jax.lax.Precision.HIGHEST)


def _row_sums(codes):
    return jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)


def _centred_codes(weight: QTensor):
    codes = weight.unpacked()
    if weight.zero is None:
        return codes
    return codes.astype(jnp.int16) - weight.zero.astype(jnp.int16)
