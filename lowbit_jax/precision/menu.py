"""What a unit's weights may be quantised to, and what that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from lowbit_jax.checkpoint_parts import OUTER, iter_parts
from lowbit_jax.precision.rules import rule_of
from lowbit_jax.precision.units import Unit
from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.quant.recipe import Balance, Recipe, Rule, WeightSpec
from lowbit_jax.quant.report import SizeReport, size_report
from lowbit_jax.quant.stacks import iter_layers, layer_paths
from lowbit_jax.quant.weights import Given, treat_kernel
from pallas_kernels.formats import FORMATS

FLOAT = "float"  # name of the level that is not quantised

MENU = (
    WeightSpec(format="ternary", quantizer="least_squares"),
    WeightSpec(format="int4", quantizer="mse"),
    WeightSpec(format="int6", quantizer="mse"),
    WeightSpec(format="int8", quantizer="absmax"),
)
"""The weights of the named recipes, per output channel, and six bits between."""
ACT_BITS = (4, 6, 8)
FLOAT_BITS = 16  # what an activation that is not quantised counts


def level_name(spec: WeightSpec) -> str:
    """Such as "int4 mse channel": everything that is in a spec."""
    return f"{spec.format} {spec.quantizer} {spec.granularity}"


def short_name(level: str) -> str:
    """A level's bits as a table has them: "4" for int4, "float" for none."""
    word = level.split(" ", 1)[0]
    return str(FORMATS[word].bits) if word in FORMATS else word


def unit_bytes(
    params: Any, units: Sequence[Unit], menu: Sequence[WeightSpec], like: Recipe | None = None
) -> np.ndarray:
    """Bytes of each unit's kernels in each level: int64[units, levels], floating point last.

    Of shapes alone, all that is stored: codes with their padding, scales, zero points, masks;
    floating kernels in their own dtype. Biases are the same in every level and not in it.

    Args:
        params: parameters, or their shapes.
        units: of the model.
        menu: levels of the weights.
        like: recipe that lends its transforms, see `rules.rule_of`.
    """
    floating = {}
    for path, kernel, index in iter_layers(params):
        shape = kernel.shape if index is None else kernel.shape[1:]
        floating[path] = jax.ShapeDtypeStruct(shape, kernel.dtype)

    def row(unit: Unit) -> list[int]:
        rules = [rule_of(unit, spec, 8, like) for spec in menu]
        kernels = [floating[layer] for layer in unit.layers]
        sizes = [sum(tree_bytes(_planned(kernel, rule)) for kernel in kernels) for rule in rules]
        return [*sizes, sum(map(tree_bytes, kernels))]

    return np.array([row(unit) for unit in units], np.int64)


def _planned(kernel: jax.ShapeDtypeStruct, rule: Rule) -> Any:
    """The shapes of a quantised kernel: which codes and which mask they are does not matter."""
    assert rule.weights is not None
    alike = dataclasses.replace(
        rule,
        match="",
        weights=dataclasses.replace(rule.weights, feedback=None),
        balance=None if rule.balance is None else Balance(alpha=0.5),
    )
    return _treated(kernel, alike)


@lru_cache(maxsize=1024)
def _treated(kernel: jax.ShapeDtypeStruct, rule: Rule) -> Any:
    channels: Any = jax.ShapeDtypeStruct(kernel.shape[:1], np.float32)
    number: Any = jax.ShapeDtypeStruct((), np.float32)
    given = Given(absmax=channels, alpha=number, signs=channels)
    return jax.eval_shape(lambda w, g: treat_kernel(w, rule, g), kernel, given)


def planned_sizes(params: Any, recipe: Recipe) -> SizeReport:
    """What a recipe stores of a model, from shapes alone; the rest in its own dtype.

    Raises:
        RecipeError: a rule that decides nothing.
    """
    chosen = recipe.assign(layer_paths(params))

    def plan(part: str, path: str, leaf: Any) -> Any:
        linear, _, name = path.rpartition("/")
        rule = chosen[linear if part == OUTER else f"{part}/{linear}"] if name == "kernel" else None
        if rule is None or rule.weights is None:
            return leaf
        return _planned(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rule)

    return size_report(
        (part, {path: plan(part, path, leaf) for path, leaf in leaves.items()})
        for part, leaves in iter_parts(params)
    )


def check_menu(menu: Iterable[WeightSpec], act_bits: Iterable[int]) -> None:
    """That no level is there twice and all bits are possible.

    Raises:
        ValueError: names the level.
    """
    names = [level_name(spec) for spec in menu]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"level '{name}' is in the menu {names.count(name)} times")
    wrong = [bits for bits in act_bits if not 2 <= bits <= 8]
    if wrong:
        raise ValueError(f"activation bits {wrong} outside 2..8")
