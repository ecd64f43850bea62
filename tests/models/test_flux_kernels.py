"""A quantised FLUX on the kernels: the same velocity as in plain XLA, and on CUDA nothing else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.flux import FluxConfig, FluxTransformer, abstract_params, image_ids, text_ids
from lowbit_jax.quant import RECIPES, quantize
from pallas_kernels import api

CONFIG = FluxConfig(
    in_channels=8,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=128,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(16, 24, 24),
)
NAMES = ("w8a8", "w4a8", "w4a16", "flux-1.58bit", "flux-1.58bit-a8")


def inputs(config, batch=2, grid=(3, 5), text=7):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    tokens = grid[0] * grid[1]
    return dict(
        img=normal(batch, tokens, config.in_channels),
        txt=normal(batch, text, config.context_in_dim),
        timestep=jnp.linspace(0.9, 0.1, batch),
        pooled=normal(batch, config.vec_in_dim),
        img_ids=image_ids(*grid),
        txt_ids=text_ids(text),
        guidance=jnp.full(batch, 3.5),
    )


@pytest.fixture(scope="module")
def params():
    shapes = abstract_params(CONFIG)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, leaf: 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)  # noqa: E731
    return jax.tree.unflatten(tree, [draw(*pair) for pair in zip(keys, leaves, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ("w8a8", "w4a16", "flux-1.58bit-a8"))
def test_the_kernels_give_the_velocity_of_plain_xla(name, params, monkeypatch):
    """bfloat16 activations: float32 in the fused steps where XLA's plain forms round in between."""
    weights = quantize(params, RECIPES[name])
    model, x = FluxTransformer(CONFIG, jnp.bfloat16), inputs(CONFIG)
    plain = np.asarray(jax.jit(model.apply)({"params": weights}, **x), np.float32)
    monkeypatch.setattr(api, "dispatch", lambda kernel, _, __, *args: kernel(*args, interpret=True))
    fused = np.asarray(jax.jit(model.apply)({"params": weights}, **x), np.float32)
    assert np.abs(fused - plain).max() < 0.03 * np.abs(plain).max()


@pytest.mark.parametrize("name", NAMES)
def test_on_cuda_no_quantised_matrix_leaves_the_kernels(name, lower_for_cuda):
    """At FLUX's own width: every product of codes is a kernel, nothing is unpacked outside."""
    config = FluxConfig(depth=1, depth_single_blocks=1)
    weights = jax.eval_shape(lambda: quantize(zeros(abstract_params(config)), RECIPES[name]))
    model = FluxTransformer(config, jnp.bfloat16)
    text = lower_for_cuda(model.apply, {"params": weights}, **inputs(config, 1, (8, 8), 64))
    found = set(re.findall(r'name = "(\w+)"', text))
    format = {"w8a8": "int8", "w4a8": "int4", "w4a16": "int4"}.get(name, "ternary")
    rows = {"identity_quantize_rows", "modulate_quantize_rows", "gelu_quantize_rows"}
    assert found == {f"{format}_matmul"} | (rows if name.endswith("a8") else set())
    products = [line for line in text.splitlines() if "= stablehlo.dot_general" in line]
    assert products and not [line for line in products if "xi8>" in line or "xui8>" in line]
    stored = {"int8": "i8"}.get(format)
    for n, k in ((9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)):
        types = set(re.findall(rf"tensor<(?:1x)?{n}x{k}x(\w+)>", text))
        assert types <= {stored}, f"{n} x {k} unpacked as {types}"


def zeros(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
