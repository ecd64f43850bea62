"""Rows with zero points: codes and products equal to NumPy's in float64; through saving, too."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import checkpoint
from lowbit_jax.models.layers import AdaLN, Gelu
from lowbit_jax.ops import linear
from lowbit_jax.quant.asymmetric import asymmetric_rows
from lowbit_jax.quant.masks import channel_mask
from lowbit_jax.quant.recipe import Balance, Recipe, RecipeError, Rule, WeightSpec
from lowbit_jax.quant.report import describe
from lowbit_jax.quant.transform import quantize
from lowbit_jax.quant.weights import ALPHAS, Given, mask_of, quantize_kernel
from pallas_kernels import api
from pallas_kernels.formats import FORMATS, pack_codes
from pallas_kernels.rows import QuantizedRows

K, N = 300, 24  # k ends in the middle of a block of 128, and of a group of 64
LINEAR = jax.jit(linear)
QUANTIZERS = {"int8": "minmax", "int6": "mse", "int4": "minmax", "ternary": "least_squares"}


def inputs(rows=9, k=K, seed=0):
    """Rows off centre, by different amounts; one of zeros, of one sign each, and of a constant."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) * rng.lognormal(0, 1, (rows, 1))
    x += rng.standard_normal((rows, 1)) * 2
    x[1], x[2], x[3], x[4] = 0, np.abs(x[2]) + 1, -np.abs(x[3]) - 1, 2.5
    return x.astype(np.float32)


def oracle(x, bits):
    """(codes, zero, scale) of ViDiT-Q's formula in signed codes, in float64."""
    x = x.astype(np.float64)
    low = np.minimum(x.min(-1, keepdims=True), 0)
    high = np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    half = 2 ** (bits - 1)
    zero = np.rint(-low / scale) - half
    return np.clip(np.rint(x / scale) + zero, -half, half - 1), zero, scale


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_equal_float64(bits):
    """But for halves, which float32 may see on the other side: then the code is the next one."""
    x = inputs()
    found = asymmetric_rows(jnp.asarray(x), bits)
    codes, zero, scale = oracle(x, bits)
    np.testing.assert_allclose(found.rows.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(found.zero, zero)
    off = np.asarray(found.rows.codes) - codes
    near = np.abs(np.abs(x / scale - np.rint(x / scale)) - 0.5) < 1e-4
    assert (off[~near] == 0).all() and (np.abs(off) <= 1).all() and near.mean() < 1e-2
    np.testing.assert_array_equal(found.rows.sums, found.rows.codes.sum(-1, keepdims=True))
    numbers = np.asarray(found.dequantize())
    assert (np.abs(numbers - x) <= 1.01 * scale).all() and (numbers[1] == 0).all()
    assert (np.asarray(found.rows.codes)[x == 0] == np.broadcast_to(zero, x.shape)[x == 0]).all()


def test_both_ends_that_round_up_are_clipped():
    """-0.5 and 254.5 of 255 steps: both round to even, to 0 and 254, and 0.5 and 254.5 likewise."""
    x = np.zeros((2, 4), np.float32)
    x[:, :2] = [[-1.5, 253.5], [-253.5, 1.5]]
    found = asymmetric_rows(jnp.asarray(x), 8)
    codes, zero, scale = oracle(x, 8)
    assert (scale == 1).all()
    np.testing.assert_array_equal(found.rows.codes, codes)
    np.testing.assert_array_equal(found.zero, zero)
    assert np.asarray(found.rows.codes).max() == 127


def kernel_of(format, granularity, bits=8, seed=1, **more):
    w = np.random.default_rng(seed).standard_normal((K, N), np.float32)
    spec = WeightSpec(format=format, quantizer=QUANTIZERS[format], granularity=granularity)
    rule = Rule(match=".*", weights=spec, act_bits=bits, act_symmetric=False)
    return dataclasses.replace(quantize_kernel(jnp.asarray(w), rule), **more)


def numbers_of(x, bits):
    """What the library's codes stand for, in float64."""
    found = asymmetric_rows(jnp.asarray(x), bits)
    shifted = np.asarray(found.rows.codes, float) - np.asarray(found.zero, float)
    return shifted * np.asarray(found.rows.scale, float)


@pytest.mark.parametrize(
    ("format", "granularity", "bits"),
    [
        ("int8", "channel", 8),
        ("int6", "tensor", 4),
        ("int4", 64, 8),
        ("ternary", "channel", 8),
        ("ternary", 64, 4),
    ],
)
def test_products_equal_float64(format, granularity, bits):
    """1e-6 is for the few float32 products and group sums after the exact ones."""
    kernel, x = kernel_of(format, granularity, bits), inputs()
    w = np.asarray(kernel.dequantize(), float)
    bias = np.random.default_rng(2).standard_normal(N).astype(np.float32)
    codes = np.abs(numbers_of(x, bits)) + 2**bits * np.asarray(
        asymmetric_rows(jnp.asarray(x), bits).rows.scale
    )
    out = np.asarray(LINEAR(x, kernel, bias), float)
    expected = numbers_of(x, bits) @ w.T + bias
    assert (np.abs(out - expected) <= 1e-6 * (codes @ np.abs(w).T) + 1e-6 * np.abs(bias)).all()
    np.testing.assert_array_equal(out[1], bias)


def test_integers_are_equal():
    """Scales of one, rows of all 256 levels: nothing rounds; the sums are those of integers."""
    kernel = kernel_of("int8", "channel", scale=jnp.ones((N, 1)))
    x = np.random.default_rng(3).integers(-55, 200, (5, K), endpoint=True).astype(np.float32)
    x[:, 0], x[:, 1] = -55, 200
    codes = np.asarray(kernel.unpacked(), np.int64)
    codes = codes - (0 if kernel.zero is None else np.asarray(kernel.zero, np.int64))
    np.testing.assert_array_equal(LINEAR(x, kernel), x.astype(np.int64) @ codes.T)


def test_what_comes_before_and_after():
    """AdaLN, mask and rotation before the codes; gate and residual after: float64, one code off."""
    rng = np.random.default_rng(4)
    k, shape = 256, (2, 5)
    w = rng.standard_normal((k, N), np.float32)
    spec = WeightSpec(format="int8", quantizer="absmax")
    kernel = quantize_kernel(
        jnp.asarray(w), Rule(match=".*", weights=spec, act_bits=8, act_symmetric=False)
    )
    mask = jnp.asarray(rng.uniform(0.5, 2, k).astype(np.float32))
    kernel = dataclasses.replace(kernel, mask=mask, rotation=128)
    x = rng.standard_normal((*shape, k), np.float32)
    gate, residual = rng.standard_normal((2, N), np.float32), rng.standard_normal((*shape, N))
    shift, scale = rng.standard_normal((2, 2, k), np.float32)
    stored = np.asarray(kernel.dequantize_stored(), float)
    for before in (AdaLN(jnp.asarray(shift), jnp.asarray(scale)), Gelu()):
        plain = dataclasses.replace(kernel, act_bits=None)
        options = {"before": before, "gate": gate, "residual": residual.astype(np.float32)}
        exact = np.asarray(LINEAR(x, plain, **options), float)
        found = np.asarray(LINEAR(x, kernel, **options), float)
        rows = np.asarray(before(jnp.asarray(x))) * np.asarray(mask)
        step = 8 * np.abs(rows).max() / 255  # a rotation may make numbers larger
        allowed = step * np.sqrt((stored**2).sum(-1)).max() * np.abs(gate).max()
        assert 0 < np.abs(found - exact).max() < allowed


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_bad_row_shows_in_its_own_outputs_only(bad):
    kernel, x = kernel_of("int4", "channel"), inputs()
    clean = np.asarray(LINEAR(x, kernel))
    x[2, 17] = bad
    out = np.asarray(LINEAR(x, kernel))
    assert not np.isfinite(out[2]).any()
    np.testing.assert_array_equal(np.delete(out, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_shapes_dtypes_and_gradients(dtype):
    """As those of symmetric rows: straight through the rounding."""
    kernel = kernel_of("int8", "channel")
    for lead in ((), (2, 3)):
        x = jnp.asarray(inputs(6).reshape(-1)[: K * int(np.prod(lead))].reshape(*lead, K), dtype)
        out = LINEAR(x, kernel)
        assert (out.shape, out.dtype) == ((*lead, N), dtype)
    found = jax.grad(lambda x: LINEAR(x, kernel).astype(jnp.float32).sum())(x)
    symmetric = dataclasses.replace(kernel, act_symmetric=True)
    expected = jax.grad(lambda x: LINEAR(x, symmetric).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_takes_the_least_code(format):
    """-128, which symmetric rows never hold, times the largest codes: equal to integers."""
    known, k = FORMATS[format], 384
    codes = np.full((16, k), known.high, np.int8)
    codes[8:] = known.low
    x = np.full((16, k), -128, np.int8)
    x[1:8] = np.random.default_rng(5).integers(-128, 127, (7, k), endpoint=True)
    sums = x.sum(-1, keepdims=True, dtype=np.int32)
    rows = QuantizedRows(*map(jnp.asarray, (x, np.ones((16, 1), np.float32), sums)))
    stored, scale = pack_codes(jnp.asarray(codes), format), jnp.ones((16, 1))
    found = api.matmul(rows, stored, scale, format=format, implementation="interpret")
    np.testing.assert_array_equal(found, x.astype(np.int64) @ codes.T.astype(np.int64))


def recipe(**changes):
    spec = WeightSpec(format="int8", quantizer="absmax")
    rule = Rule(match=".*qkv", weights=spec, act_bits=8, act_symmetric=False)
    return Recipe(name="asymmetric", rules=(dataclasses.replace(rule, **changes),))


def test_recipes_checkpoints_and_reports(tmp_path):
    rng = np.random.default_rng(6)
    stack = rng.standard_normal((3, K, N)).astype(np.float32)
    tree = {"blocks": {"0": {"qkv": {"kernel": jnp.asarray(stack)}}}, "table": jnp.ones(3)}
    chosen = recipe()
    assert Recipe.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    made = quantize(tree, chosen)
    kernel = made["blocks"]["0"]["qkv"]["kernel"]
    assert describe(kernel) == "int8 (8 bit) per channel, asymmetric int8 activations"
    manifest = {"model": "dit", "config": {}, "recipe": chosen.to_json(), "source": None}
    with checkpoint.Writer(tmp_path / "out", manifest) as writer:
        for name, part in checkpoint.iter_parts(made):
            writer.write(name, part)
        writer.finish()
    loaded = checkpoint.load(tmp_path / "out").params
    assert jax.tree.structure(loaded) == jax.tree.structure(made)
    assert not loaded["blocks"]["0"]["qkv"]["kernel"].act_symmetric
    # an entry of an earlier version says nothing: symmetric
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())
    text = json.dumps(data).replace('"act_symmetric": false, ', "")
    assert text != json.dumps(data)
    (tmp_path / "out" / "manifest.json").write_text(text)
    older = checkpoint.load(tmp_path / "out").params
    assert older["blocks"]["0"]["qkv"]["kernel"].act_symmetric


def test_layers_of_both_kinds_are_cut_apart():
    """What is static of a stack is of all its layers."""
    tree = {"blocks": {"0": {"qkv": {"kernel": jnp.ones((3, 8, 4))}}}}
    rules = (dataclasses.replace(recipe().rules[0], match="blocks/1/qkv"), recipe().rules[0])
    rules = (rules[0], dataclasses.replace(rules[1], act_symmetric=True))
    made = quantize(tree, Recipe(name="both", rules=rules))
    found = {key: part["qkv"]["kernel"].act_symmetric for key, part in made["blocks"].items()}
    assert found == {"0": True, "1": False, "2": True}


@pytest.mark.parametrize(
    "changes",
    [{"act_bits": None}, {"act_static": True}, {"act_symmetric": 0}],
    ids=["float", "static", "no boolean"],
)
def test_rules_that_make_no_sense(changes):
    with pytest.raises(RecipeError, match="act_symmetric"):
        recipe(**changes)


def test_alpha_is_chosen_by_what_the_rows_become():
    """The error that decides is that of asymmetric rows: in NumPy, int8 weights per channel."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((32, 64)) * rng.lognormal(0, 1, 64) + rng.lognormal(0, 1, 64)
    rows, weight = rows.astype(np.float32), rng.standard_normal((16, 64)).astype(np.float32)
    columns = jnp.asarray(np.abs(weight).max(0))
    given = Given(absmax=jnp.asarray(np.abs(rows).max(0)), rows=jnp.asarray(rows))
    rule = dataclasses.replace(recipe(balance=Balance(alpha="auto"), act_bits=4).rules[0])
    mask = np.asarray(mask_of(rule, columns, given, jnp.asarray(weight)), float)

    def error(mask, symmetric):
        w = weight / mask
        step = np.abs(w).max(-1, keepdims=True) / 127
        codes, zero, scale = oracle(rows * mask, 4)
        if symmetric:
            scale, zero = np.abs(rows * mask).max(-1, keepdims=True) / 7, 0
            codes = np.rint(rows * mask / scale)
        found = ((codes - zero) * scale) @ (np.rint(w / step) * step).T
        return np.square(found - rows.astype(float) @ weight.T).sum()

    tried = [np.ones(64)]
    tried += [np.asarray(channel_mask(given.absmax, columns, a), float) for a in ALPHAS]
    best, other = (int(np.argmin([error(m, kind) for m in tried])) for kind in (False, True))
    assert best != other
    np.testing.assert_allclose(mask, tried[best], rtol=1e-6)
