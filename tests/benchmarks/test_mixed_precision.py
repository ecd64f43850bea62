"""Models put together of levels are those that the recipe makes; how ranks are compared."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.mixed_precision import Levels, check_bits
from benchmarks.sensitivity import rank_correlation
from lowbit_jax.checkpoint import SavedModel
from lowbit_jax.models import flux
from lowbit_jax.precision.allocate import allocate
from lowbit_jax.precision.problem import Request
from lowbit_jax.quant.recipe import Recipe, WeightSpec
from lowbit_jax.quant.transform import quantize
from tests.references import flux_files
from tests.references.sensitivity import random_harm, scan_file

MENU = (
    WeightSpec(format="ternary", quantizer="absmean"),
    WeightSpec(format="int8", quantizer="absmax"),
)
CONFIG = flux_files.TINY


def test_a_model_of_levels_is_that_of_the_recipe(tmp_path):
    """Every code and scale, and the same segments."""
    shapes = flux.abstract_params(CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    scan = scan_file(tmp_path / "s.jsonl", "flux", CONFIG, shapes, random_harm, menu=MENU)
    made = allocate(scan, Request(mean_bits=11.5))
    saved = SavedModel(
        params=params,
        model="flux",
        config=dataclasses.asdict(CONFIG),
        recipe=Recipe(name="float"),
        manifest={},
    )
    expected = jax.jit(lambda tree: quantize(tree, made.recipe))(params)
    found = Levels(saved, scan).mixed(made)
    assert len(set(made.levels)) > 1
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    check_bits(found, made)
    other = dataclasses.replace(made, unit_bytes=tuple(size + 1 for size in made.unit_bytes))
    with pytest.raises(ValueError, match="bytes, not"):
        check_bits(found, other)


def test_ranks_not_sizes_are_correlated():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, np.exp(10 * a)) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
