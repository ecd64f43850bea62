"""Which balance and rotation each layer gets, by what they do to the error of its output.

A recipe whose rules balance or rotate says what is allowed; `choose` says where, and how strongly,
and returns a recipe that says so layer by layer. Data-free: the inputs are drawn from the
statistics of a calibration, see `typical_rows`; real ones may be given instead.

1. Every layer is quantised with every allowed combination of alpha and rotation, and the relative
   error of its output ||y' - y||^2 / ||y||^2 measured, by the code that runs the model.
2. Layers of one kind (layer path without numbers) share the alpha with the least mean error.
3. A layer whose channels are even (`incoherence` of input and weights below a threshold) is left
   alone. For any other the combination of least error is taken; a simpler one, if its error is
   within a few percent.

ViDiT-Q's authors choose layers by probing this incoherence by hand, and sweep alpha for a model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from rich.progress import track
from rich.table import Table

from lowbit_jax import ops
from lowbit_jax.calibration.statistics import Statistics
from lowbit_jax.quant.masks import over_runs
from lowbit_jax.quant.needs import check_statistics, given_of
from lowbit_jax.quant.recipe import Balance, Recipe, RecipeError, Rule
from lowbit_jax.quant.stacks import Tree, iter_layers, layer_paths
from lowbit_jax.quant.typical import typical_rows
from lowbit_jax.quant.weights import ALPHAS, Given, column_absmax, sample_of, treat_weight


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One way to transform a layer.

    Attributes:
        alpha: of the balance; None for none.
        rotation: as a rule has it; None for none.
    """

    alpha: float | None
    rotation: int | str | None

    @property
    def label(self) -> str:
        """In words, such as "balance 0.25 + rotation"."""
        parts = [f"balance {self.alpha:g}"] if self.alpha is not None else []
        parts += ["rotation"] if self.rotation is not None else []
        return " + ".join(parts) or "nothing"

    @property
    def steps(self) -> int:
        """How many transforms it has."""
        return (self.alpha is not None) + (self.rotation is not None)

    def rule(self, rule: Rule) -> Rule:
        """A rule with these transforms."""
        balance = None if self.alpha is None else Balance(alpha=self.alpha)
        return dataclasses.replace(rule, balance=balance, rotation=self.rotation)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for a layer.

    Attributes:
        layer: layer path.
        chosen: the combination.
        why: in words.
        incoherence: largest over mean of the channels, of input and weights.
        errors: relative squared error of the output for every combination that was tried.
    """

    layer: str
    chosen: Combination
    why: str
    incoherence: dict[str, float]
    errors: dict[str, float]

    @property
    def gain(self) -> float:
        """Error without transforms over error with the chosen ones, in dB."""
        before, after = self.errors["nothing"], self.errors[self.chosen.label]
        return float(10 * np.log10(before / after)) if after > 0 else 0.0


def choose(
    params: Tree,
    recipe: Recipe,
    statistics: Statistics,
    *,
    alphas: Sequence[float] = ALPHAS,
    threshold: float = 2.0,
    margin: float = 0.03,
    rows: Mapping[str, Float32[np.ndarray, "t k"]] | None = None,
    progress: bool = False,
) -> tuple[Recipe, list[Choice]]:
    """A recipe that says for every layer what `recipe` allows, and why.

    Args:
        params: floating parameters.
        recipe: its rules with `balance` or `rotation` are looked into; their alpha is tried too,
            as one for all timesteps.
        statistics: of the activations of the model.
        alphas: that are tried.
        threshold: layers with both incoherences below are left alone.
        margin: how much larger the error of a simpler combination may be, as a share.
        rows: real inputs by layer path, for those layers instead of drawn ones.
        progress: show a bar.

    Returns:
        The recipe, with rules for the layers that were looked into before those of `recipe`, and a
        `Choice` for each of them.

    Raises:
        RecipeError: no rule allows anything. StatisticsError: statistics of another model.
    """
    chosen = recipe.assign(layer_paths(params))
    looked_into = {
        path: rule
        for path, rule in chosen.items()
        if rule is not None and rule.weights and (rule.balance or rule.rotation)
    }
    if not looked_into:
        raise RecipeError(f"recipe '{recipe.name}' neither balances nor rotates a quantised layer")
    statistics.check(params)
    check_statistics(recipe, chosen, statistics, params)
    tried: dict[str, dict[Combination, float]] = {}
    uneven: dict[str, dict[str, float]] = {}
    layers = [layer for layer in iter_layers(params) if layer[0] in looked_into]
    for path, kernel, index in track(layers, "choosing", disable=not progress, transient=True):
        kernel = jnp.asarray(kernel if index is None else kernel[index])
        layer, rule = statistics.layers[path], looked_into[path]
        x = typical_rows(layer, path) if rows is None or path not in rows else rows[path]
        tried[path] = dict(_errors(kernel.T, path, rule, alphas, recipe, statistics, x))
        uneven[path] = {
            "input": incoherence(np.asarray(over_runs(layer.absmax))),
            "weights": incoherence(np.asarray(column_absmax(kernel.T))),
        }
    shared = _shared_alphas(tried)
    choices = [
        _choice(path, tried[path], uneven[path], shared, threshold, margin) for path in tried
    ]
    return _recipe_of(recipe, looked_into, choices), choices


def incoherence(absmax: Float32[np.ndarray, "k"]) -> float:
    """Largest over mean of the channels: 1 where all are alike (ViDiT-Q's measure)."""
    return float(np.max(absmax) / max(np.mean(absmax), np.finfo(np.float32).tiny))


def _errors(
    weight: Array, path: str, rule: Rule, alphas, recipe: Recipe, statistics: Statistics, x
) -> Iterator[tuple[Combination, float]]:
    """(combination, error) of everything a layer's rule allows."""
    fixed = rule.balance is not None and rule.balance.alpha != "auto"
    own = rule.balance.alphas if rule.balance is not None and fixed else ()
    balances = (None,) if rule.balance is None else (None, *sorted({*alphas, *own}))
    rotations = (None,) if rule.rotation is None else (None, rule.rotation)
    columns = column_absmax(weight)
    for rotation in rotations:
        for alpha in balances:
            combination = Combination(alpha=alpha, rotation=rotation)
            trial = combination.rule(rule)
            given = given_of(trial, path, weight.shape[1], recipe, statistics)
            # alpha is an array: one program for all
            trial = dataclasses.replace(trial, match="", balance=trial.balance and Balance(alpha=0))
            yield combination, float(_error(sample_of(weight), columns, x, given, trial))


@partial(jax.jit, static_argnames="rule")
def _error(weight: Array, columns: Array, x: Array, given: Given, rule: Rule) -> Array:
    exact = jnp.dot(x, weight.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    found = ops.linear(x, treat_weight(weight, rule, given, columns))
    return jnp.sum(jnp.square(found - exact)) / jnp.maximum(jnp.sum(jnp.square(exact)), 1e-30)


def kind_of(layer: str) -> str:
    """A layer path without its numbers: what layers of one kind share."""
    return re.sub(r"/\d+(?=/)", "/*", layer)


def _shared_alphas(tried: Mapping[str, Mapping[Combination, float]]) -> dict[str, float | None]:
    """The alpha of each kind of layers: least mean error, with rotation where it is allowed."""
    found: dict[str, dict[float, list[float]]] = {}
    for path, errors in tried.items():
        rotates = any(combination.rotation is not None for combination in errors)
        for combination, error in errors.items():
            if combination.alpha is not None and (combination.rotation is not None) == rotates:
                of_kind = found.setdefault(kind_of(path), {})
                of_kind.setdefault(combination.alpha, []).append(error)
    best = {kind: min(errors, key=lambda a: np.mean(errors[a])) for kind, errors in found.items()}
    return {kind_of(path): best.get(kind_of(path)) for path in tried}


def _choice(
    path: str,
    errors: Mapping[Combination, float],
    uneven: dict[str, float],
    shared: Mapping[str, float | None],
    threshold: float,
    margin: float,
) -> Choice:
    alpha = shared[kind_of(path)]
    open_to = {c: error for c, error in errors.items() if c.alpha in (None, alpha)}
    nothing = Combination(alpha=None, rotation=None)
    if max(uneven.values()) < threshold:
        chosen, why = nothing, f"channels are even: largest over mean below {threshold:g}"
    else:
        least = min(open_to.values())
        close = [c for c, error in open_to.items() if error <= (1 + margin) * least]
        chosen = min(close, key=lambda c: (c.steps, open_to[c]))
        why = f"error {open_to[chosen]:.3g}, {open_to[nothing]:.3g} without"
    return Choice(
        layer=path,
        chosen=chosen,
        why=why,
        incoherence=uneven,
        errors={c.label: error for c, error in errors.items()},
    )


def _recipe_of(recipe: Recipe, rules: Mapping[str, Rule], choices: Sequence[Choice]) -> Recipe:
    """Rules for the layers that were looked into, alike ones together, then the recipe's own."""
    alike: dict[Rule, list[str]] = {}
    for choice in choices:
        rule = choice.chosen.rule(rules[choice.layer])
        alike.setdefault(dataclasses.replace(rule, match="", optional=False), []).append(
            choice.layer
        )
    made = [
        dataclasses.replace(rule, match="|".join(map(re.escape, paths)))
        for rule, paths in alike.items()
    ]
    rest = [dataclasses.replace(rule, optional=True) for rule in recipe.rules]
    text = f"{recipe.description}; balance and rotation chosen layer by layer"
    return dataclasses.replace(
        recipe, name=f"{recipe.name} chosen", rules=(*made, *rest), description=text
    )


def choices_json(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """What was chosen and why, as plain data."""
    return [
        {
            "layer": choice.layer,
            "chosen": choice.chosen.label,
            "why": choice.why,
            "gain_db": choice.gain,
            "incoherence": choice.incoherence,
            "errors": choice.errors,
        }
        for choice in choices
    ]


def choices_table(choices: Sequence[Choice]) -> Table:
    """What was chosen and why, a line for each layer."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("layer", "chosen"):
        table.add_column(name, no_wrap=True)
    for name in ("input", "weights", "gain dB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for c in choices:
        uneven = (f"{c.incoherence[side]:.1f}" for side in ("input", "weights"))
        table.add_row(c.layer, c.chosen.label, *uneven, f"{c.gain:.1f}", c.why)
    return table
