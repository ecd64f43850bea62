"""ViDiT-Q v1's balance for each timestep range: exact, by NumPy, and one program for all times."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import checkpoint, ops
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.models.dit import DiTTransformer
from lowbit_jax.pipelines.dit import sample_latents
from lowbit_jax.quant import Balance, Recipe, Rule, WeightSpec, dequantize, hadamard, quantize
from lowbit_jax.quant.ranged import RangedKernel, at_timestep
from lowbit_jax.quant.recipe import RecipeError
from lowbit_jax.quant.report import size_report
from lowbit_jax.samplers.ddim import DIT_SCHEDULE
from tests.references.calibration import random_params, random_statistics
from tests.references.dit_files import TINY

K, N = 64, 12
EDGES = (0.0, 250.0, 500.0, 1000.0)
RANGES, ALPHAS = TimestepRanges(EDGES), (0.1, 0.4, 0.9)
INT8 = WeightSpec(format="int8", quantizer="absmax")
TIMES = [(0, 0), (250, 0), (251, 1), (500, 1), (501, 2), (1000, 2), (1001, 2), (-1, 0), (np.nan, 0)]


def recipe(weights=INT8, act_bits=8, **options):
    balance = Balance(alpha=ALPHAS)
    rule = Rule(match="fc|.*/fc", weights=weights, act_bits=act_bits, balance=balance, **options)
    return Recipe(name="v1", rules=(rule,), seed=2)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    kernel = lambda *shape: {"kernel": rng.standard_normal(shape, np.float32)}  # noqa: E731
    return {"blocks": {"0": {"fc": kernel(2, K, N)}}, "fc": kernel(K, N), "other": kernel(K, N)}


@pytest.fixture(scope="module")
def statistics(params):
    return random_statistics(params, ranges=RANGES)


def layers(params):
    stack = params["blocks"]["0"]["fc"]["kernel"]
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], stack)  # noqa: E731
    return {"fc": params["fc"]["kernel"], "blocks/0/fc": take(0), "blocks/1/fc": take(1)}


@pytest.mark.parametrize("rotation", [None, "full"])
def test_each_range_has_the_mask_of_the_formula_and_the_same_product(params, statistics, rotation):
    done = quantize(params, recipe(None, None, rotation=rotation), statistics)
    assert isinstance(done["fc"]["kernel"], RangedKernel)
    assert done["other"] is params["other"] or done["other"] == params["other"]
    x = np.random.default_rng(4).standard_normal((5, K), np.float32)
    for t, r in TIMES:
        now = layers(at_timestep(done, jnp.full(2, t)))
        for path, kernel in layers(params).items():
            absmax = statistics.layers[path].absmax[:, r].max(0).astype(float)
            largest = np.abs(kernel).max(1).astype(float)
            mask = largest ** (1 - ALPHAS[r]) / absmax ** ALPHAS[r]
            if rotation:
                mask = mask * hadamard.signs(2, path, K)
            np.testing.assert_allclose(now[path].mask, mask, rtol=1e-5)
            exact = x.astype(float) @ kernel
            found = ops.linear(x, now[path])
            np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())


def test_quantised_kernels_are_those_of_one_range_alone(params, statistics):
    done = quantize(params, recipe(), statistics)
    for r, alpha in enumerate(ALPHAS):
        one = {
            path: dataclasses.replace(
                layer, absmax=np.repeat(layer.absmax[:, r : r + 1], 3, axis=1)
            )
            for path, layer in statistics.layers.items()
        }
        rule = dataclasses.replace(recipe().rules[0], balance=Balance(alpha=alpha))
        alone = dataclasses.replace(recipe(), rules=(rule,))
        loose = dataclasses.replace(statistics, layers=one)
        object.__setattr__(loose, "check", lambda params: None)  # moments are of other ranges
        expected = quantize(params, alone, loose)
        found = at_timestep(done, RANGES.edges[r + 1])
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=a.dtype == jnp.int8)


def test_one_program_serves_all_timesteps(params, statistics):
    done, traces = quantize(params, recipe(), statistics), []
    x = np.ones((1, K), np.float32)

    @jax.jit
    def forward(params, t):
        traces.append(t)
        return ops.linear(x, at_timestep(params, t)["fc"]["kernel"])

    found = [np.asarray(forward(done, jnp.float32(t))) for t, _ in TIMES]
    assert len(traces) == 1
    for (_, r), out in zip(TIMES, found, strict=True):
        np.testing.assert_array_equal(out, found[[0, 2, 4][r]])
    assert (found[0] != found[2]).any() and (found[2] != found[4]).any()


def test_a_sampler_runs_through_the_ranges():
    """Float kernels, balanced for three ranges: the samples of the model as it was."""
    model = DiTTransformer(dataclasses.replace(TINY, depth=2))
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
    params = random_params(model, x, np.zeros(1, np.float32), np.zeros(1, np.int32))
    rule = Rule(match="blocks/.*", weights=None, balance=Balance(alpha=ALPHAS))
    balanced = quantize(
        params, Recipe(name="v1", rules=(rule,)), random_statistics(params, ranges=RANGES)
    )
    sample = jax.jit(
        lambda params: sample_latents(model, params, x, np.int32([1]), DIT_SCHEDULE.steps(4))
    )
    expected = np.asarray(sample(params))
    np.testing.assert_allclose(sample(balanced), expected, atol=1e-3 * np.abs(expected).max())


def test_it_is_saved_and_counted(params, statistics, tmp_path):
    done = quantize(params, recipe(), statistics)
    checkpoint.save(tmp_path / "out", done, model="dit", config={}, recipe=recipe())
    saved = checkpoint.load(tmp_path / "out")
    assert saved.recipe == recipe()
    assert jax.tree.structure(saved.params) == jax.tree.structure(done)
    jax.tree.map(np.testing.assert_array_equal, saved.params, done)
    report = size_report(checkpoint.iter_parts(done))
    plan = size_report(checkpoint.abstract_parts(saved.manifest))
    one = N * K + 4 * N + 4 * K  # codes, scales and the mask of one range
    assert report.after == plan.after == 3 * 3 * one + 4 * K * N
    assert report.parameters == 4 * K * N
    assert {g.kind for g in report.groups} == {
        "float32",
        "3 timestep ranges of int8 (8 bit) per channel, int8 activations, masked",
    }


def test_what_is_refused(params, statistics):
    done = quantize(params, recipe(), statistics)
    with pytest.raises(ValueError, match="one matrix for each timestep range: .*at_timestep"):
        ops.linear(np.ones((1, K), np.float32), done["fc"]["kernel"])
    with pytest.raises(ValueError, match="take those of a time with `at_timestep`"):
        dequantize(done)
    with pytest.raises(ValueError, match="fc and 2 more kernels are quantised already"):
        quantize(done, recipe(), statistics)
    two = random_statistics(params, ranges=TimestepRanges((0, 500, 1000)))
    with pytest.raises(RecipeError, match="3 alphas for .*fc, the statistics 2 timestep ranges"):
        quantize(params, recipe(), two)
    assert at_timestep(params, 3) is params
