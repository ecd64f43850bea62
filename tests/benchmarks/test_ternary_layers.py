"""Weight ratios of the rungs on a distribution whose best three levels are known."""

import jax
import numpy as np

from benchmarks.ternary_layers import ABSMEAN, EIGHT, PLAIN, RUNGS, weight_ratio


def test_normal_weights_lose_what_max_found():
    """J. Max 1960: the best symmetric three levels of a normal variable leave 0.1902 of its power.

    BitNet's absmean rounds at half the mean magnitude and is worse.
    """
    kernels = {"blocks/0/query": jax.random.normal(jax.random.key(0), (2048, 64))}
    best = -10 * np.log10(0.1902)
    assert abs(weight_ratio(PLAIN, kernels) - best) < 0.05
    assert weight_ratio(ABSMEAN, kernels) < best - 0.3


def test_every_rung_is_ternary_and_those_below_say_int8():
    rules = {**RUNGS, **EIGHT}
    assert all(rule.weights.format == "ternary" for rule in rules.values())
    assert all(rule.act_bits == (8 if "int8" in name else None) for name, rule in rules.items())
