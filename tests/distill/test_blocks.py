"""Block-wise reconstruction of a small FLUX: it starts right, it learns, it can be interrupted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.calibration import drivers
from lowbit_jax.calibration.collect import collect
from lowbit_jax.distill import blocks, latent
from lowbit_jax.distill.train import DivergedError, Options
from lowbit_jax.distill.trajectories import Trajectories, record
from lowbit_jax.distill.velocity import velocity_loss
from lowbit_jax.models.flux import FluxConfig, FluxTransformer, abstract_params
from lowbit_jax.quant import RECIPES
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import Recipe, Rule
from lowbit_jax.quant.stacks import iter_layers
from lowbit_jax.quant.transform import quantize

CONFIG = FluxConfig(
    in_channels=4,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=16,
    num_heads=1,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
    guidance_embed=False,
)
SIGMAS = np.array([1.0, 0.7, 0.4, 0.0], np.float32)
RUN = drivers.flux_run(FluxTransformer(CONFIG), SIGMAS, grid=(2, 2))
# one kind of block compiles faster; its stack begins the model
SINGLE = dataclasses.replace(CONFIG, depth=0)
SINGLE_RUN = drivers.flux_run(FluxTransformer(SINGLE), SIGMAS, grid=(2, 2))
TERNARY = Recipe(name="ternary", rules=RECIPES["flux-1.58bit"].rules)
OPTIONS = Options(steps=60, learning_rate=3e-3, batch=8, warmup=5)


def example_samples():
    rng, shapes = np.random.default_rng(1), ((1, 4, 4), (1, 3, 10), (1, 6))
    return [
        drivers.flux_sample(*(rng.standard_normal(shape, np.float32) for shape in shapes))
        for _ in range(24)
    ]


def make(config, run):
    leaves, structure = jax.tree.flatten(abstract_params(config, jnp.float32))
    rng = np.random.default_rng(0)
    params = structure.unflatten([0.25 * rng.standard_normal(x.shape, np.float32) for x in leaves])
    shards = list(record(run, params, example_samples(), size=8))
    whole = jax.tree.structure((0, 0, None))
    return params, quantize(params, TERNARY), Trajectories(shards[:2], whole), shards[2], whole


@pytest.fixture(scope="module")
def example():
    return make(CONFIG, RUN)


@pytest.fixture(scope="module")
def single():
    return make(SINGLE, SINGLE_RUN)[:3]


def error(params, quantized, shard, whole):
    """Velocity error on trajectories that were not trained on."""
    data = Trajectories([shard], whole)
    return float(jax.jit(velocity_loss(RUN))(quantized, data.take(range(24))))


@pytest.mark.slow
def test_it_learns_without_seeing_what_it_is_judged_by(example):
    params, quantized, data, shard, whole = example
    found = blocks.reconstruct(RUN, params, quantized, data, OPTIONS, rows=48)
    assert list(found.fits) == ["double_blocks/0", "single_blocks/0", "single_blocks/1"]
    for name, fit in found.fits.items():
        assert fit.losses[-10:].mean() < 0.8 * fit.losses[:3].mean(), name
    before, after = (error(params, tree, shard, whole) for tree in (quantized, found.params))
    assert after < 0.7 * before
    assert jax.tree.structure(found.params) == jax.tree.structure(quantized)
    for outside in ("img_in", "txt_in", "time_in", "vector_in", "final_layer"):
        jax.tree.map(np.testing.assert_array_equal, found.params[outside], params[outside])


@pytest.mark.slow
def test_feedback_block_by_block(example):
    """The first block's Hessians are those of calibration; later ones see quantised inputs."""
    params, _, data, shard, whole = example
    weights = TERNARY.rules[0].weights
    few = Recipe(name="few", rules=(Rule(match=".*/(img_attn/qkv|linear1)", weights=weights),))
    found = blocks.feedback_blocks(RUN, params, few, data, rows=48)
    plain = quantize(params, few)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    assert error(params, found, shard, whole) < 0.8 * error(params, plain, shard, whole)
    watched = dataclasses.replace(RUN, grams=few.rules[0].match)
    layers = collect(watched, params, example_samples()[:16]).layers  # all that `data` has
    grams = {path: layer.gram for path, layer in layers.items() if layer.gram is not None}
    parallel = quantize(params, few.with_feedback(), grams=grams)
    pairs = zip(iter_layers(found), iter_layers(parallel), strict=True)
    agree = {
        path: np.mean(np.asarray(a.unpacked()) == np.asarray(b.unpacked()))
        for (path, a, _), (_, b, _) in pairs
        if isinstance(a, QTensor)
    }
    assert len(agree) == 3
    for path, share in agree.items():  # float32 sums may turn a code
        assert (share > 0.97) == (path == "double_blocks/0/img_attn/qkv"), agree
    with pytest.raises(ValueError, match="outside the blocks"):
        everything = Recipe(name="all", rules=(Rule(match=".*", weights=weights),))
        blocks.feedback_blocks(RUN, params, everything, data, rows=9)


def test_each_block_is_judged_by_the_float_model(single):
    """With the float blocks as students and almost no learning, every loss is almost zero."""
    params, quantized, data = single
    still = Options(steps=2, learning_rate=1e-9, batch=8)
    same = blocks.reconstruct(SINGLE_RUN, params, params, data, still, rows=9, trained=".*/bias")
    assert len(same.fits) == 2
    assert all((fit.losses < 1e-8).all() for fit in same.fits.values())
    off = blocks.reconstruct(SINGLE_RUN, params, quantized, data, still, rows=9)
    assert all((fit.losses > 1e-2).all() for fit in off.fits.values())
    start = latent.tensors(latent.latents(params, quantized))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), off.params, start)


def test_an_interrupted_call_is_gone_on_with(single, tmp_path):
    params, quantized, data = single
    options = Options(steps=6, learning_rate=3e-3, batch=8, warmup=2)
    whole = blocks.reconstruct(SINGLE_RUN, params, quantized, data, options, rows=40)
    given = (SINGLE_RUN, params, quantized, data, options)
    cut = blocks.reconstruct(*given, rows=40, folder=tmp_path, minutes=0.0)
    assert all(fit.step == 0 for fit in cut.fits.values())
    again = blocks.reconstruct(*given, rows=40, folder=tmp_path)
    last = blocks.reconstruct(*given, rows=40, folder=tmp_path)  # nothing is left to do
    for found in (again, last):
        jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    assert not list(tmp_path.rglob("*.npy"))
    with pytest.raises(ValueError, match="1000 rows are asked for, 48 forwards are there"):
        blocks.reconstruct(*given, rows=1000)


def test_a_block_that_gives_nan_is_named(single):
    params, quantized, data = single
    broken = jax.tree.map(np.array, quantized)
    broken["single_blocks"]["0"]["linear2"]["bias"][1] = np.nan
    options = Options(steps=2, batch=4)
    with pytest.raises(DivergedError, match="single_blocks/1, step 0"):
        blocks.reconstruct(SINGLE_RUN, params, broken, data, options, rows=9)
