"""`quantize`, `balance`, `rotate`, `dequantize`: pure functions from parameter tree to tree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.needs import (
    Grams,
    check_feedback,
    check_statistics,
    given_of,
    is_concrete,
)
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, is_kernel
from lowbit_jax.quant.ranged import RangedKernel
from lowbit_jax.quant.recipe import Balance, Recipe, Rule
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
    "nonfinite_message",
    "quantize",
    "quantize_kernel",
    "quantize_weight",
    "rotate",
]


class NonFiniteError(ValueError):
    """Weights with NaN or inf; the message names the parameters."""


def quantize(
    params: Tree,
    recipe: Recipe,
    statistics: Statistics | None = None,
    *,
    grams: Grams | None = None,
) -> dict[str, Any]:
    """Replace kernels as a recipe says: balanced, rotated, quantised, in this order.

    A kernel becomes a `QTensor`, or a `TransformedKernel` where the rule quantises nothing;
    everything else is kept as it is. Kernels that `balance` or `rotate` has transformed keep that.

    Pure: works under `jit`, `vmap` and `jax.eval_shape` (a plan that costs no memory). Stacked
    layers treated alike stay one segment; where treatments change, the stack is cut.

    Args:
        params: parameter tree of any model here; kernels (k, n), or (l, k, n) inside stacks.
        recipe: what to do.
        statistics: of the model's activations, for recipes that need them.
        grams: X^T X of the inputs of layers by their paths, by any factor, instead of the
            statistics'.

    Raises:
        RecipeError: a rule that decides nothing; a recipe that needs statistics without them.
        StatisticsError: statistics of another model, by name.
        ValueError: a kernel that is quantised or transformed already; a width that no rotation of
            the size asked for fits.
        NonFiniteError: a NaN or inf in a kernel to be treated, unless the recipe keeps those.
            Not checked on traced arrays; there it makes scales, and so outputs, non-finite.
    """
    treat = Treatment(decide(params, recipe, statistics, grams), recipe, statistics, grams)
    return map_stacks(params, treat.stack, treat.kernel)


def decide(
    params: Tree,
    recipe: Recipe,
    statistics: Statistics | None = None,
    grams: Grams | None = None,
) -> dict[str, Rule | None]:
    """What is done to each layer path; None for those that stay as they are.

    Raises:
        As `quantize`.
    """
    chosen = recipe.assign(layer_paths(params))
    _check_unquantized(params, chosen)
    check_statistics(recipe, chosen, statistics, params, grams)
    return chosen | dict.fromkeys(_nonfinite_layers(params, chosen, recipe))


@dataclass(frozen=True)
class Treatment:
    """What has been decided about every layer, and how a tree is rewritten by it."""

    chosen: dict[str, Rule | None]
    recipe: Recipe
    statistics: Statistics | None
    grams: Grams | None = None

    def kernel(self, path: tuple[str, ...], kernel):
        """The kernel of a linear outside the stacks."""
        layer = "/".join(path)
        rule = self.chosen[layer]
        if rule is None:
            return kernel
        if rule.needs_grams or rule.chooses_alpha:
            return self._alone(layer, rule, kernel)
        return self._treated(rule, kernel, self.given(layer, kernel.shape[-2]))

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
        if rule.needs_grams or rule.chooses_alpha:  # what they need is on the device one by one
            at = lambda i: jax.tree.map(lambda leaf: leaf[i], kernel)  # noqa: E731
            made = [self._alone(path, rule, at(i)) for i, path in enumerate(paths)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
        given = [self.given(path, kernel.shape[-2]) for path in paths]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *given)
        # one layer at a time: the temporaries of a quantiser are several times its input
        return jax.lax.map(lambda layer: self._treated(rule, *layer), (kernel, stacked))

    def _treated(self, rule: Rule, kernel, given: Given):
        return _treated(kernel, given, rule, self._edges(rule))

    def _edges(self, rule: Rule) -> tuple[float, ...]:
        """Of the timestep ranges that a rule balances each by itself."""
        if rule.balance is None or rule.balance.ranges is None:
            return ()
        assert self.statistics is not None
        return self.statistics.ranges.edges

    def _alone(self, path: str, rule: Rule, kernel):
        """One kernel, as a program of its own."""
        given = self.given(path, kernel.shape[-2])
        # the same program for all layers of one shape
        alike = dataclasses.replace(rule, match="")
        made = _treated_alone(kernel, given, alike, self._edges(rule))
        if rule.needs_grams:
            check_feedback(path, made)
        return made

    def _signature(self, path: str) -> Any:
        """What two rules must share for their layers to be stacked."""
        rule = self.chosen[path]
        if rule is None:
            return None
        balanced = rule.balance is not None
        ranges = rule.balance and rule.balance.ranges
        acts = rule.act_bits, rule.act_static, rule.act_symmetric
        return rule.weights, acts, balanced, ranges, rule.rotation

    def given(self, path: str, k: int) -> Given:
        """What the rule of a layer needs beside the weights."""
        rule = self.chosen[path]
        assert rule is not None
        return given_of(rule, path, k, self.recipe, self.statistics, self.grams)


def _treated(kernel, given: Given, rule: Rule, edges: tuple[float, ...]):
    """One kernel; with a balance for each timestep range, one of each."""
    if rule.balance is None or rule.balance.ranges is None:
        return treat_kernel(kernel, rule, given)
    each = [treat_kernel(kernel, rule, given.of_range(r)) for r in range(rule.balance.ranges)]
    return RangedKernel(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), edges)


_treated_alone = jax.jit(_treated, static_argnames=("rule", "edges"))


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


def dequantize(params: Tree, dtype=jnp.float32) -> dict[str, Any]:
    """The tree with every `QTensor` and `TransformedKernel` replaced by the kernel it stands for.

    That is (.., k, n), for inputs as they are.

    Raises:
        ValueError: kernels of timestep ranges; see `ranged.at_timestep`.
    """

    def restore(leaf):
        if isinstance(leaf, RangedKernel):
            raise ValueError("kernels of timestep ranges: take those of a time with `at_timestep`")
        if isinstance(leaf, TransformedKernel):
            return leaf.restore(dtype)
        return jnp.swapaxes(leaf.dequantize(dtype), -1, -2) if is_kernel(leaf) else leaf

    ends = lambda leaf: is_kernel(leaf) or isinstance(leaf, RangedKernel)  # noqa: E731
    return jax.tree.map(restore, params, is_leaf=ends)


def _check_unquantized(params: Tree, chosen: dict[str, Rule | None]) -> None:
    done = [
        path
        for path, kernel, _ in iter_layers(params)
        if chosen[path] is not None and isinstance(kernel, QTensor | LoraKernel | RangedKernel)
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
        if chosen[path] is None or not is_concrete(kernel):
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
