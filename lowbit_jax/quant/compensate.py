"""`quantize_with_feedback`: a recipe's formats, with codes chosen by what inputs a linear sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.quant import feedback
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, transform_rows
from lowbit_jax.quant.recipe import Recipe, Rule
from lowbit_jax.quant.stacks import Tree, map_stacks
from lowbit_jax.quant.transform import Treatment, decide
from lowbit_jax.quant.weights import quantize_weight, static_scale, treat_kernel
from pallas_kernels.formats import FORMATS, pack_codes

if TYPE_CHECKING:  # calibration knows quantised trees
    from lowbit_jax.calibration.statistics import Statistics


class FeedbackError(ValueError):
    """Hessians that are missing or cannot be used; the message names the layer."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Settings of `lowbit_jax.quant.feedback`.

    Attributes:
        damping: added to the diagonal of a Hessian, as a share of its mean.
        act_order: round inputs with a large diagonal first.
        refits: of ternary scales, each followed by another rounding.
        block: inputs rounded before what they lost goes to the rest.

    Raises:
        ValueError: a negative damping, no refit or no block.
    """

    damping: float = 0.01
    act_order: bool = True
    refits: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and self.refits >= 1 and self.block >= 1):
            raise ValueError(f"damping from 0, refits and block from 1 are possible, got {self}")


def quantize_with_feedback(
    params: Tree,
    recipe: Recipe,
    grams: Mapping[str, Float[Any, "k k"]],
    options: Feedback = Feedback(),
    statistics: Statistics | None = None,
) -> dict[str, Any]:
    """`quantize`, but with error feedback: same tree, formats and bytes, other codes and scales.

    Ternary kernels with a scale per channel get codes and the exact scale for them
    (`feedback.ternary`); all others keep the scales and zero points of the recipe's quantiser,
    groups too, and get new codes on that grid. Not under `jit`: layers are taken one by one, each
    with its Hessian on the device while it is used. Consecutive layers that are given one and the
    same array as Hessian share its factor, unless they are balanced or rotated.

    Args:
        params: float parameters.
        recipe: what to do.
        grams: X^T X of the input of each linear by its layer path, before any balance or rotation,
            or a mean of it: float64 of `calibration`, or one array for several paths, see
            `share_grams`.
        options: settings.
        statistics: as `quantize` has them.

    Raises:
        FeedbackError: a linear that is to be quantised without a Hessian, or with one of another
            size, or one that is not positive definite even when damped.
        RecipeError, ValueError, NonFiniteError: see `quantize`.
    """
    chosen = decide(params, recipe, statistics)
    missing = [path for path, rule in chosen.items() if rule and rule.weights and path not in grams]
    if missing:
        raise FeedbackError(
            f"no X^T X of {missing[0]} and {len(missing) - 1} more linears: collect statistics "
            "with `grams` matching them"
        )
    treat = _Compensation(chosen, recipe, statistics, _Factors(grams, options), options)
    return map_stacks(params, treat.stack, treat.kernel)


@dataclass(frozen=True)
class _Compensation(Treatment):
    """A treatment whose last step, quantising, is with feedback."""

    factors: _Factors
    options: Feedback

    def kernel(self, path: tuple[str, ...], kernel):
        """The kernel of a linear outside the stacks."""
        layer = "/".join(path)
        return kernel if self.chosen[layer] is None else self._one(layer, kernel)

    def run(self, layers: list[str], linear: tuple[str, ...], kernel):
        """The kernels of one linear of consecutive layers, one by one."""
        paths = ["/".join((layer, *linear)) for layer in layers]
        if self.chosen[paths[0]] is None:
            return kernel
        treated = [
            self._one(path, jax.tree.map(lambda leaf, at=i: leaf[at], kernel))
            for i, path in enumerate(paths)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *treated)

    def _one(self, path: str, kernel):
        rule = self.chosen[path]
        assert rule is not None
        if rule.balance is not None or rule.rotation is not None:  # first, as a float32 kernel
            kernel = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kernel)
        before = dataclasses.replace(rule, weights=None, act_bits=None, act_static=False)
        given = self.given(path, kernel.shape[-2])
        done = treat_kernel(kernel, before, given)
        if rule.weights is None:
            return done
        assert isinstance(done, TransformedKernel)
        factor = self.factors(path, done)
        tensor = _quantize(done.kernel, factor, rule, self.options)
        if not bool(jnp.isfinite(tensor.scale).all()):
            raise FeedbackError(
                f"{path}: its X^T X is not positive definite with damping "
                f"{self.options.damping:g}, or holds NaN; more samples or more damping help"
            )
        static = static_scale(rule, given, done.mask)
        return dataclasses.replace(tensor, mask=done.mask, rotation=done.rotation, act_scale=static)


def share_grams(
    grams: Mapping[str, Float[Any, "k k"]], groups: list[list[str]]
) -> dict[str, Float[Any, "k k"]]:
    """Give one Hessian to all layers that see the same input, such as FLUX's modulation.

    Args:
        grams: X^T X by layer path; of each group, of one member at least.
        groups: layer paths that see one input.

    Raises:
        FeedbackError: a group without any Hessian.
    """
    shared = dict(grams)
    for group in groups:
        known = [path for path in group if path in grams]
        if not known:
            raise FeedbackError(f"no X^T X of any of {', '.join(group[:4])}")
        shared |= dict.fromkeys(group, grams[known[0]])
    return shared


class _Factors:
    """The factor of the last Hessian: only one is ever kept."""

    def __init__(self, grams: Mapping[str, Any], options: Feedback):
        self._grams, self._options = grams, options
        self._last: tuple[Any, feedback.Factor] | None = None

    def __call__(self, path: str, kernel: TransformedKernel) -> feedback.Factor:
        gram, k = self._grams[path], kernel.shape[-2]
        if gram.shape != (k, k):
            raise FeedbackError(f"{path}: X^T X has shape {gram.shape}, its input is {k} wide")
        plain = kernel.mask is None and kernel.rotation is None
        if not plain or self._last is None or self._last[0] is not gram:
            self._last = None  # before the next is made
            ready = _transformed(_normalized(gram), kernel)
            made = _factorize(ready, self._options.damping, self._options.act_order)
            self._last = (gram if plain else None), made
        return self._last[1]


def _transformed(gram, kernel: TransformedKernel):
    """X^T X of rows that are masked and rotated."""
    if kernel.mask is None and kernel.rotation is None:
        return gram
    half = transform_rows(gram, kernel.mask, kernel.rotation)
    return transform_rows(half.T, kernel.mask, kernel.rotation)


def _normalized(gram) -> np.ndarray:
    """Of mean diagonal 1, in float32: sums over many rows of large inputs may be beyond that."""
    gram = np.asarray(gram)
    mean = np.diagonal(gram).astype(np.float64).mean()
    return (gram / mean if mean > 0 else gram).astype(np.float32)


@partial(jax.jit, static_argnames=("damping", "act_order"))
def _factorize(gram, damping: float, act_order: bool) -> feedback.Factor:
    return feedback.factorize(gram, damping=damping, act_order=act_order)


@partial(jax.jit, static_argnames=("rule", "options"))
def _quantize(kernel, factor: feedback.Factor, rule: Rule, options: Feedback) -> QTensor:
    return quantize_weight_with_feedback(kernel.T, factor, rule, options)


def quantize_weight_with_feedback(
    weight: Float[Array, "n k"],
    factor: feedback.Factor,
    rule: Rule,
    options: Feedback = Feedback(),
) -> QTensor:
    """`transform.quantize_weight` with error feedback; pure. NaN in `factor` makes scales NaN."""
    plain = quantize_weight(weight, rule)
    codes, scale, zero = plain.unpacked(), plain.scale, plain.zero
    if plain.format == "ternary" and scale.shape == (len(weight), 1):
        start = codes, scale, zero
        codes, scale, _ = feedback.ternary(
            weight, factor, start, refits=options.refits, block=options.block
        )
    else:
        form = FORMATS[plain.format]
        low = -form.high if zero is None else form.low  # as the symmetric quantisers have it
        grid = feedback.Grid(scale, zero, plain.group, low, form.high)
        codes, error = feedback.round_to(weight, factor, grid, block=options.block)
        damaged = jnp.isnan(error) if len(scale) > 1 else jnp.isnan(error).any()[None]
        scale = jnp.where(damaged[:, None], jnp.nan, scale)
    return dataclasses.replace(plain, codes=pack_codes(codes, plain.format), scale=scale)
