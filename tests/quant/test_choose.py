"""Choosing transforms by output error: against the same search written out in NumPy float64."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.calibration.statistics import LayerStatistics
from lowbit_jax.quant import RECIPES, Balance, Recipe, Rule, WeightSpec, hadamard, quantize
from lowbit_jax.quant.choose import choices_json, choices_table, choose, incoherence
from lowbit_jax.quant.recipe import RecipeError
from lowbit_jax.quant.stacks import iter_layers
from lowbit_jax.quant.typical import typical_rows
from lowbit_jax.quant.weights import ALPHAS as TRIED
from tests.references.calibration import random_statistics

K, N, ALPHAS = 64, 24, (0.0, 0.5, 1.0)
RANGES = TimestepRanges((0, 500, 1000))
INT4 = WeightSpec(format="int4", quantizer="absmax")
RULE = Rule(match=".*", weights=INT4, act_bits=4, balance=Balance(alpha=0.5), rotation="full")
RECIPE = Recipe(name="test", rules=(RULE,), seed=3)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    stack = rng.standard_normal((3, K, N), np.float32)
    stack[:, 5] *= 8
    even = np.sign(rng.standard_normal((K, N))).astype(np.float32)
    return {"blocks": {"0": {"fc": {"kernel": stack}}}, "even": {"kernel": even}}


@pytest.fixture(scope="module")
def statistics(params):
    found = random_statistics(params, ranges=RANGES)
    shape = found.layers["even"].absmax.shape
    even = dataclasses.replace(
        found.layers["even"], absmax=np.full(shape, 4, np.float32), squares=np.full(shape, 1000.0)
    )
    return dataclasses.replace(found, layers=found.layers | {"even": even})


def error(kernel, x, absmax, alpha, signs):
    """Relative squared error of a W4A4 product, from the formulas."""
    w, x = kernel.T.astype(float), x.astype(float)
    mask = np.ones(K)
    if alpha is not None:
        mask = np.abs(w).max(0) ** (1 - alpha) / absmax.astype(float) ** alpha
    turn = np.eye(K)
    if signs is not None:
        mask = mask * signs
        turn = hadamard.hadamard(64).astype(float) / 8

    def rounded(values):
        step = np.abs(values).max(-1, keepdims=True) / 7
        return np.rint(values / step) * step

    found = rounded((x * mask) @ turn) @ rounded((w / mask) @ turn).T
    return np.square(found - x @ w.T).sum() / np.square(x @ w.T).sum()


@pytest.fixture(scope="module")
def chosen(params, statistics):
    return choose(params, RECIPE, statistics, alphas=ALPHAS, threshold=1.5, margin=0.0)


def test_errors_and_choices_are_those_of_the_formulas(params, statistics, chosen):
    """1 %: a code at a tie of float32 and float64 may differ."""
    choices = {choice.layer: choice for choice in chosen[1]}
    assert set(choices) == {"blocks/0/fc", "blocks/1/fc", "blocks/2/fc", "even"}
    exact = {}
    for path, kernel, index in iter_layers(params):
        kernel = kernel if index is None else kernel[index]
        layer = statistics.layers[path]
        x, absmax = typical_rows(layer, path), layer.absmax.max((0, 1))
        for signs in (None, hadamard.signs(3, path, K)):
            for alpha in (None, *ALPHAS):
                label = [] if alpha is None else [f"balance {alpha:g}"]
                label = " + ".join(label + ["rotation"] * (signs is not None)) or "nothing"
                exact[path, label] = error(kernel, x, absmax, alpha, signs)
                assert choices[path].errors[label] == pytest.approx(exact[path, label], rel=0.01)
        assert choices[path].incoherence == {
            "input": pytest.approx(absmax.max() / absmax.mean(), rel=1e-5),
            "weights": pytest.approx(np.abs(kernel).max(1).max() / np.abs(kernel).max(1).mean()),
        }
    blocks = [f"blocks/{i}/fc" for i in range(3)]
    means = {a: np.mean([exact[p, f"balance {a:g} + rotation"] for p in blocks]) for a in ALPHAS}
    alpha = min(means, key=means.get)
    for path in blocks:
        allowed = ["nothing", f"balance {alpha:g}", "rotation", f"balance {alpha:g} + rotation"]
        best = min(allowed, key=lambda label: exact[path, label])
        assert choices[path].chosen.label == best
        assert choices[path].gain == pytest.approx(
            10 * np.log10(exact[path, "nothing"] / exact[path, best]), abs=0.1
        )
    assert choices["even"].chosen.label == "nothing"
    assert "channels are even" in choices["even"].why


def test_the_recipe_does_what_was_chosen(params, statistics, chosen):
    recipe, choices = chosen
    done = jax.jit(lambda p: quantize(p, recipe, statistics))(params)
    kernels = {path: (kernel, index) for path, kernel, index in iter_layers(done)}
    for choice in choices:
        kernel, _ = kernels[choice.layer]
        assert (kernel.mask is None) == (choice.chosen.label == "nothing")
        assert (kernel.rotation is None) == (choice.chosen.rotation is None)
        assert (kernel.format, kernel.act_bits) == ("int4", 4)
    assert recipe.name == "test chosen" and recipe.seed == 3
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_margin_prefers_what_is_simpler(params, statistics):
    _, choices = choose(params, RECIPE, statistics, alphas=(0.5,), threshold=1.5, margin=1e6)
    assert {choice.chosen.label for choice in choices} == {"nothing"}


def test_real_inputs_may_be_given(params, statistics):
    x = np.random.default_rng(3).standard_normal((40, K), np.float32)
    rule = dataclasses.replace(RULE, match="even", rotation=None)
    recipe = Recipe(name="test", rules=(rule,))
    _, [choice] = choose(params, recipe, statistics, alphas=(0.5,), rows={"even": x})
    exact = error(params["even"]["kernel"], x, None, None, None)
    assert choice.errors["nothing"] == pytest.approx(exact, rel=0.01)
    assert set(choice.errors) == {"nothing", "balance 0.5"}


def test_alpha_of_auto_is_the_one_of_least_error(params, statistics):
    """Of those of the library and no balance, by the sums written out above; rotated by rule."""
    rule = dataclasses.replace(RULE, balance=Balance(alpha="auto"))
    recipe = Recipe(name="test", rules=(rule,), seed=3)
    done = quantize(params, recipe, statistics)
    assert list(done["blocks"]) == ["0"]
    found = {path: (kernel, i) for path, kernel, i in iter_layers(done)}
    for path, kernel, index in iter_layers(params):
        kernel = kernel if index is None else kernel[index]
        layer, signs = statistics.layers[path], hadamard.signs(3, path, K)
        x, absmax = typical_rows(layer, path), layer.absmax.max((0, 1))
        errors = {a: error(kernel, x, absmax, a, signs) for a in (None, *TRIED)}
        made, i = found[path]
        made = np.asarray(made.mask if i is None else made.mask[i])
        largest, absmax = np.abs(kernel).max(1).astype(float), absmax.astype(float)
        masks = {a: largest ** (1 - a) / absmax**a for a in TRIED} | {None: np.ones(K)}
        [chosen] = {a for a in masks if np.allclose(made, signs * masks[a], rtol=1e-5)}
        assert errors[chosen] <= 1.01 * min(errors.values())  # ties may fall otherwise
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("gram", [False, True])
def test_typical_rows_have_the_moments_of_the_statistics(gram):
    rng = np.random.default_rng(0)
    k, count = 12, 4000
    mix = rng.standard_normal((k, k))
    real = rng.standard_normal((2, 3, 5000, k)) @ mix + (0 if gram else 3 * np.arange(k))
    layer = LayerStatistics(
        absmax=np.abs(real).max(2).astype(np.float32),
        total=real.sum(2),
        squares=np.square(real).sum(2),
        count=np.full((2, 3), 5000),
        gram=np.einsum("hrtk,hrtl->kl", real, real) if gram else None,
    )
    x = typical_rows(layer, "a", count)
    np.testing.assert_array_equal(np.abs(x).max(0), layer.absmax.max((0, 1)))
    np.testing.assert_allclose(np.square(x).mean(0), np.square(real).mean((0, 1, 2)), rtol=0.1)
    if gram:
        both = np.einsum("hrtk,hrtl->kl", real, real) / 30000
        np.testing.assert_allclose(x.T @ x / count, both, atol=0.1 * both.max())
    else:
        np.testing.assert_allclose(x.mean(0), real.mean((0, 1, 2)), atol=0.3)
    np.testing.assert_array_equal(x, typical_rows(layer, "a", count))
    assert (x != typical_rows(layer, "b", count)).any()
    assert len(typical_rows(layer, "a", 2)) == 2


def test_reports(chosen):
    console = Console(width=200, file=None, record=True, quiet=False)
    with console.capture() as text:
        console.print(choices_table(chosen[1]))
    assert "blocks/1/fc" in text.get() and "channels are even" in text.get()
    data = json.loads(json.dumps(choices_json(chosen[1])))
    assert [entry["layer"] for entry in data] == [choice.layer for choice in chosen[1]]
    assert set(data[0]) == {"layer", "chosen", "why", "gain_db", "incoherence", "errors"}


def test_what_is_refused(params, statistics):
    with pytest.raises(RecipeError, match="'naive-w8a8' neither balances nor rotates"):
        choose({"blocks": params["blocks"]}, RECIPES["naive-w8a8"], statistics)
    with pytest.raises(ValueError, match="even: the model has no such linear"):
        choose({"blocks": params["blocks"]}, RECIPE, statistics)
    assert incoherence(np.ones(5)) == 1
    assert incoherence(np.zeros(5)) == 0
