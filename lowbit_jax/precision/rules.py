"""An allocation as a recipe: ordered rules of path regexes, every unit named by one of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from lowbit_jax.precision.units import Unit
from lowbit_jax.quant.recipe import Recipe, RecipeError, Rule, WeightSpec


def rule_of(
    unit: Unit, level: WeightSpec | None, act_bits: int | None, like: Recipe | None
) -> Rule:
    """What is done to a unit's linears; its `match` is empty.

    Args:
        unit: whose.
        level: of its weights; None: floating point, neither balanced nor rotated.
        act_bits: of its activations.
        like: recipe that lends balance, rotation, error feedback and static scales; its own weights
            count for nothing. Inputs that it leaves in floating point stay so.

    Raises:
        RecipeError: a recipe that treats the linears of one unit differently, or has weights of
            their own for each timestep range.
    """
    if level is None:
        return Rule(match="", weights=None)
    if like is None:
        return Rule(match="", weights=level, act_bits=act_bits)
    lent = [_lent(like.rule_for(layer), level, act_bits) for layer in unit.layers]
    for layer, rule in zip(unit.layers, lent, strict=True):
        if rule != lent[0]:
            raise RecipeError(
                f"recipe '{like.name}' treats {layer} otherwise than {unit.layers[0]}, and both "
                f"are of {unit.name}, which has one rule"
            )
        if rule.balance is not None and rule.balance.ranges is not None:
            raise RecipeError(
                f"recipe '{like.name}' balances {layer} for each of {rule.balance.ranges} timestep "
                "ranges: every range has codes of its own, which no allocation counts"
            )
    return lent[0]


def _lent(like: Rule | None, level: WeightSpec, act_bits: int | None) -> Rule:
    """One linear's; a linear that the lending recipe keeps is rounded, with floating inputs."""
    if like is None or like.weights is None:
        return Rule(match="", weights=level)
    return dataclasses.replace(
        like,
        match="",
        weights=dataclasses.replace(level, feedback=like.weights.feedback),
        act_bits=None if like.act_bits is None else act_bits,
        act_static=like.act_static and act_bits is not None,
        optional=False,
    )


def recipe_of(
    units: Sequence[Unit], chosen: Sequence[Rule], name: str, like: Recipe | None
) -> Recipe:
    """The recipe that treats every unit by its rule.

    One rule for the kinds of a stack that are treated alike in equal blocks. Units that stay in
    floating point are named too, by rules without weights: nothing is left there in silence.

    Args:
        units: all of a scan.
        chosen: for every unit, see `rule_of`.
        name: of the recipe.
        like: recipe that lent something: its seed is that of the rotations.
    """
    blocks: dict[tuple[str, str, Rule], list[int]] = {}
    for unit, rule in zip(units, chosen, strict=True):
        blocks.setdefault((unit.stack, unit.kind, rule), []).append(unit.block)
    kinds: dict[tuple[str, tuple[int, ...], Rule], list[str]] = {}
    for (stack, kind, rule), found in blocks.items():
        kinds.setdefault((stack, tuple(found), rule), []).append(kind)
    every: dict[str, set[int]] = {}
    for unit in units:
        every.setdefault(unit.stack, set()).add(unit.block)
    rules = []
    for (stack, where, rule), members in kinds.items():
        whole = set(where) == every[stack]
        numbers = r"\d+" if whole else _either([str(block) for block in where])
        which = _either([re.escape(kind) for kind in members])
        rules.append(dataclasses.replace(rule, match=f"{stack}/{numbers}/{which}(/.*)?"))
    text = f"mixed precision of {len(units)} units, by a sensitivity scan"
    return Recipe(
        name=name,
        rules=tuple(rules),
        description=text if like is None else f"{text}; the rest as {like.name}",
        seed=0 if like is None else like.seed,
    )


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
