"""Quantisation as pure functions over parameter trees: `quantize(params, RECIPES["w8a8"])`."""

from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES, Recipe, Rule, WeightSpec, load_recipe
from lowbit_jax.quant.transform import dequantize, quantize

__all__ = [
    "RECIPES",
    "QTensor",
    "Recipe",
    "Rule",
    "WeightSpec",
    "dequantize",
    "load_recipe",
    "quantize",
]
