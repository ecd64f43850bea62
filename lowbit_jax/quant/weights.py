"""What a rule does to one matrix: balance, rotate, quantise, in this order."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lowbit_jax.quant import hadamard, quantizers
from lowbit_jax.quant.masks import SMALLEST, channel_mask
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.quant.recipe import Rule
from pallas_kernels.formats import FORMATS, pack_codes


class Given(NamedTuple):
    """What the transforms of one layer need beside its rule; stacked layers lead with an axis.

    Attributes:
        absmax: of each channel of its input; None where the rule needs no statistics.
        alpha: of the balance, see `quant.masks`.
        signs: +-1, of the rotation; None where the rule does not rotate.
    """

    absmax: Float[Array, "*l k"] | None = None
    alpha: Float[Array, "*l"] | None = None
    signs: Float[Array, "*l k"] | None = None


NOTHING = Given()


def treat_kernel(
    kernel: Float[Array, "k n"] | TransformedKernel, rule: Rule, given: Given = NOTHING
) -> QTensor | TransformedKernel:
    """What a rule makes of a kernel, floating or transformed already.

    Raises:
        ValueError: a kernel to be balanced or rotated that is so already.
    """
    done = kernel if isinstance(kernel, TransformedKernel) else TransformedKernel(kernel)
    weight = done.kernel.T
    before = done.mask is not None, done.rotation is not None
    if (rule.balance is not None and any(before)) or (rule.rotation is not None and before[1]):
        raise ValueError(
            f"rule '{rule.match}' balances or rotates a kernel that is balanced or rotated already"
        )
    mask = mask_of(rule, column_absmax(weight), given)
    rotation = rotation_of(rule, weight.shape[1])
    weight = transform_weight(weight, mask, rotation)
    if done.mask is not None:
        mask = done.mask if mask is None else done.mask * mask
    rotation = rotation or done.rotation
    if rule.weights is None:
        return TransformedKernel(weight.T.astype(done.dtype), mask, rotation)
    static = static_scale(rule, given, mask)
    made = quantize_weight(weight, rule)
    return dataclasses.replace(made, mask=mask, rotation=rotation, act_scale=static)


def static_scale(
    rule: Rule, given: Given, mask: Float32[Array, "k"] | None
) -> Float32[Array, ""] | None:
    """The one scale of a static rule's inputs: the largest ever seen is the largest code."""
    if not rule.act_static:
        return None
    assert given.absmax is not None and rule.act_bits is not None
    largest = jnp.max(given.absmax if mask is None else given.absmax * jnp.abs(mask))
    scale = largest.astype(jnp.float32) * jnp.float32(1 / (2 ** (rule.act_bits - 1) - 1))
    return jnp.where(scale < SMALLEST, 1.0, scale)


def column_absmax(weight: Float[Array, "n k"]) -> Float32[Array, "k"]:
    """The largest magnitude of what meets each input."""
    return jnp.max(jnp.abs(weight), axis=0).astype(jnp.float32)


def mask_of(rule: Rule, columns: Float32[Array, "k"], given: Given) -> Float32[Array, "k"] | None:
    """The mask of a rule's balance, with the signs of its rotation; None if it has neither.

    Args:
        rule: what to do.
        columns: `column_absmax` of the weights.
        given: what is needed of it: absmax and alpha to balance, signs to rotate.
    """
    mask = None
    if rule.balance is not None:
        assert given.absmax is not None and given.alpha is not None
        mask = channel_mask(given.absmax, columns, given.alpha)
    if rule.rotation is None:
        return mask
    assert given.signs is not None
    return given.signs if mask is None else mask * given.signs


def rotation_of(rule: Rule, k: int) -> int | None:
    """The block size of a rule's rotation of k channels.

    Raises:
        ValueError: see `hadamard.rotation_size`.
    """
    if rule.rotation is None:
        return None
    return hadamard.rotation_size(k, rule.rotation, f"rule '{rule.match}'")


def transform_weight(
    weight: Float[Array, "n k"], mask: Float32[Array, "k"] | None, rotation: int | None
) -> Float[Array, "n k"]:
    """`(weight / mask) @ R`, for inputs that become `(x * mask) @ R`; in float32 if it is either.

    Any rows of a matrix can be transformed by themselves.
    """
    if mask is not None:
        weight = weight.astype(jnp.float32) / mask
    return weight if rotation is None else hadamard.rotate(weight, rotation)


def quantize_kernel(kernel: Float[Array, "k n"], rule: Rule) -> QTensor:
    """Quantise one Flax kernel (k, n)."""
    return quantize_weight(kernel.T, rule)


def quantize_weight(weight: Float[Array, "n k"], rule: Rule) -> QTensor:
    """Quantise one matrix in PyTorch's orientation (n, k), by the formulas of `quant.quantizers`.

    Raises:
        ValueError: a rule without a weight spec.
    """
    spec = rule.weights
    if spec is None:
        raise ValueError(f"rule '{rule.match}' keeps its kernels in floating point")
    n, k = weight.shape
    group = spec.granularity if isinstance(spec.granularity, int) else None
    sharing = {"group": group, "per_tensor": spec.granularity == "tensor"}
    if spec.format == "ternary":
        codes, scale, zero = _TERNARY[spec.quantizer](weight, **sharing)
    else:
        bits = FORMATS[spec.format].bits
        codes, scale, zero = _INTEGER[spec.quantizer](weight, bits, **sharing)
    return QTensor(
        codes=pack_codes(codes, spec.format),
        scale=scale,
        zero=zero,
        format=spec.format,
        shape=(n, k),
        group=min(group or k, k),
        act_bits=rule.act_bits,
    )


_INTEGER = {"absmax": quantizers.absmax, "minmax": quantizers.minmax, "mse": quantizers.mse}
_TERNARY = {
    "absmean": quantizers.absmean,
    "twn": quantizers.twn,
    "least_squares": quantizers.least_squares_fast,
}
