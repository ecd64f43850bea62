"""Quantisation as pure functions over parameter trees: `quantize(params, RECIPES["w8a8"])`."""

from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.quant.recipe import RECIPES, Balance, Recipe, Rule, WeightSpec, load_recipe
from lowbit_jax.quant.transform import balance, dequantize, quantize, rotate

__all__ = [
    "RECIPES",
    "Balance",
    "QTensor",
    "Recipe",
    "Rule",
    "TransformedKernel",
    "WeightSpec",
    "balance",
    "dequantize",
    "load_recipe",
    "quantize",
    "rotate",
]
