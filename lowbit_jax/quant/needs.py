"""What a recipe's rules need of a model's activations: that it is there, and each layer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lowbit_jax.quant import hadamard
from lowbit_jax.quant.masks import over_halves, over_runs
from lowbit_jax.quant.ranged import RangedKernel
from lowbit_jax.quant.recipe import Recipe, RecipeError, Rule
from lowbit_jax.quant.stacks import Tree, iter_layers
from lowbit_jax.quant.typical import typical_rows
from lowbit_jax.quant.weights import Given

if TYPE_CHECKING:  # calibration knows quantised trees
    from lowbit_jax.calibration.statistics import Statistics

Grams = Mapping[str, Float[Any, "k k"]]


def check_statistics(
    recipe: Recipe,
    chosen: dict[str, Rule | None],
    statistics: Statistics | None,
    params: Tree,
    grams: Grams | None = None,
) -> None:
    """That a recipe has the statistics it needs, and that they are this model's.

    Raises:
        RecipeError: there are none. StatisticsError: they are another model's.
    """
    rules = {path: rule for path, rule in chosen.items() if rule is not None}
    needing = [path for path, rule in rules.items() if rule.needs_statistics]
    if grams is None:
        needing += [path for path, rule in rules.items() if rule.needs_grams]
    if needing and statistics is None:
        raise RecipeError(
            f"recipe '{recipe.name}' needs statistics of the activations of {len(needing)} layers, "
            f"such as {needing[0]}: make them with calibrate_model, or in Python with "
            "lowbit_jax.calibration, and pass them (convert_and_quantize --stats FILE)"
        )
    if statistics is not None and needing and is_concrete(*jax.tree.leaves(statistics)):
        statistics.check(params)
    for path, kernel, _ in iter_layers(params):
        rule = rules.get(path)
        if rule is None:
            continue
        if rule.needs_grams:
            gram, k = _gram_of(path, statistics, grams), kernel.shape[-2]
            if gram is None:
                raise RecipeError(
                    f"recipe '{recipe.name}' needs X^T X of the inputs of {path}, and there is "
                    "none: collect statistics with `grams`, a regular expression for such layers, "
                    "or take recipe.rounded() (convert_and_quantize --no-feedback)"
                )
            if gram.shape != (k, k):
                raise ValueError(f"{path}: X^T X has shape {gram.shape}, its input is {k} wide")
        if statistics is None or rule.balance is None:
            continue
        if rule.balance.ranges not in (None, len(statistics.ranges)):
            raise RecipeError(
                f"recipe '{recipe.name}' has {rule.balance.ranges} alphas for {path}, the "
                f"statistics {len(statistics.ranges)} timestep ranges: collect them with as many"
            )


def _gram_of(layer: str, statistics: Statistics | None, grams: Grams | None) -> Any:
    if grams is not None:
        return grams.get(layer)
    found = None if statistics is None else statistics.layers.get(layer)
    return None if found is None else found.gram


def given_of(
    rule: Rule,
    layer: str,
    k: int,
    recipe: Recipe,
    statistics: Statistics | None,
    grams: Grams | None = None,
) -> Given:
    """What a layer's rule needs beside the weights; absmax and alpha of every range it balances."""
    absmax: Any = None
    alpha: Any = None
    if rule.needs_statistics:
        assert statistics is not None  # check_statistics
        absmax = over_runs(statistics.layers[layer].absmax)
    rotates = rule.rotation is not None
    signs: Any = hadamard.signs(recipe.seed, layer, k) if rotates else None
    if rule.balance is not None:
        assert statistics is not None
        alpha = None if rule.chooses_alpha else np.asarray(rule.balance.alpha, np.float32)
        if rule.balance.ranges is not None:
            absmax = over_halves(statistics.layers[layer].absmax)
    gram: Any = None
    if rule.needs_grams:
        gram = _normalized(_gram_of(layer, statistics, grams))
    rows: Any = None
    if rule.chooses_alpha:
        assert statistics is not None
        rows = typical_rows(statistics.layers[layer], layer)
    return Given(absmax, alpha, signs, gram, rows)


def check_feedback(layer: str, made: Any) -> None:
    """That error feedback found codes; not on traced arrays.

    Raises:
        ValueError: X^T X of the layer's inputs cannot be used.
    """
    tensor: Any = made.kernels if isinstance(made, RangedKernel) else made
    scale = tensor.scale
    if is_concrete(scale) and not bool(jnp.isfinite(scale).all()):
        raise ValueError(
            f"{layer}: X^T X of its inputs is not positive definite even when damped; collect "
            "statistics of more samples"
        )


def _normalized(gram) -> Any:
    """Of mean diagonal 1, in float32: sums over many rows of large inputs may be beyond that."""
    if not is_concrete(gram):
        return gram
    mean = np.diagonal(gram).astype(np.float64).mean()
    return (gram / mean if mean > 0 else gram).astype(np.float32)


def is_concrete(*arrays: Any) -> bool:
    """Whether all of them hold numbers: no tracers, no shapes."""
    return not any(isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)) for array in arrays)
