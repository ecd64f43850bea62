"""`quantize(params, recipe) -> params` and its inverse: pure functions over parameter trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.quant import quantizers
from lowbit_jax.quant.qtensor import QTensor, is_qtensor
from lowbit_jax.quant.recipe import Recipe, Rule
from lowbit_jax.quant.stacks import (
    Tree,
    iter_layers,
    kernels,
    layer_paths,
    map_kernels,
    map_stacks,
    runs,
    segments,
    slice_layers,
)
from pallas_kernels.formats import FORMATS, pack_codes


class NonFiniteError(ValueError):
    """Weights with NaN or inf; the message names the parameters."""


def quantize(params: Tree, recipe: Recipe) -> dict[str, Any]:
    """Replace kernels by `QTensor`s as a recipe says; everything else is kept as it is.

    Pure: works under `jit`, `vmap` and `jax.eval_shape` (a plan that costs no memory). Stacked
    layers treated alike stay one segment; where treatments change, the stack is cut.

    Args:
        params: parameter tree of any model here; kernels (k, n), or (l, k, n) inside stacks.
        recipe: what to do.

    Raises:
        RecipeError: a rule that decides nothing.
        ValueError: a kernel that is quantised already.
        NonFiniteError: a NaN or inf in a kernel to be quantised, unless the recipe keeps those.
            Not checked on traced arrays; there it makes scales, and so outputs, non-finite.
    """
    chosen = decide(params, recipe)

    def stacked(paths: list[str], kernel, rule: Rule) -> QTensor:
        # one layer at a time: the temporaries of a quantiser are several times its input
        return jax.lax.map(partial(quantize_kernel, rule=rule), kernel)

    return replace_kernels(
        params, chosen, lambda path, kernel, rule: quantize_kernel(kernel, rule), stacked
    )


def decide(params: Tree, recipe: Recipe) -> dict[str, Rule | None]:
    """How each layer path of float parameters is quantised; None for those that stay as they are.

    Raises:
        RecipeError, ValueError, NonFiniteError: see `quantize`.
    """
    chosen = recipe.assign(layer_paths(params))
    _check_unquantized(params, chosen)
    return chosen | dict.fromkeys(_nonfinite_layers(params, chosen, recipe))


def replace_kernels(
    params: Tree,
    chosen: Mapping[str, Rule | None],
    single: Callable[[str, Any, Rule], QTensor],
    stacked: Callable[[list[str], Any, Rule], QTensor],
) -> dict[str, Any]:
    """A copy of a tree with the kernels that have a rule replaced.

    Stacks are cut where rules change.

    Args:
        params: the tree.
        chosen: see `decide`.
        single: (layer path, kernel (k, n), rule) -> its QTensor.
        stacked: (layer paths, kernel (l, k, n), rule) -> the QTensor of all of them.
    """

    def treat(path: tuple[str, ...], kernel):
        rule = chosen["/".join(path)]
        return kernel if rule is None else single("/".join(path), kernel, rule)

    def treat_stack(path: tuple[str, ...], stack: Tree) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for first, length, tree in segments(stack):
            linears = [linear for linear, _ in kernels(tree)]
            names = [
                {linear: "/".join((*path, str(first + i), *linear)) for linear in linears}
                for i in range(length)
            ]
            rules = [[_treatment(chosen[name]) for name in layer.values()] for layer in names]
            for start, stop in runs(rules):

                def treat_layers(linear, kernel, layers=names[start:stop]):
                    rule = chosen[layers[0][linear]]
                    paths = [layer[linear] for layer in layers]
                    return kernel if rule is None else stacked(paths, kernel, rule)

                layers = slice_layers(tree, start, stop)
                out[str(first + start)] = map_kernels(layers, treat_layers)
        return out

    return map_stacks(params, treat_stack, treat)


def _treatment(rule: Rule | None) -> Any:
    """What two rules must share for their layers to be stacked."""
    return rule and (rule.weights, rule.act_bits)


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


def dequantize(params: Tree, dtype=jnp.float32) -> dict[str, Any]:
    """The tree with every `QTensor` replaced by the float kernel (.., k, n) it stands for."""

    def restore(leaf):
        return jnp.swapaxes(leaf.dequantize(dtype), -1, -2) if is_qtensor(leaf) else leaf

    return jax.tree.map(restore, params, is_leaf=is_qtensor)


def _check_unquantized(params: Tree, chosen: dict[str, Rule | None]) -> None:
    done = [
        path
        for path, kernel, _ in iter_layers(params)
        if chosen[path] is not None and isinstance(kernel, QTensor)
    ]
    if done:
        raise ValueError(f"{done[0]} and {len(done) - 1} more kernels are quantised already")


def _nonfinite_layers(params: Tree, chosen: dict, recipe: Recipe) -> list[str]:
    """Layers to keep in floating point for NaN or inf; raises unless the recipe allows it."""
    found = []
    for path, kernel, index in iter_layers(params):
        if chosen[path] is None or not _is_concrete(kernel):
            continue
        if not bool(jnp.isfinite(kernel if index is None else kernel[index]).all()):
            found.append(path)
    if found and recipe.on_nonfinite == "error":
        raise NonFiniteError(nonfinite_message(found, recipe))
    return found


def nonfinite_message(found: list[str], recipe: Recipe) -> str:
    """What to say about kernels with NaN or inf."""
    names = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return (
        f"NaN or inf in {names}: mend the checkpoint, or set on_nonfinite='keep' in recipe "
        f"'{recipe.name}' to leave such kernels in floating point"
    )


def _is_concrete(array: Any) -> bool:
    return not isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct))
