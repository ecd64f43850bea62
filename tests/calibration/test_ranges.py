"""Which range a timestep belongs to, and that ranges tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.calibration.ranges import TimestepRanges


def test_every_integer_step_is_in_viditqs_own_interval():
    """ViDiT-Q v1's `find_interval`: the first pair with start <= t <= end."""
    pairs = [(0, 250), (251, 500), (501, 1000)]
    steps = np.arange(1001)
    expected = [next(i for i, (a, b) in enumerate(pairs) if a <= t <= b) for t in steps]
    found = jax.jit(TimestepRanges.from_pairs(pairs).index)(jnp.asarray(steps))
    np.testing.assert_array_equal(found, expected)


def test_a_time_between_two_integer_steps_is_in_a_range():
    ranges = TimestepRanges.from_pairs([(0, 500), (501, 1000)])
    np.testing.assert_array_equal(ranges.index(np.float32([0, 500, 500.5, 501])), [0, 0, 1, 1])


def test_flow_time_with_edges_that_float32_rounds():
    edges = (0, 0.1, 0.3, 1)
    t = np.float32([0, 0.1, np.nextafter(np.float32(0.1), np.float32(1)), 0.3, 1.0])
    np.testing.assert_array_equal(TimestepRanges(edges).index(t), [0, 0, 1, 1, 2])


@pytest.mark.parametrize("t", [-1e-6, 1.001, np.nan, np.inf])
def test_outside(t):
    assert TimestepRanges((0, 0.5, 1)).index(jnp.float32(t)) == -1


@pytest.mark.parametrize(
    "edges",
    [(), (0,), (0, 999), (1, 1000), (0, 500, 500, 1000), (0, 700, 300, 1000), (0, np.nan, 1)]
    + [(0, 0.5, 0.5 + 1e-12, 1)],  # one edge in float32
)
def test_edges_that_do_not_tile(edges):
    with pytest.raises(ValueError, match="do not tile"):
        TimestepRanges(edges)


@pytest.mark.parametrize(
    "pairs",
    [[], [(0, 999)], [(1, 1000)], [(0, 500), (500, 1000)], [(0, 500), (502, 1000)]],
)
def test_pairs_that_do_not_tile(pairs):
    with pytest.raises(ValueError, match="do not tile"):
        TimestepRanges.from_pairs(pairs)


def test_labels():
    ranges = TimestepRanges((0, 500, 1000))
    assert [ranges.label(r) for r in range(len(ranges))] == ["[0, 500]", "(500, 1000]"]
