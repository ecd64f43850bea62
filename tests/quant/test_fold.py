"""Folded masks: a model's outputs do not change, and what is left online is what cannot go."""

import dataclasses

import jax
import numpy as np
import pytest

from lowbit_jax.models import dit, flux, stdit
from lowbit_jax.quant import RECIPES, balance, quantize, rotate
from lowbit_jax.quant.fold import fold
from lowbit_jax.quant.qtensor import TransformedKernel
from lowbit_jax.quant.stacks import iter_layers
from tests.references import dit_files, flux_files, stdit_files
from tests.references.calibration import random_params, random_statistics

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def dit_case():
    config = dataclasses.replace(dit_files.TINY, depth=2)
    side = config.sample_size
    inputs = (normal(2, config.in_channels, side, side), np.float32([3, 700]), np.int32([0, 2]))
    return dit.DiTTransformer(config), inputs, {}


def flux_case():
    config = flux_files.TINY
    guidance = np.float32([3.5]) if config.guidance_embed else None
    inputs = (normal(1, 6, config.in_channels), normal(1, 5, config.context_in_dim))
    inputs += (np.float32([0.2]), normal(1, config.vec_in_dim))
    named = {"img_ids": flux.image_ids(2, 3), "txt_ids": flux.text_ids(5), "guidance": guidance}
    return flux.FluxTransformer(config), inputs, named


def stdit_case():
    config = stdit_files.TINY
    named = {
        "x": normal(1, config.in_channels, *config.input_size),
        "timestep": np.int32([503]),
        "caption": normal(1, 7, config.caption_channels),
        "caption_mask": np.arange(7)[None] < 4,
    }
    return stdit.STDiTTransformer(config), (), named


# linears whose mask goes elsewhere, and those whose mask stays
CASES = {
    "dit": (dit_case, {"attn/qkv", "attn/proj", "mlp/fc1"}, {"adaLN_modulation", "mlp/fc2"}),
    "flux": (
        flux_case,
        {"img_attn/qkv", "txt_attn/qkv", "img_mlp/in_layer", "txt_mlp/in_layer", "linear1"},
        {"img_attn/proj", "txt_attn/proj", "img_mlp/out_layer", "txt_mlp/out_layer", "linear2"}
        | {"img_mod/lin", "txt_mod/lin", "modulation/lin"},
    ),
    "stdit": (
        stdit_case,
        {"attn/proj", "attn_temp/proj", "cross_attn/proj"},
        {"attn/qkv", "attn_temp/qkv", "cross_attn/q_linear", "cross_attn/kv_linear"}
        | {"mlp/fc1", "mlp/fc2"},
    ),
}


@pytest.mark.parametrize(
    "name", ["dit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux", "stdit"))]
)
def test_outputs_do_not_change(name):
    """Through whole networks in float32: 2e-5 of the largest output."""
    case, moved, kept = CASES[name]
    model, inputs, named = case()
    params = random_params(model, *inputs, **named)
    statistics = random_statistics(params, model=name)
    balanced = balance(params, statistics, match=".*blocks/.*", alpha=0.5)
    folded = fold(balanced)
    masked = {"/".join(path.split("/")[2:]) for path, kernel, _ in iter_layers(folded)
              if isinstance(kernel, TransformedKernel) and kernel.mask is not None}  # fmt: skip
    everything = {"/".join(p.split("/")[2:]) for p, _, _ in iter_layers(params) if "blocks/" in p}
    assert masked == kept and everything - masked == moved
    apply = jax.jit(model.apply)
    expected = np.asarray(apply({"params": params}, *inputs, **named))
    for tree in (balanced, folded):
        found = apply({"params": tree}, *inputs, **named)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_rotation_stays_and_its_signs_go():
    kernel = lambda *shape: {"kernel": normal(*shape), "bias": normal(*shape[:-2], shape[-1])}  # noqa: E731
    block = {"attn": {"qkv": kernel(2, 64, 192), "proj": kernel(2, 64, 64)}}
    params = rotate({"blocks": {"0": block}}, match="blocks/./attn/proj", seed=1)
    folded = fold(params)["blocks"]["0"]["attn"]
    assert folded["proj"]["kernel"].mask is None and folded["proj"]["kernel"].rotation == 64
    signs = params["blocks"]["0"]["attn"]["proj"]["kernel"].mask
    for name in ("kernel", "bias"):
        before, after = block["attn"]["qkv"][name], np.asarray(folded["qkv"][name])
        np.testing.assert_array_equal(after[..., :128], before[..., :128])
        s = np.asarray(signs)[:, None] if name == "kernel" else np.asarray(signs)
        np.testing.assert_array_equal(after[..., 128:], before[..., 128:] * s)


def test_what_takes_no_mask_leaves_it_online():
    kernel = lambda k, n: {"kernel": normal(1, k, n), "bias": normal(1, n)}  # noqa: E731
    block = {"attn": {"qkv": kernel(64, 192), "proj": kernel(64, 64)}}
    params = rotate({"blocks": {"0": block}}, match="blocks/0/attn/proj")
    rule = RECIPES["w8a8"].rules[0]
    int8 = dataclasses.replace(RECIPES["w8a8"], rules=(dataclasses.replace(rule, match=".*/qkv"),))
    done = quantize(params, int8)
    assert jax.tree.structure(fold(done)) == jax.tree.structure(done)
    compressed = {"blocks": {"0": {"attn": params["blocks"]["0"]["attn"] | {"sr": {}}}}}
    mask = fold(compressed)["blocks"]["0"]["attn"]["proj"]["kernel"].mask
    assert mask is not None
