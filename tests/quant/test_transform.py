"""`quantize` over whole trees: layer by layer, under every transformation, cut where it must be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.quant.qtensor import is_qtensor, tree_bytes
from lowbit_jax.quant.recipe import RECIPES, Recipe, RecipeError, Rule, WeightSpec
from lowbit_jax.quant.stacks import iter_layers, layer_paths
from lowbit_jax.quant.transform import (
    NonFiniteError,
    dequantize,
    quantize,
    quantize_kernel,
    quantize_weight,
)

INT8 = WeightSpec(format="int8", quantizer="absmax")
INT4 = WeightSpec(format="int4", quantizer="minmax", granularity=4)
TERNARY = WeightSpec(format="ternary", quantizer="least_squares")
SPECS = [
    WeightSpec(format=format, quantizer=quantizer, granularity=granularity)
    for format, quantizer, granularity in (
        ("int8", "absmax", "channel"),
        ("int8", "absmax", "tensor"),
        ("int8", "mse", "channel"),
        ("int6", "absmax", "channel"),
        ("int4", "minmax", "channel"),
        ("int4", "minmax", "tensor"),
        ("int4", "minmax", 4),
        ("ternary", "absmean", "tensor"),
        ("ternary", "twn", "channel"),
        ("ternary", "least_squares", "channel"),
        ("ternary", "least_squares", 4),
    )
]


def recipe(*rules, **options):
    """Rules as (regular expression, weight spec or None[, bits of the activations])."""
    made = (Rule(match=r[0], weights=r[1], act_bits=r[2] if r[2:] else None) for r in rules)
    return Recipe(name="test", rules=tuple(made), **options)


def whole_numbers(*shape, seed=0):
    """Small integers times a power of two per row: float32 sums of them are exact in any order."""
    rng = np.random.default_rng(seed)
    powers = 2.0 ** rng.integers(-1, 1, (*shape[:-2], 1, shape[-1]))
    return (rng.integers(-30, 31, shape) * powers).astype(np.float32)


def tree(layers=4, seed=0):
    """A small model: a stack of two linears (6 -> 5, 5 -> 6), one linear beside it, norms."""

    def lin(*shape):
        kernel = whole_numbers(*shape, seed=seed + shape[-1])
        return {"kernel": kernel, "bias": np.ones((*shape[:-2], shape[-1]), np.float32)}

    block = {
        "attn": {"qkv": lin(layers, 6, 5), "norm": {"scale": np.ones((layers, 6), np.float32)}},
        "mlp": lin(layers, 5, 6),
    }
    return {"embed": lin(7, 6), "blocks": {"0": block}}


def assert_same(found, expected, rtol=0.0):
    """Equal trees: structure (and so formats), dtypes, every integer; floats to `rtol`."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        integers = jnp.issubdtype(a.dtype, jnp.integer)
        np.testing.assert_allclose(a, b, rtol=0 if integers else rtol, atol=0)


def layer(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format}-{s.quantizer}-{s.granularity}")
def test_a_stack_is_its_layers_quantised_one_by_one(spec):
    """Codes are equal, scales to two roundings: a loop may divide by a constant another way.

    `mse` compares sums of squares, which are not exact: there the error is equal to 1e-5.
    """
    params, rule = tree(), Rule(match="blocks/.*/qkv", weights=spec, act_bits=8)
    out = quantize(params, Recipe(name="test", rules=(rule,)))
    alone = jax.jit(partial(quantize_weight, rule=rule))
    kernel = params["blocks"]["0"]["attn"]["qkv"]["kernel"]
    stacked = out["blocks"]["0"]["attn"]["qkv"].pop("kernel")
    assert stacked.shape == (5, 6)
    assert (stacked.layers, stacked.act_bits, stacked.format) == (4, 8, spec.format)
    for i in range(4):
        expected = alone(kernel[i].T)
        if spec.quantizer != "mse":
            assert_same(layer(stacked, i), expected, rtol=2.5e-7)
        found = np.asarray(layer(stacked, i).dequantize())
        error, least = (np.square(w - kernel[i].T).sum() for w in (found, expected.dequantize()))
        assert error == pytest.approx(least, rel=1e-5)
        assert error < 0.6 * np.square(kernel[i]).sum()  # 0.2 for ternary numbers, 1 for zeros
    del params["blocks"]["0"]["attn"]["qkv"]["kernel"]
    assert_same(out, params)  # all the rest is as it was


MIXED = recipe(
    ("blocks/[01]/mlp", INT8, 8),
    ("blocks/2/.*", None),
    ("blocks/.*", TERNARY),
    ("embed", INT4),
)


@pytest.mark.parametrize("on", ("jit", "vmap", "eval_shape"))
def test_transformations_give_what_the_eager_call_gives(on):
    """Codes equal: sums of these weights are exact, so no order of adding can change one."""
    fn = partial(quantize, recipe=MIXED)
    if on == "jit":
        assert_same(jax.jit(fn)(tree()), fn(tree()), rtol=2.5e-7)
    elif on == "vmap":
        many = [tree(seed=i) for i in range(3)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
        out, alone = jax.jit(jax.vmap(fn))(stacked), jax.jit(fn)  # which the case above compares
        for i in range(3):
            assert_same(layer(out, i), alone(many[i]), rtol=2.5e-7)
    else:
        plan, out = jax.eval_shape(fn, tree()), fn(tree())
        assert jax.tree.structure(plan) == jax.tree.structure(out)
        sizes = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (plan, out)]
        assert sizes[0] == sizes[1]
        assert tree_bytes(plan) == tree_bytes(out)


def test_stacks_are_cut_where_the_treatment_changes_and_only_there():
    out = quantize(tree(layers=12), MIXED)["blocks"]
    assert sorted(out, key=int) == ["0", "2", "3"]
    kinds = {
        first: [
            getattr(k, "format", "float")
            for k in (part["attn"]["qkv"]["kernel"], part["mlp"]["kernel"])
        ]
        for first, part in out.items()
    }
    assert kinds == {"0": ["ternary", "int8"], "2": ["float", "float"], "3": ["ternary", "ternary"]}
    lengths = {first: part["mlp"]["bias"].shape[0] for first, part in out.items()}
    assert lengths == {"0": 2, "2": 1, "3": 9}
    assert out["0"]["mlp"]["kernel"].act_bits == 8
    assert out["0"]["attn"]["qkv"]["kernel"].act_bits is None


def test_rules_that_say_the_same_do_not_cut():
    """Nor does "keep" by a rule next to "keep" for want of one."""
    same = recipe(
        ("blocks/0/.*", INT8),
        ("blocks/1/.*", INT8),
        ("blocks/2/mlp", None),
        ("blocks/4/.*", INT8, 8),
    )
    out = quantize(tree(layers=5), same)
    assert list(out["blocks"]) == ["0", "2", "4"]
    assert out["blocks"]["0"]["mlp"]["kernel"].layers == 2
    assert out["blocks"]["2"]["mlp"]["kernel"].shape == (2, 5, 6)


def test_a_second_recipe_meets_the_segments_of_the_first():
    params = tree(layers=12)
    first = quantize(params, recipe(("blocks/(0|10)/.*", INT8)))
    assert layer_paths(first) == layer_paths(params)
    assert sorted(first["blocks"], key=int) == ["0", "1", "10", "11"]
    second = quantize(first, recipe(("blocks/([1-9]|11)/.*", TERNARY)))
    once = quantize(params, recipe(("blocks/(0|10)/.*", INT8), ("blocks/.*", TERNARY)))
    assert_same(second, once)


def test_already_quantised_kernels_are_an_error():
    done = quantize(tree(), recipe(("blocks/1/mlp", INT8)))
    with pytest.raises(ValueError, match="blocks/1/mlp and 0 more kernels are quantised already"):
        quantize(done, recipe(("blocks/.*", INT8)))
    assert_same(quantize(done, recipe(("blocks/1/mlp", None))), done)


def test_a_rule_that_decides_nothing_is_an_error_here_too():
    with pytest.raises(RecipeError, match="blocks/4/"):
        quantize(tree(), recipe(("blocks/4/.*", INT8)))


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_bad_weights_are_named_by_layer_or_kept(bad):
    params = tree()
    params["blocks"]["0"]["mlp"]["kernel"][2, 1, 3] = bad
    params["embed"]["kernel"][0, 0] = bad
    everything = (".*", INT8)
    with pytest.raises(NonFiniteError, match="NaN or inf in blocks/2/mlp, embed: .*recipe 'test'"):
        quantize(params, recipe(everything))
    with pytest.raises(NonFiniteError, match="in blocks/2/mlp: "):  # embed is not to be quantised
        quantize(params, recipe(("blocks/.*", INT8)))
    kept = quantize(params, recipe(everything, on_nonfinite="keep"))
    floats = {path for path, kernel, _ in iter_layers(kept) if not is_qtensor(kernel)}
    assert floats == {"blocks/2/mlp", "embed"}
    assert list(kept["blocks"]) == ["0", "2", "3"]
    np.testing.assert_array_equal(kept["embed"]["kernel"], params["embed"]["kernel"])
    untouched = quantize(params, recipe(("blocks/[013]/.*", INT8)))
    assert set(untouched["blocks"]) == {"0", "2", "3"}


def test_bad_weights_show_where_values_cannot_be_looked_at():
    params = tree()
    params["blocks"]["0"]["mlp"]["kernel"][2, 1, 3] = np.nan
    out = jax.jit(partial(quantize, recipe=recipe(("blocks/.*", INT8))))(params)
    finite = np.isfinite(dequantize(out)["blocks"]["0"]["mlp"]["kernel"])
    expected = np.ones((4, 5, 6), bool)
    expected[2, :, 3] = False  # output 3 of layer 2
    np.testing.assert_array_equal(finite, expected)


def test_the_float_recipe_changes_nothing_and_dequantize_inverts_the_types():
    params = tree()
    assert_same(quantize(params, RECIPES["float"]), params)
    back = dequantize(quantize(params, recipe((".*", INT8))), jnp.bfloat16)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for (path, a), b in zip(jax.tree.leaves_with_path(back), jax.tree.leaves(params), strict=True):
        assert a.shape == b.shape
        assert a.dtype == (jnp.bfloat16 if path[-1].key == "kernel" else jnp.float32)
        np.testing.assert_allclose(np.asarray(a, float), b, atol=0.02 * np.abs(b).max())


def test_a_rule_without_weights_cannot_quantise():
    with pytest.raises(ValueError, match="rule 'a' keeps its kernels in floating point"):
        quantize_kernel(np.ones((3, 2), np.float32), Rule(match="a", weights=None))
