"""`quantize`, `balance`, `rotate`, `dequantize`: pure functions from parameter tree to tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.quant import hadamard
from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.masks import over_runs
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, is_kernel
from lowbit_jax.quant.recipe import Balance, Recipe, RecipeError, Rule
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
from lowbit_jax.quant.weights import Given, quantize_kernel, quantize_weight, treat_kernel

if TYPE_CHECKING:  # calibration knows quantised trees
    from lowbit_jax.calibration.statistics import Statistics

__all__ = [
    "NonFiniteError",
    "balance",
    "dequantize",
    "given_of",
    "nonfinite_message",
    "quantize",
    "quantize_kernel",
    "quantize_weight",
    "rotate",
]


class NonFiniteError(ValueError):
    """Weights with NaN or inf; the message names the parameters."""


def quantize(params: Tree, recipe: Recipe, statistics: Statistics | None = None) -> dict[str, Any]:
    """Replace kernels as a recipe says: balanced, rotated, quantised, in this order.

    A kernel becomes a `QTensor`, or a `TransformedKernel` where the rule quantises nothing;
    everything else is kept as it is. Kernels that `balance` or `rotate` has transformed keep that.

    Pure: works under `jit`, `vmap` and `jax.eval_shape` (a plan that costs no memory). Stacked
    layers treated alike stay one segment; where treatments change, the stack is cut.

    Args:
        params: parameter tree of any model here; kernels (k, n), or (l, k, n) inside stacks.
        recipe: what to do.
        statistics: of the model's activations, for recipes that balance.

    Raises:
        RecipeError: a rule that decides nothing; a recipe that needs statistics without them.
        StatisticsError: statistics of another model, by name.
        ValueError: a kernel that is quantised or transformed already; a width that no rotation of
            the size asked for fits.
        NonFiniteError: a NaN or inf in a kernel to be treated, unless the recipe keeps those.
            Not checked on traced arrays; there it makes scales, and so outputs, non-finite.
    """
    treat = Treatment(decide(params, recipe, statistics), recipe, statistics)
    return map_stacks(params, treat.stack, treat.kernel)


def decide(
    params: Tree, recipe: Recipe, statistics: Statistics | None = None
) -> dict[str, Rule | None]:
    """What is done to each layer path; None for those that stay as they are.

    Raises:
        As `quantize`.
    """
    chosen = recipe.assign(layer_paths(params))
    _check_unquantized(params, chosen)
    check_statistics(recipe, chosen, statistics, params)
    return chosen | dict.fromkeys(_nonfinite_layers(params, chosen, recipe))


@dataclass(frozen=True)
class Treatment:
    """What has been decided about every layer, and how a tree is rewritten by it."""

    chosen: dict[str, Rule | None]
    recipe: Recipe
    statistics: Statistics | None

    def kernel(self, path: tuple[str, ...], kernel):
        """The kernel of a linear outside the stacks."""
        layer = "/".join(path)
        rule = self.chosen[layer]
        if rule is None:
            return kernel
        return treat_kernel(kernel, rule, self.given(layer, kernel.shape[-2]))

    def stack(self, path: tuple[str, ...], stack: Tree) -> dict[str, Any]:
        """A stack, cut where treatments change."""
        out: dict[str, Any] = {}
        for first, length, tree in segments(stack):
            linears = [linear for linear, _ in kernels(tree)]
            layers = ["/".join((*path, str(first + i))) for i in range(length)]
            signatures = [[self._signature(f"{l}/{'/'.join(x)}") for x in linears] for l in layers]
            for start, stop in runs(signatures):
                treat = partial(self.run, layers[start:stop])
                out[str(first + start)] = map_kernels(slice_layers(tree, start, stop), treat)
        return out

    def run(self, layers: list[str], linear: tuple[str, ...], kernel):
        """The kernels of one linear of consecutive layers, treated alike."""
        paths = ["/".join((layer, *linear)) for layer in layers]
        rule = self.chosen[paths[0]]
        if rule is None:
            return kernel
        given = [self.given(path, kernel.shape[-2]) for path in paths]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *given)
        # one layer at a time: the temporaries of a quantiser are several times its input
        return jax.lax.map(lambda layer: treat_kernel(layer[0], rule, layer[1]), (kernel, stacked))

    def _signature(self, path: str) -> Any:
        """What two rules must share for their layers to be stacked."""
        rule = self.chosen[path]
        if rule is None:
            return None
        balanced = rule.balance is not None
        return rule.weights, rule.act_bits, rule.act_static, balanced, rule.rotation

    def given(self, path: str, k: int) -> Given:
        """What the rule of a layer needs beside the weights."""
        rule = self.chosen[path]
        assert rule is not None
        return given_of(rule, path, k, self.recipe, self.statistics)


def balance(
    params: Tree, statistics: Statistics, *, match: str, alpha: float = 0.5
) -> dict[str, Any]:
    """Balance kernels with their inputs, exactly: no product changes, see `quant.masks`.

    Args:
        params: floating parameter tree.
        statistics: of its activations.
        match: regular expression for the whole layer paths of the kernels.
        alpha: SmoothQuant's.

    Raises:
        As `quantize`.
    """
    rule = Rule(match=match, weights=None, balance=Balance(alpha=alpha))
    return quantize(params, Recipe(name="balance", rules=(rule,)), statistics)


def rotate(
    params: Tree, *, match: str, rotation: int | str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Rotate kernels and their inputs by a randomised Hadamard matrix, exactly.

    Args:
        params: parameter tree, floating or balanced.
        match: regular expression for the whole layer paths of the kernels.
        rotation: block size, "full" or "auto": see `hadamard.rotation_size`.
        seed: of the signs, with the layer path.

    Raises:
        As `quantize`.
    """
    rule = Rule(match=match, weights=None, rotation=rotation)
    return quantize(params, Recipe(name="rotate", rules=(rule,), seed=seed))


def check_statistics(
    recipe: Recipe, chosen: dict[str, Rule | None], statistics: Statistics | None, params: Tree
) -> None:
    """That a recipe has the statistics it needs, and that they are this model's.

    Raises:
        RecipeError: there are none. StatisticsError: they are another model's.
    """
    needing = [path for path, rule in chosen.items() if rule is not None and rule.needs_statistics]
    if not needing:
        return
    if statistics is None:
        raise RecipeError(
            f"recipe '{recipe.name}' needs statistics of the activations of {len(needing)} layers, "
            f"such as {needing[0]}: collect them with lowbit_jax.calibration and pass them "
            "(convert_and_quantize --stats FILE)"
        )
    if _is_concrete(*jax.tree.leaves(statistics)):
        statistics.check(params)


def given_of(
    rule: Rule, layer: str, k: int, recipe: Recipe, statistics: Statistics | None
) -> Given:
    """What a layer's rule needs beside the weights."""
    absmax: Any = None
    alpha: Any = None
    if rule.needs_statistics:
        assert statistics is not None  # check_statistics
        absmax = over_runs(statistics.layers[layer].absmax)
    if rule.balance is not None:
        alpha = np.float32(rule.balance.alpha)
    rotates = rule.rotation is not None
    signs: Any = hadamard.signs(recipe.seed, layer, k) if rotates else None
    return Given(absmax, alpha, signs)


def dequantize(params: Tree, dtype=jnp.float32) -> dict[str, Any]:
    """The tree with every `QTensor` and `TransformedKernel` replaced by the kernel it stands for.

    That is (.., k, n), for inputs as they are.
    """

    def restore(leaf):
        if isinstance(leaf, TransformedKernel):
            return leaf.restore(dtype)
        return jnp.swapaxes(leaf.dequantize(dtype), -1, -2) if is_kernel(leaf) else leaf

    return jax.tree.map(restore, params, is_leaf=is_kernel)


def _check_unquantized(params: Tree, chosen: dict[str, Rule | None]) -> None:
    done = [
        path
        for path, kernel, _ in iter_layers(params)
        if chosen[path] is not None and isinstance(kernel, QTensor | LoraKernel)
    ]
    if done:
        raise ValueError(
            f"{done[0]} and {len(done) - 1} more kernels are quantised already, or have a branch"
        )


def _nonfinite_layers(params: Tree, chosen: dict, recipe: Recipe) -> list[str]:
    """Layers to keep in floating point for NaN or inf; raises unless the recipe allows it."""
    found = []
    for path, kernel, index in iter_layers(params):
        if isinstance(kernel, TransformedKernel):
            kernel = kernel.kernel
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


def _is_concrete(*arrays: Any) -> bool:
    return not any(isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)) for array in arrays)
