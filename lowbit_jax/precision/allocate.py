"""Bits for every unit from a finished scan and a budget: metric-decoupled, or by plain MSE.

ViDiT-Q (section 4.3 of the paper) shares the bits between groups of units by the error against the
floating model, as metrics of different groups have different units, and ranks the units of a group
by the group's own metric. Its published code has no search; here both levels are integer programmes
(`precision.programme`):

1. all units, harm by MSE, under the whole budget. What each group then spends is its budget.
2. all units, harm by the metric of each unit's group, under the budgets of the groups. Groups meet
   only in the cuts of a stack; for that, a group's harms are scaled so that allocation 1 does as
   much harm by its metric as by MSE.

The rival, plain MSE, is level 1 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lowbit_jax.precision.menu import FLOAT, FLOAT_BITS, level_name, planned_sizes
from lowbit_jax.precision.problem import Problem, Request, abstract_params, pose
from lowbit_jax.precision.programme import Budget, cost_of, solve
from lowbit_jax.precision.records import MSE, Header
from lowbit_jax.precision.rules import recipe_of, rule_of
from lowbit_jax.precision.sensitivity import Sensitivity
from lowbit_jax.quant.recipe import Recipe
from lowbit_jax.quant.report import SizeReport


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What was chosen.

    Attributes:
        header: of the scan.
        levels: of every unit's weights, by name; "float" for none.
        act_bits: of every unit's activations; None for floating point.
        harm: predicted, of every unit, by measure: what was measured of it alone.
        segments: of all stacks together.
        recipe: the same as rules.
        sizes: what the recipe stores, counted from it; what is not quantised is in bfloat16.
        unit_bytes: of these, those of every unit's kernels.
    """

    header: Header
    levels: tuple[str, ...]
    act_bits: tuple[int | None, ...]
    harm: dict[str, Float64[np.ndarray, "u"]]
    segments: int
    recipe: Recipe
    sizes: SizeReport
    unit_bytes: tuple[int, ...]


def allocate(sensitivity: Sensitivity, request: Request, name: str = "mixed") -> Allocation:
    """Choose bits for every unit.

    Args:
        sensitivity: of a finished scan.
        request: what is wanted.
        name: of the recipe.

    Raises:
        AllocationError: a budget that cannot be met, with the smallest that can.
        ImportError: scipy is missing.
    """
    problem = pose(sensitivity, request)
    chosen = solve(problem.programme(problem.harms[MSE], problem.budgets))
    if request.scheme == "metric":
        budgets = group_budgets(problem, chosen)
        chosen = solve(problem.programme(metric_harms(problem, chosen), budgets))
    return _allocation(problem, request, chosen, name)


def uniform(
    sensitivity: Sensitivity, level: str, act_bits: int | None = 8, name: str = "uniform"
) -> Allocation:
    """One level for every unit: what an allocation has to be better than.

    Args:
        sensitivity: of a finished scan.
        level: of the weights, see `menu.level_name`.
        act_bits: of the activations; None: floating point.
        name: of the recipe.

    Raises:
        ValueError: a level that is not in the scan's menu.
    """
    names = [level_name(spec) for spec in sensitivity.header.menu]
    if level not in names:
        raise ValueError(f"level '{level}' is none of the scan's: {', '.join(names)}")
    request = Request(mean_bits=FLOAT_BITS, act_bits=act_bits, segments=None)
    chosen = [names.index(level)] * len(sensitivity.header.units)
    return _allocation(pose(sensitivity, request), request, chosen, name)


def group_budgets(problem: Problem, chosen: Sequence[int]) -> list[Budget]:
    """What each group spends of each budget in a choice, as its own budget."""
    found = []
    for budget in problem.budgets:
        costs = dict(zip(budget.items, budget.costs, strict=True))
        for metric in dict.fromkeys(problem.metrics):
            items = [i for i in budget.items if problem.metrics[i] == metric]
            part = Budget(
                name=f"{budget.name} of the units judged by {metric}",
                items=items,
                costs=[costs[i] for i in items],
                limit=0,
            )
            spent = cost_of(part, chosen)
            found.append(Budget(name=part.name, items=items, costs=part.costs, limit=spent))
    return found


def metric_harms(problem: Problem, chosen: Sequence[int]) -> list[Float64[np.ndarray, "v"]]:
    """Harms by each item's own metric, scaled to what the choice does by MSE in its group.

    A group whose metric sees no harm in the choice is scaled by all its levels; one whose metric
    sees none at all is judged by MSE.
    """
    out: list[np.ndarray] = list(problem.harms[MSE])
    for metric in dict.fromkeys(problem.metrics):
        items = [i for i, own in enumerate(problem.metrics) if own == metric]
        by_mse, by_metric = problem.harms[MSE], problem.harms[metric]
        pair = [sum(harms[i][chosen[i]] for i in items) for harms in (by_mse, by_metric)]
        if min(pair) <= 0:
            pair = [sum(harms[i].sum() for i in items) for harms in (by_mse, by_metric)]
        if min(pair) > 0:
            for i in items:
                out[i] = by_metric[i] * (pair[0] / pair[1])
    return out


def _allocation(problem: Problem, request: Request, chosen: Sequence[int], name: str) -> Allocation:
    header, u = problem.header, len(problem.header.units)
    names = [*(level_name(spec) for spec in header.menu), FLOAT]
    levels = tuple(names[v] for v in chosen[:u])
    acts = [request.act_bits] * u
    if request.mean_act_bits is not None:
        acts = [[*header.act_bits, None][v] for v in chosen[u:]]
    specs = [*header.menu, None]
    rules = [
        rule_of(unit, specs[v], bits, request.like)
        for unit, v, bits in zip(header.units, chosen[:u], acts, strict=True)
    ]
    harm = {
        measure: np.array([rows[i][v] for i, v in enumerate(chosen)]).reshape(-1, u).sum(axis=0)
        for measure, rows in problem.harms.items()
    }
    cuts = problem.programme(problem.harms[MSE], ()).cuts_of(chosen)
    recipe = recipe_of(header.units, rules, name, request.like)
    return Allocation(
        header=header,
        levels=levels,
        act_bits=tuple(rule.act_bits for rule in rules),
        harm=harm,
        segments=problem.base_segments + cuts,
        recipe=recipe,
        sizes=planned_sizes(abstract_params(header), recipe),
        unit_bytes=tuple(int(problem.kernel_bytes[i, v]) for i, v in enumerate(chosen[:u])),
    )
