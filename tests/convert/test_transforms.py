"""Recipes that balance, rotate or take static scales: streamed, saved, exported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.__main__ import main
from convert.checkpoint_files import open_checkpoint
from convert.export import export_diffusers
from convert.job import plan
from convert.port import port
from convert.statistics import save_statistics
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.calibration.statistics import StatisticsError
from lowbit_jax.checkpoint import load
from lowbit_jax.models.registry import read_config
from lowbit_jax.quant import RECIPES, Balance, Recipe, Rule, quantize
from lowbit_jax.quant.qtensor import TransformedKernel, is_kernel
from lowbit_jax.quant.ranged import RangedKernel
from lowbit_jax.quant.recipe import RecipeError
from tests.references.calibration import random_statistics
from tests.references.dit_files import TINY, write_source

CONFIG = dataclasses.replace(TINY, depth=1)
HALVES = TimestepRanges((0, 500, 1000))
FLOAT = Recipe(
    name="balanced and rotated",
    rules=(Rule(match=r"blocks/.*", weights=None, balance=Balance(alpha=0.3), rotation="full"),),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("dit"), CONFIG, dtype=np.float32)


@pytest.fixture(scope="module")
def params(source):
    return port(source, dtype=jnp.float32).params


@pytest.fixture(scope="module")
def statistics(params, source):
    fields = port(source, dtype=jnp.float32).config
    found = random_statistics(params, config=json.dumps(fields), ranges=HALVES)
    rng, layers = np.random.default_rng(3), {}
    for name, layer in found.layers.items():
        k = layer.absmax.shape[-1]
        x = rng.standard_normal((2 * k, 5)) @ rng.standard_normal((5, k))
        x += rng.standard_normal((2 * k, k))
        layers[name] = dataclasses.replace(layer, gram=x.T @ x)
    return dataclasses.replace(found, layers=layers)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(RECIPES["viditq-w4a8"], marks=pytest.mark.slow),
        pytest.param(RECIPES["viditq-v1-w4a8"], marks=pytest.mark.slow),
        RECIPES["naive-w8a8"],
        FLOAT,
    ],
    ids=lambda r: r.name,
)
def test_streamed_is_quantised_at_once(source, params, statistics, recipe):
    """Rows rotated some at a time have other last bits: codes may differ by one at a tie."""
    found = port(source, recipe, dtype=jnp.float32, statistics=statistics).params
    expected = quantize(params, recipe, statistics)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == jnp.uint8:
            # a tie that falls otherwise leads error feedback elsewhere
            assert (np.asarray(a) != np.asarray(b)).mean() < 0.05
        else:
            size = max(1e-6, float(jnp.abs(b).max()))
            atol = 1 if a.dtype == jnp.int8 else 1e-5 * size
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
    treated = lambda leaf: is_kernel(leaf) or isinstance(leaf, RangedKernel)  # noqa: E731
    assert sum(map(treated, jax.tree.leaves(found, is_leaf=treated))) == 5


@pytest.mark.slow
def test_the_command_line_from_statistics_to_a_folder_and_back(
    tmp_path, source, params, statistics, capsys
):
    stats = save_statistics(tmp_path / "stats.safetensors", statistics)
    out = str(tmp_path / "out")
    arguments = [str(source), "--recipe", "viditq-w8a8", "--dtype", "f32", "--out", out]
    assert main(arguments) == 2
    assert "recipe 'viditq-w8a8' needs statistics" in capsys.readouterr().err
    assert main([*arguments, "--stats", str(stats)]) == 0
    assert "int8 activations, masked, rotated" in " ".join(capsys.readouterr().out.split())
    saved = load(out)
    assert saved.recipe == RECIPES["viditq-w8a8"]
    assert saved.manifest["statistics"]["samples"] == 1
    kernel = saved.params["blocks"]["0"]["mlp"]["fc2"]["kernel"]
    assert (kernel.rotation, kernel.mask.shape) == (64, (1, 320))
    # resumed with other statistics: another conversion
    other = dataclasses.replace(statistics, samples=2)
    other = save_statistics(tmp_path / "other.safetensors", other)
    assert main([*arguments, "--stats", str(other), "--resume"]) == 2
    # the way back undoes mask and rotation
    config = read_config(saved.model, saved.config)
    export_diffusers(tmp_path / "dit", saved.params, "dit", config, dtype=jnp.float32)
    name = "transformer_blocks.0.ff.net.2.weight"
    file = next((tmp_path / "dit").glob("*.safetensors"))
    back, weight = load_file(file)[name], np.asarray(params["blocks"]["0"]["mlp"]["fc2"]["kernel"])
    error = np.linalg.norm(back - weight[0].T) / np.linalg.norm(weight)
    assert 1e-4 < error < 0.05


def test_a_plan_counts_masks(source, statistics):
    with open_checkpoint(source) as checkpoint:
        job = plan(checkpoint, RECIPES["smoothquant-w4a8"], statistics=statistics)
        sizes = job.sizes()
    found = port(source, RECIPES["smoothquant-w4a8"], statistics=statistics)
    assert sizes.after == sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))
    kernels = [k for k in jax.tree.leaves(found.params, is_leaf=is_kernel) if is_kernel(k)]
    masks = sum(k.mask.nbytes for k in kernels if k.mask is not None)
    assert masks == 4 * (80 + 80 + 80 + 320)  # qkv, proj, fc1, fc2: float32 for each input


def test_a_transformed_model_is_saved_and_exported(tmp_path, source, params, statistics):
    found = port(source, FLOAT, dtype=jnp.float32, statistics=statistics)
    kernel = found.params["blocks"]["0"]["attn"]["qkv"]["kernel"]
    assert isinstance(kernel, TransformedKernel) and kernel.rotation == 80
    config = read_config(found.model, found.config)
    export_diffusers(tmp_path / "dit", found.params, "dit", config, dtype=jnp.float32)
    back = port(tmp_path / "dit", dtype=jnp.float32).params
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_statistics_that_do_not_belong_are_refused(source, params, statistics, tmp_path):
    def planned(recipe, statistics):
        with open_checkpoint(source) as checkpoint:
            plan(checkpoint, recipe, statistics=statistics)

    with pytest.raises(RecipeError, match="recipe 'w8a8' needs no statistics"):
        planned(RECIPES["w8a8"], statistics)
    layers = dict(statistics.layers)
    layers["blocks/9/mlp/fc1"] = layers.pop("blocks/0/mlp/fc1")
    wrong = dataclasses.replace(statistics, layers=layers)
    with pytest.raises(StatisticsError, match="blocks/9/mlp/fc1: the model has no such linear"):
        planned(RECIPES["viditq-w8a8"], wrong)
    file = save_statistics(tmp_path / "s", dataclasses.replace(statistics, model="latte"))
    with pytest.raises(ValueError, match="model 'latte', not 'dit'|metadata"):
        planned(RECIPES["viditq-w8a8"], file)
