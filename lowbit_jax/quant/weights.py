"""What a rule does to one matrix: balance, rotate, quantise, in this order."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lowbit_jax.quant import feedback, hadamard, quantizers
from lowbit_jax.quant.asymmetric import asymmetric_rows
from lowbit_jax.quant.masks import SMALLEST, channel_mask
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, transform_rows
from lowbit_jax.quant.recipe import Feedback, Rule, WeightSpec
from pallas_kernels import reference_rows
from pallas_kernels.formats import FORMATS, pack_codes

ALPHAS = (0.01, 0.1, 0.25, 0.5, 0.75)  # that are tried where an alpha is to be chosen
OUTPUTS = 512  # of a layer that are looked at for it


class Given(NamedTuple):
    """What the transforms of one layer need beside its rule; stacked layers lead with an axis.

    Attributes:
        absmax: of each channel of its input; None where the rule needs no statistics. Where a
            balance has timestep ranges, of each of them.
        alpha: of the balance, see `quant.masks`; likewise.
        signs: +-1, of the rotation; None where the rule does not rotate.
        gram: X^T X of its input, by any factor; None where weights are rounded without it.
        rows: some inputs, where the balance is chosen by the error they give.
    """

    absmax: Float[Array, "*l *r k"] | None = None
    alpha: Float[Array, "*l *r"] | None = None
    signs: Float[Array, "*l k"] | None = None
    gram: Float[Array, "*l k k"] | None = None
    rows: Float[Array, "*l t k"] | None = None

    def of_range(self, r: int) -> Given:
        """For one of several timestep ranges."""
        assert self.absmax is not None and self.alpha is not None
        return self._replace(absmax=self.absmax[r], alpha=self.alpha[r])


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
    mask = mask_of(rule, column_absmax(weight), given, sample_of(weight))
    rotation = rotation_of(rule, weight.shape[1])
    weight = transform_weight(weight, mask, rotation)
    mask, rotation = _product(done.mask, mask), rotation or done.rotation
    if rule.weights is None:
        return TransformedKernel(weight.T.astype(done.dtype), mask, rotation)
    return _quantized(weight, rule, given, mask, rotation)


def treat_weight(
    weight: Float[Array, "n k"], rule: Rule, given: Given, columns: Float32[Array, "k"]
) -> QTensor:
    """What a rule that quantises makes of some rows (n, k) of a matrix.

    Args:
        weight: the rows.
        rule: what to do.
        given: see there.
        columns: `column_absmax` of the whole matrix.
    """
    mask = mask_of(rule, columns, given, sample_of(weight))
    rotation = rotation_of(rule, weight.shape[1])
    return _quantized(transform_weight(weight, mask, rotation), rule, given, mask, rotation)


def _quantized(weight: Array, rule: Rule, given: Given, mask, rotation: int | None) -> QTensor:
    """Of a transformed weight, with the transforms of its input."""
    made = quantize_weight(weight, rule, factor_of(rule, given, mask, rotation))
    static = static_scale(rule, given, mask)
    return dataclasses.replace(made, mask=mask, rotation=rotation, act_scale=static)


def factor_of(
    rule: Rule, given: Given, mask: Float32[Array, "k"] | None, rotation: int | None
) -> feedback.Factor | None:
    """What error feedback needs of the inputs, masked and rotated; None for rules without."""
    if not rule.needs_grams:
        return None
    assert given.gram is not None
    gram = transform_rows(jnp.asarray(given.gram), mask, rotation)
    gram = transform_rows(gram.T, mask, rotation)
    assert rule.weights is not None and isinstance(rule.weights.feedback, Feedback)
    settings = rule.weights.feedback
    return feedback.factorize(gram, damping=settings.damping, act_order=settings.act_order)


def _product(first: Array | None, second: Array | None) -> Array | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


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


def sample_of(weight: Any) -> Any:
    """Some of the rows of (n, k), of jax or numpy, evenly taken: at most `OUTPUTS`."""
    return weight[:: -(-weight.shape[0] // OUTPUTS)]


def mask_of(
    rule: Rule, columns: Float32[Array, "k"], given: Given, sample: Float[Array, "m k"]
) -> Float32[Array, "k"] | None:
    """The mask of a rule's balance, with the signs of its rotation; None if it has neither.

    Args:
        rule: what to do.
        columns: `column_absmax` of the weights.
        given: what is needed of it: absmax and alpha to balance, signs to rotate, rows to choose.
        sample: some rows of the weights, to choose.
    """
    mask = None
    if rule.chooses_alpha:
        mask = _best_mask(rule, columns, given, sample)
    elif rule.balance is not None:
        assert given.absmax is not None and given.alpha is not None
        mask = channel_mask(given.absmax, columns, given.alpha)
    if rule.rotation is None:
        return mask
    assert given.signs is not None
    return given.signs if mask is None else mask * given.signs


def _best_mask(rule: Rule, columns: Array, given: Given, sample: Array) -> Float32[Array, "k"]:
    """Of no balance and those of `ALPHAS`, the one with which the output's error is least.

    Inputs and weights are transformed and rounded as they will be, without error feedback.
    """
    assert given.absmax is not None and given.rows is not None and rule.weights is not None
    inputs, bits = given.rows, rule.act_bits
    balanced = [channel_mask(given.absmax, columns, alpha) for alpha in ALPHAS]
    masks = jnp.stack([jnp.ones_like(columns), *balanced])
    rotation = rotation_of(rule, sample.shape[1])
    plain = dataclasses.replace(rule.weights, feedback=None)
    rounding = dataclasses.replace(rule, weights=plain)
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    exact = dot(inputs, sample.astype(jnp.float32).T)

    def error(mask: Array) -> Array:
        full = mask if given.signs is None else mask * given.signs
        weight = quantize_weight(transform_weight(sample, full, rotation), rounding)
        rows = transform_rows(inputs, full, rotation)
        static = static_scale(rule, given, full)
        if static is not None and bits is not None:
            most = 2 ** (bits - 1) - 1
            rows = jnp.clip(jnp.round(rows / static), -most, most) * static
        elif bits is not None and not rule.act_symmetric:
            rows = asymmetric_rows(rows, bits).dequantize()
        elif bits is not None:
            codes, scale, _ = reference_rows.quantize_rows(rows, bits)
            rows = codes * scale
        return jnp.sum(jnp.square(dot(rows, weight.dequantize_stored().T) - exact))

    return masks[jnp.argmin(jax.lax.map(error, masks))]


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


def quantize_weight(
    weight: Float[Array, "n k"], rule: Rule, factor: feedback.Factor | None = None
) -> QTensor:
    """Quantise one matrix in PyTorch's orientation (n, k), by the formulas of `quant.quantizers`.

    Args:
        weight: the matrix, or some of its rows.
        rule: how.
        factor: for error feedback, see `factor_of`. NaN in it makes scales NaN.

    Raises:
        ValueError: a rule without a weight spec; error feedback without `factor`.
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
    if isinstance(spec.feedback, Feedback):
        if factor is None:
            raise ValueError(f"rule '{rule.match}': feedback needs X^T X of the layer's inputs")
        codes, scale = _with_feedback(weight, factor, spec, codes, scale, zero)
    return QTensor(
        codes=pack_codes(codes, spec.format),
        scale=scale,
        zero=zero,
        format=spec.format,
        shape=(n, k),
        group=min(group or k, k),
        act_bits=rule.act_bits,
        act_symmetric=rule.act_symmetric,
    )


def _with_feedback(
    weight: Array, factor: feedback.Factor, spec: WeightSpec, codes, scale, zero
) -> tuple[Array, Array]:
    """Other codes on the grid that was found; of ternary per channel, the best scale for them."""
    assert isinstance(spec.feedback, Feedback)
    if spec.format == "ternary" and scale.shape == (len(weight), 1):
        start, refits = (codes, scale, None), spec.feedback.refits
        found, fitted, _ = feedback.fit(weight, factor, start, refits=refits)
        return found, fitted
    k = weight.shape[1]
    group = spec.granularity if isinstance(spec.granularity, int) else k
    known = FORMATS[spec.format]
    low = -known.high if zero is None else known.low  # as the symmetric quantisers have it
    grid = feedback.Grid(scale, zero, min(group, k), low, known.high)
    found, error = feedback.round_to(weight, factor, grid)
    damaged = jnp.isnan(error) if len(scale) > 1 else jnp.isnan(error).any()[None]
    return found, jnp.where(damaged[:, None], jnp.nan, scale)


_INTEGER = {"absmax": quantizers.absmax, "minmax": quantizers.minmax, "mse": quantizers.mse}
_TERNARY = {
    "absmean": quantizers.absmean,
    "twn": quantizers.twn,
    "least_squares": quantizers.least_squares_fast,
}
