"""The integer programme: one level for every item, least harm, within budgets and few cuts.

MixDQ (Zhao et al. 2024, section 4.3) chooses bits so, with binary c[i, b], sum_b c[i, b] = 1 and a
budget of sum_i,b c[i, b] b w_i. Here costs are bytes as stored, and there is one thing more: a cut
lies between two neighbouring blocks if any item of theirs has another level, and cuts are bounded
too, as each makes a program one scan longer. With x[i, v] binary and z[e] >= 0 for every place of a
cut,

    minimise    sum harm[i, v] x[i, v]
    subject to  sum_v x[i, v] = 1                                 for every item i
                sum cost[i, v] x[i, v] <= limit                   for every budget
                x[i, v] - x[j, v] <= z[e]                         for i, j on both sides of e, all v
                sum_e z[e] <= cuts
                x[i, v] <= x[j, w]                                for every implication

which scipy hands to HiGHS. The z need not be declared integers: the best are 0 or 1 by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64


class AllocationError(ValueError):
    """A budget that cannot be met, with what can."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A bound on the sum of costs.

    Attributes:
        name: what an error calls it.
        items: whose costs count.
        costs: of each of those, of each of its levels.
        limit: the sum may be so much.
    """

    name: str
    items: Sequence[int]
    costs: Sequence[Int64[np.ndarray, "v"]]
    limit: int


@dataclass(frozen=True, kw_only=True)
class Programme:
    """What is to be solved.

    Attributes:
        harms: of every item, of each of its levels.
        budgets: all must hold.
        places: where a cut can be: pairs of items on both sides, whose levels mean the same.
        cuts: how many there may be; None: any number.
        implications: (i, v, j, w): where item i has level v, item j has w.
    """

    harms: Sequence[Float64[np.ndarray, "v"]]
    budgets: Sequence[Budget]
    places: Sequence[Sequence[tuple[int, int]]] = ()
    cuts: int | None = None
    implications: Sequence[tuple[int, int, int, int]] = ()

    def harm(self, chosen: Sequence[int]) -> float:
        """Of a level for every item."""
        return float(sum(harm[v] for harm, v in zip(self.harms, chosen, strict=True)))

    def cuts_of(self, chosen: Sequence[int]) -> int:
        """Places where a level changes."""
        return sum(any(chosen[i] != chosen[j] for i, j in pairs) for pairs in self.places)

    def broken(self, chosen: Sequence[int]) -> list[str]:
        """What a choice does not keep to, in words; empty for a feasible one."""
        found = []
        for budget in self.budgets:
            total = cost_of(budget, chosen)
            if total > budget.limit:
                found.append(f"{budget.name} is {total:,} of {budget.limit:,}")
        if self.cuts is not None and self.cuts_of(chosen) > self.cuts:
            found.append(f"{self.cuts_of(chosen)} cuts of {self.cuts}")
        for i, v, j, w in self.implications:
            if chosen[i] == v and chosen[j] != w:
                found.append(f"item {i} has level {v}, so that item {j} needs {w}")
        return found


def cost_of(budget: Budget, chosen: Sequence[int]) -> int:
    """The sum of a budget's costs of a choice."""
    return int(sum(cost[chosen[i]] for i, cost in zip(budget.items, budget.costs, strict=True)))


def solve(programme: Programme) -> list[int]:
    """The level of every item, of least harm (gap 0).

    Raises:
        AllocationError: budgets that cannot be met, with the least that each one alone can be.
        ImportError: scipy is missing; it comes with the extra "eval".
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError as error:
        raise ImportError("allocation needs scipy: pip install 'lowbit-jax[eval]'") from error

    columns = _Columns(programme)
    rows, low, high = _rows(programme, columns)
    entries = [(r, c, value) for r, row in enumerate(rows) for c, value in row]
    at, column, value = (np.array(part) for part in zip(*entries, strict=True))
    matrix = coo_array((value, (at, column)), shape=(len(rows), columns.total))
    objective = np.zeros(columns.total)
    objective[: columns.binaries] = np.concatenate(programme.harms)
    # HiGHS stops within 1e-6 of the optimum, absolutely; harms of many bits are far below the most
    objective *= 1e6 / max(float(np.abs(objective).max()), np.finfo(float).tiny)
    integrality = np.zeros(columns.total)
    integrality[: columns.binaries] = 1
    result = milp(
        objective,
        integrality=integrality,
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise AllocationError(_infeasible(programme, result.message))
    chosen = [
        int(np.argmax(result.x[start : start + size]))
        for start, size in zip(columns.starts, columns.sizes, strict=True)
    ]
    if wrong := programme.broken(chosen):  # the solver's tolerance, at the edge of a budget
        raise AllocationError(f"the solver's answer does not hold: {'; '.join(wrong)}")
    return chosen


class _Columns:
    """Where the variables are: x by items and levels, then z by places."""

    def __init__(self, programme: Programme):
        self.sizes = [len(harm) for harm in programme.harms]
        self.starts = [0, *np.cumsum(self.sizes)[:-1].tolist()]
        self.binaries = sum(self.sizes)
        self.total = self.binaries + len(programme.places)

    def x(self, item: int, level: int) -> int:
        """Column of an item's level."""
        return self.starts[item] + level

    def z(self, place: int) -> int:
        """Column of a place."""
        return self.binaries + place


def _rows(programme: Programme, columns: _Columns):
    """The constraints: rows of (column, factor), lower and upper bounds."""
    rows: list[list[tuple[int, float]]] = []
    low: list[float] = []
    high: list[float] = []

    def add(row, least, most):
        rows.append(row)
        low.append(least)
        high.append(most)

    for item, size in enumerate(columns.sizes):
        add([(columns.x(item, v), 1.0) for v in range(size)], 1, 1)
    for budget in programme.budgets:
        # in units of the largest common divisor, so that a sum is over the limit by 1 or not at all
        unit = math.gcd(*(int(cost) for costs in budget.costs for cost in costs)) or 1
        row = [
            (columns.x(i, v), float(cost // unit))
            for i, costs in zip(budget.items, budget.costs, strict=True)
            for v, cost in enumerate(costs)
        ]
        add(row, -np.inf, budget.limit // unit)
    for place, pairs in enumerate(programme.places):
        for i, j in pairs:
            for v in range(columns.sizes[i]):
                row = [(columns.x(i, v), 1.0), (columns.x(j, v), -1.0), (columns.z(place), -1.0)]
                add(row, -np.inf, 0)
    if programme.cuts is not None and programme.places:
        places = range(len(programme.places))
        add([(columns.z(place), 1.0) for place in places], -np.inf, programme.cuts)
    for i, v, j, w in programme.implications:
        add([(columns.x(i, v), 1.0), (columns.x(j, w), -1.0)], -np.inf, 0)
    return rows, low, high


def _infeasible(programme: Programme, message: str) -> str:
    parts = []
    for budget in programme.budgets:
        least = int(sum(min(costs) for costs in budget.costs))
        parts.append(f"{budget.name}: {budget.limit:,} allowed, {least:,} is the least there is")
    if programme.cuts is not None:
        parts.append(f"{programme.cuts} cuts allowed")
    return f"no allocation keeps to all bounds ({message}): {'; '.join(parts)}"
