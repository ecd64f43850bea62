"""An allocation as a recipe: ordered rules of path regexes, every unit named by one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowbit_jax.precision.menu import level_name
from lowbit_jax.precision.records import Header
from lowbit_jax.quant.recipe import Recipe, Rule


def recipe_of(
    header: Header, levels: Sequence[str], act_bits: Sequence[int | None], name: str
) -> Recipe:
    """The recipe that gives every unit its level and activation bits.

    One rule for the kinds of a stack that have equal bits in equal blocks. Units that stay in
    floating point are named too, by rules without weights: nothing is left there in silence.

    Args:
        header: of the scan: units and menu.
        levels: of every unit, see `menu.level_name`.
        act_bits: of every unit.
        name: of the recipe.
    """
    specs = {level_name(spec): spec for spec in header.menu}
    blocks: dict[tuple[str, str, str, int | None], list[int]] = {}
    for unit, level, bits in zip(header.units, levels, act_bits, strict=True):
        blocks.setdefault((unit.stack, unit.kind, level, bits), []).append(unit.block)
    kinds: dict[tuple[str, tuple[int, ...], str, int | None], list[str]] = {}
    for (stack, kind, level, bits), found in blocks.items():
        kinds.setdefault((stack, tuple(found), level, bits), []).append(kind)
    every: dict[str, set[int]] = {}
    for unit in header.units:
        every.setdefault(unit.stack, set()).add(unit.block)
    rules = []
    for (stack, where, level, bits), members in kinds.items():
        whole = set(where) == every[stack]
        numbers = r"\d+" if whole else _either([str(block) for block in where])
        which = _either([re.escape(kind) for kind in members])
        rules.append(
            Rule(match=f"{stack}/{numbers}/{which}(/.*)?", weights=specs.get(level), act_bits=bits)
        )
    return Recipe(
        name=name,
        rules=tuple(rules),
        description=f"mixed precision of {len(header.units)} units, by a sensitivity scan",
    )


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
