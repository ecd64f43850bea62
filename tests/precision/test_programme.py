"""The integer programme against every choice there is."""

import itertools

import numpy as np
import pytest

from lowbit_jax.precision.programme import AllocationError, Budget, Programme, cost_of, solve


def random_programme(seed):
    """4 blocks of 2 items with 3 or 4 levels, two budgets, cuts, implications; ties too."""
    rng = np.random.default_rng(seed)
    blocks, levels = 4, int(rng.integers(2, 4))
    items = 2 * blocks
    harms = [
        np.sort(rng.exponential(size=levels))[::-1] * 10.0 ** rng.integers(-6, 1)
        for _ in range(items)
    ]
    if seed % 3 == 0:
        harms = [np.round(harm, 1) for harm in harms]
    costs = [np.sort(rng.integers(1, 40, levels)) * 96 for _ in range(items)]
    other = [rng.integers(0, 9, levels) for _ in range(4)]
    least, most = (sum(int(f(cost)) for cost in costs) for f in (min, max))
    share = rng.uniform(0.1, 0.9)
    return Programme(
        harms=harms,
        budgets=[
            Budget(
                name="bytes",
                items=range(items),
                costs=costs,
                limit=int(least + share * (most - least)),
            ),
            Budget(name="other", items=[0, 3, 4, 7], costs=other, limit=int(rng.integers(8, 30))),
        ],
        places=[[(2 * b, 2 * b + 2), (2 * b + 1, 2 * b + 3)] for b in range(blocks - 1)],
        cuts=None if seed % 4 == 0 else int(rng.integers(0, blocks)),
        implications=[(0, levels - 1, 1, levels - 1)] if seed % 2 else (),
    )


def best(programme):
    """Least harm of all choices, None where none is feasible."""
    choices = itertools.product(*(range(len(harm)) for harm in programme.harms))
    found = [programme.harm(c) for c in choices if not programme.broken(c)]
    return min(found) if found else None


@pytest.mark.parametrize("seed", range(16))
def test_no_choice_does_less_harm(seed):
    programme = random_programme(seed)
    expected = best(programme)
    if expected is None:
        with pytest.raises(AllocationError, match="no allocation keeps to all bounds"):
            solve(programme)
        return
    chosen = solve(programme)
    assert programme.broken(chosen) == []
    assert programme.harm(chosen) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_some_of_those_are_feasible_and_some_are_not():
    found = [best(random_programme(seed)) is not None for seed in range(16)]
    assert 0 < sum(found) < len(found) or all(found)
    assert sum(found) >= 8


def test_cuts_cost_what_they_save():
    """Two units that want to differ: with a cut each has its own level, without both share one."""
    harms = [np.array([0.0, 9.0]), np.array([5.0, 0.0])]
    places = [[(0, 1)]]
    assert solve(Programme(harms=harms, budgets=(), places=places, cuts=1)) == [0, 1]
    assert solve(Programme(harms=harms, budgets=(), places=places, cuts=0)) == [0, 0]


def test_a_budget_is_kept_to_the_byte():
    """Sums of 3 GB that are over by one byte are over."""
    costs = [np.array([1_500_000_001, 1_500_000_000]), np.array([1_500_000_003, 1_500_000_002])]
    harms = [np.array([0.0, 1.0]), np.array([0.0, 2.0])]

    def at(limit):
        budget = Budget(name="bytes", items=(0, 1), costs=costs, limit=limit)
        chosen = solve(Programme(harms=harms, budgets=[budget]))
        return chosen, cost_of(budget, chosen)

    assert at(3_000_000_004) == ([0, 0], 3_000_000_004)
    assert at(3_000_000_003) == ([1, 0], 3_000_000_003)
    assert at(3_000_000_002) == ([1, 1], 3_000_000_002)


def test_harms_far_below_the_largest_still_count():
    """1e-9 of the largest: as int8 beside ternary."""
    costs = [np.array([1, 2, 3])] * 2
    harms = [np.array([1.0, 3e-9, 1e-9]), np.array([1.0, 2e-9, 1.5e-9])]
    budget = Budget(name="bytes", items=(0, 1), costs=costs, limit=5)
    assert solve(Programme(harms=harms, budgets=[budget])) == [2, 1]


def test_what_cannot_be_met_is_said_with_numbers():
    budget = Budget(name="bytes", items=[0], costs=[np.array([10, 20])], limit=9)
    with pytest.raises(AllocationError, match="bytes: 9 allowed, 10 is the least there is"):
        solve(Programme(harms=[np.array([1.0, 0.0])], budgets=[budget]))
