"""GPTQ against its sums written out in NumPy float64, and against plain rounding."""

import dataclasses

import jax
import numpy as np
import pytest

from lowbit_jax.quant import Balance, Recipe, Rule, WeightSpec, feedback, hadamard, quantize
from lowbit_jax.quant.recipe import RecipeError
from tests.references.calibration import random_statistics

N, K = 12, 192  # one block of 128 and a part of the next
RULE = Rule(match=".*", weights=WeightSpec(format="int4", quantizer="gptq"), act_bits=8)


def inputs(seed=0, k=K, rows=1500):
    """Rows whose channels move together, and are of different sizes."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, k))
    return (common + 0.3 * rng.standard_normal((rows, k))) * np.exp(rng.normal(0, 0.7, k))


def kernel(seed=1, k=K):
    return np.random.default_rng(seed).standard_normal((k, N)).astype(np.float32)


def damped(gram):
    mean = np.trace(gram) / len(gram)
    return gram / mean + feedback.DAMPING * np.eye(len(gram))


def by_inverse(weight, gram, scale, low, high):
    """GPTQ as published: a rounded column's error is spread by the inverse of H, which shrinks."""
    weight, inverse = weight.astype(float).copy(), np.linalg.inv(damped(gram))
    codes = np.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = np.clip(np.rint(weight[:, j] / scale[:, 0]), low, high)
        error = (weight[:, j] - codes[:, j] * scale[:, 0]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return codes


@pytest.mark.parametrize("k", [5, 40, K])
def test_codes_are_those_of_the_published_algorithm(k):
    """A code at a tie of float32 and float64 differs, and what comes after it: 2 % of them."""
    x, w = inputs(k=k), kernel(k=k).T
    scale = (np.abs(w).max(1, keepdims=True) / 7).astype(np.float32)
    upper = feedback.factor(x.T @ x, None, None)
    rounded = jax.jit(
        lambda w, u, s: feedback.round_with_feedback(w, u, s, None, group=k, low=-7, high=7)
    )
    found = np.asarray(rounded(w, upper, scale))
    expected = by_inverse(w, x.T @ x, scale, -7, 7)
    assert (found != expected).mean() <= 0.02
    plain = np.clip(np.rint(w / scale), -7, 7)
    error = lambda codes: np.square(x @ (codes * scale - w).T).sum()  # noqa: E731
    assert error(found) < (0.6 if k > 5 else 1.0) * error(plain)


def test_the_factor_is_of_the_moments_of_transformed_inputs():
    x, mask = inputs(), np.exp(np.random.default_rng(2).normal(0, 1, K)).astype(np.float32)
    block = np.array([[1.0]])
    for part in hadamard.factors(64):
        block = np.kron(block, hadamard.hadamard(part))
    seen = (x * mask) @ np.kron(np.eye(3), block / 8)
    upper = np.asarray(feedback.factor(x.T @ x, mask, 64), float)
    assert (np.tril(upper) == 0).all()
    moments = damped(seen.T @ seen)
    left = np.linalg.inv(np.eye(K) + upper)
    diagonal = left @ moments @ left.T
    off = diagonal - np.diag(np.diagonal(diagonal))
    assert np.abs(off).max() < 1e-3 * np.abs(moments).max()


def test_inputs_that_do_not_move_together_change_nothing():
    w = kernel().T
    scale = (np.abs(w).max(1, keepdims=True) / 7).astype(np.float32)
    for gram in (np.diag(np.arange(1.0, K + 1)), np.zeros((K, K))):
        upper = feedback.factor(gram, None, None)
        assert (np.abs(np.asarray(upper)) == 0).all()
        codes = feedback.round_with_feedback(w, upper, scale, None, group=K, low=-7, high=7)
        np.testing.assert_array_equal(codes, np.clip(np.rint(w / scale), -7, 7))


@pytest.mark.parametrize(
    ("options", "granularity"),
    [({}, 128), ({"balance": Balance(alpha=0.3), "rotation": "full"}, "channel")],
    ids=["groups", "transformed"],
)
def test_in_a_recipe_it_beats_the_quantiser_whose_grid_it_has(options, granularity):
    """Groups, a mask and a rotation; stacked layers each have their own inputs."""
    x = {f"blocks/{i}/fc": inputs(i) for i in range(2)}
    params = {"blocks": {"0": {"fc": {"kernel": np.stack([kernel(1), kernel(2)])}}}}
    stats = random_statistics(params)
    layers = {
        path: dataclasses.replace(layer, gram=x[path].T @ x[path])
        for path, layer in stats.layers.items()
    }
    stats = dataclasses.replace(stats, layers=layers)
    spec = dataclasses.replace(RULE.weights, granularity=granularity)
    gptq = dataclasses.replace(RULE, weights=spec, act_bits=None, **options)
    plain = dataclasses.replace(gptq, weights=dataclasses.replace(spec, quantizer="mse"))
    errors = {}
    for rule in (gptq, plain):
        done = quantize(params, Recipe(name="test", rules=(rule,)), stats)
        kernels = done["blocks"]["0"]["fc"]["kernel"]
        restored = np.asarray(kernels.dequantize())
        for i, path in enumerate(x):
            change = restored[i].T - params["blocks"]["0"]["fc"]["kernel"][i]
            errors[rule.weights.quantizer, i] = np.square(x[path] @ change).sum()
        assert list(done["blocks"]) == ["0"]
    assert all(errors["gptq", i] < 0.5 * errors["mse", i] for i in range(2))


def test_what_is_refused():
    params = {"fc": {"kernel": kernel()}}
    recipe = Recipe(name="g", rules=(RULE,))
    with pytest.raises(RecipeError, match="recipe 'g' needs statistics of the activations"):
        quantize(params, recipe)
    with pytest.raises(RecipeError, match=r"needs X\^T X of the inputs of fc, the statistics have"):
        quantize(params, recipe, random_statistics(params))
    with pytest.raises(RecipeError, match="quantizer 'gptq' of ternary is none of"):
        WeightSpec(format="ternary", quantizer="gptq")
