"""`quantize` on FLUX: a mixed model runs as its dequantised layers do; exact bytes at full size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.flux import FLUX_DEV, FluxConfig, FluxTransformer, abstract_params
from lowbit_jax.quant.qtensor import QTensor, tree_bytes
from lowbit_jax.quant.recipe import RECIPES, Recipe, Rule, WeightSpec
from lowbit_jax.quant.stacks import iter_layers
from lowbit_jax.quant.transform import quantize

INT8 = WeightSpec(format="int8", quantizer="absmax")
INT4 = WeightSpec(format="int4", quantizer="absmax", granularity=16)
TERNARY = WeightSpec(format="ternary", quantizer="least_squares")

SMALL = FluxConfig(
    in_channels=4,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
    guidance_embed=False,
)

MIXED = Recipe(
    name="mixed",
    rules=(
        Rule(match="double_blocks/1/txt_mlp/.*", weights=TERNARY),
        Rule(match="single_blocks/2/linear[12]", weights=INT4),
        Rule(match="double_blocks/0/img_attn/.*", weights=None),
        Rule(match="(single|double)_blocks/.*", weights=INT8),
        Rule(match="final_layer/linear", weights=TERNARY),
    ),
)


def test_a_mixed_model_is_the_float_model_of_its_dequantised_layers():
    """Segments against one float stack filled layer by layer; 1e-5: scales come after the sum."""
    leaves, structure = jax.tree.flatten(abstract_params(SMALL, jnp.float32))
    rng = np.random.default_rng(0)
    params = structure.unflatten([0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves])
    quantised = jax.jit(partial(quantize, recipe=MIXED))(params)
    assert list(quantised["double_blocks"]) == ["0", "1"]
    assert list(quantised["single_blocks"]) == ["0", "2"]

    filled = jax.tree.map(np.array, params)
    for path, kernel, index in iter_layers(quantised):
        parts, target = path.split("/"), filled
        if index is not None:
            stack, number, *parts = parts
            target = filled[stack]["0"]
        for part in parts:
            target = target[part]
        if isinstance(kernel, QTensor):
            one = kernel if index is None else jax.tree.map(lambda leaf: leaf[index], kernel)  # noqa: B023
            assert not np.array_equal(one.dequantize().T, target["kernel"])
            where = ... if index is None else int(number)
            target["kernel"][where] = np.asarray(one.dequantize()).T

    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    inputs = (normal(2, 6, 4), normal(2, 3, 10), np.float32([0.2, 0.9]), normal(2, 6))
    ids = (rng.integers(0, 5, (6, 3)), np.zeros((3, 3)))
    apply = jax.jit(FluxTransformer(SMALL).apply)
    expected = apply({"params": filled}, *inputs, *ids)
    out = apply({"params": quantised}, *inputs, *ids)
    plain = apply({"params": params}, *inputs, *ids)  # the same program as for `filled`
    largest = np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * largest)
    assert np.abs(plain - expected).max() > 0.01 * largest  # quantisation is no small change here


# FLUX.1: weights of the blocks' linears, their outputs, everything else (bfloat16); all k are
# multiples of 128, so that packing pads nothing
D = 3072
BLOCK_WEIGHTS = 19 * 2 * (6 + 3 + 1 + 4 + 4) * D * D + 38 * (3 + 7 + 5) * D * D
BLOCK_OUTPUTS = 19 * 2 * (6 + 3 + 1 + 4 + 1) * D + 38 * (3 + 7 + 1) * D
REST = 11_901_408_320 - BLOCK_WEIGHTS


@pytest.mark.parametrize(
    ("name", "bits", "bytes_of_scales", "ratio"),
    [
        ("flux-1.58bit", 2, 4 * BLOCK_OUTPUTS, 7.6658),
        ("flux-1.58bit-a8", 2, 4 * BLOCK_OUTPUTS, 7.6658),
        ("w4a8", 4, 4 * BLOCK_OUTPUTS, 3.9255),
        ("w4a16", 4, (4 + 1) * BLOCK_WEIGHTS // 128, 3.6542),
        ("w8a8", 8, 4 * BLOCK_OUTPUTS, 1.9868),
    ],
)
def test_bytes_of_a_quantised_flux_dev(name, bits, bytes_of_scales, ratio):
    """To the byte, float32 scales (and int8 zero points) counted; planned without any memory."""
    assert (BLOCK_WEIGHTS, BLOCK_OUTPUTS) == (11_834_228_736, 3_035_136)
    params = abstract_params(FLUX_DEV)
    plan = jax.eval_shape(partial(quantize, recipe=RECIPES[name]), params)
    assert tree_bytes(params) == 23_802_816_640
    assert tree_bytes(plan) == BLOCK_WEIGHTS * bits // 8 + bytes_of_scales + 2 * REST
    assert tree_bytes(params) / tree_bytes(plan) == pytest.approx(ratio, abs=5e-5)
    if bits == 2:
        assert tree_bytes(plan) == 3_105_056_896
