"""Statistics as a file: read back to the bit; what does not belong to the model is refused."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.errors import CheckpointError
from convert.port import port
from convert.statistics import load_statistics, save_statistics
from lowbit_jax.calibration.collect import collect
from lowbit_jax.calibration.drivers import dit_run, dit_sample, flux_run, flux_sample
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.calibration.statistics import StatisticsError
from lowbit_jax.models.dit import DiTTransformer, abstract_params
from lowbit_jax.models.registry import build
from lowbit_jax.quant.stacks import layer_paths
from lowbit_jax.samplers.ddim import DIT_SCHEDULE
from lowbit_jax.samplers.flow_euler import FlowSchedule
from tests.references.calibration import random_params
from tests.references.dit_files import TINY

MODEL = DiTTransformer(dataclasses.replace(TINY, depth=2))
RANGES = TimestepRanges((0, 250, 1000))
CONFIG = dataclasses.asdict(MODEL.config)


@pytest.fixture(scope="module")
def params():
    x = np.zeros((1, 3, 8, 8), np.float32)
    return random_params(MODEL, x, np.zeros(1, np.float32), np.zeros(1, np.int32))


def run_and_samples():
    run = dit_run(MODEL, DIT_SCHEDULE.steps(2), RANGES, scale=4.0, grams="final_layer/linear")
    rng = np.random.default_rng(0)
    starts = rng.standard_normal((2, 1, 3, 8, 8), np.float32)
    return run, [dit_sample(run, start, np.int32([1]), None) for start in starts]


@pytest.fixture(scope="module")
def statistics(params):
    run, samples = run_and_samples()
    return collect(run, params, samples)


@pytest.fixture
def file(tmp_path, statistics):
    return save_statistics(tmp_path / "s.safetensors", statistics)


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(expected)]


def test_read_back(file, params, statistics):
    assert_identical(load_statistics(file, params, ranges=RANGES), statistics)
    abstract = abstract_params(MODEL.config)
    found = load_statistics(file, abstract, model="dit", config=CONFIG)
    assert_identical(found, statistics)


def test_others_can_read_it(file, statistics):
    tensors = load_file(file)
    layer = statistics.layers["blocks/1/mlp/fc2"]
    np.testing.assert_array_equal(tensors["blocks/1/mlp/fc2.absmax"], layer.absmax)
    mean = tensors["blocks/1/mlp/fc2.total"] / tensors["blocks/1/mlp/fc2.count"][..., None]
    np.testing.assert_array_equal(mean.astype(np.float32), layer.mean)


def test_a_run_that_is_cut_goes_on_from_its_file(tmp_path, params, statistics):
    run, samples = run_and_samples()
    path = tmp_path / "going.safetensors"
    keep = partial(save_statistics, path, overwrite=True)

    def dying():
        yield samples[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(run, params, dying(), keep=keep)
    first = load_statistics(path, params)
    assert first.samples == 1
    assert_identical(collect(run, params, samples, resume=first, keep=keep), statistics)
    assert_identical(load_statistics(path, params), statistics)


def changed(tensors, name, index, value):
    tensors[name][index] = value


CHANGES = {
    "NaN": (lambda t: changed(t, "x_embedder/proj.absmax", (0, 1, 0), np.nan), "x_embedder/proj"),
    "infinity": (lambda t: changed(t, "t_embedder/in_layer.total", ..., np.inf), "t_embedder/in_"),
    "a layer is missing": (
        lambda t: [
            t.pop(f"blocks/1/attn/qkv.{p}") for p in ("absmax", "total", "squares", "count")
        ],
        "blocks/1/attn/qkv: no statistics",
    ),
    "another layer": (
        lambda t: t.update({k.replace("/0/", "/2/"): v for k, v in t.items() if "/0/" in k}),
        "blocks/2/mlp/fc1: the model has no such linear",
    ),
    "another width": (
        lambda t: t.update({"final_layer/linear.absmax": np.ones((2, 2, 7), np.float32)}),
        r"final_layer/linear: absmax is float32\[2, 2, 7\], the model needs float32\[2, 2, 80\]",
    ),
    "another dtype": (
        lambda t: t.update({"final_layer/linear.count": np.ones((2, 2), np.int32)}),
        "final_layer/linear: count is int32",
    ),
    "nothing seen": (
        lambda t: changed(t, "x_embedder/proj.count", (1, 0), 0),
        r"x_embedder/proj: count is 0 \(unconditional half, range \[0, 250\]\)",
    ),
    "negative": (lambda t: changed(t, "x_embedder/proj.absmax", (0, 0, 0), -1), "is negative"),
    "an impossible moment": (
        lambda t: changed(t, "x_embedder/proj.squares", (0, 0, 0), 1e9),
        "x_embedder/proj: a second moment is .* larger",
    ),
    "an impossible mean": (
        lambda t: changed(t, "x_embedder/proj.total", (0, 0, 0), -1e9),
        "x_embedder/proj: a mean is larger",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_of_the_model_is_refused_by_name(tmp_path, file, params, statistics, change):
    edit, message = CHANGES[change]
    tensors = load_file(file)
    edit(tensors)
    with pytest.raises(StatisticsError, match=message):
        load_statistics(rewritten(tmp_path, file, tensors), params)


def rewritten(tmp_path, file, tensors, **metadata):
    """The file with other tensors or metadata, by the reference writer."""
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, {**header["__metadata__"], **metadata})
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x_embedder/proj.median": np.ones(3)}, "'x_embedder/proj.median' is none of"),
        ({"absmax": np.ones(3)}, "'absmax' is none of"),
        ({"extra.absmax": np.ones(3, np.float32)}, "extra: no total"),
    ],
)
def test_tensors_that_are_no_statistics(tmp_path, file, params, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        load_statistics(rewritten(tmp_path, file, load_file(file) | tensors), params)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "version '2'"),
        ({"format": "pt"}, "format 'pt'"),
        ({"edges": "[0, 500]"}, "do not tile"),
        ({"edges": "oops"}, "metadata: "),
        ({"model": "vgg"}, "model 'vgg' is none of"),
        ({"config": "{}x"}, "metadata: "),
        ({"more": "1"}, "metadata .*more"),
    ],
)
def test_odd_metadata(tmp_path, file, params, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        load_statistics(rewritten(tmp_path, file, load_file(file), **metadata), params)


def test_another_model_config_or_ranges(file, params):
    with pytest.raises(StatisticsError, match="of model 'dit', not 'flux'"):
        load_statistics(file, params, model="flux")
    with pytest.raises(StatisticsError, match="time_shift=1.*not.*time_shift=0"):
        load_statistics(file, params, config=CONFIG | {"time_shift": 0})
    with pytest.raises(StatisticsError, match=r"ranges \(0.0, 250.0, 1000.0\), not of \(0.0, 400"):
        load_statistics(file, params, ranges=TimestepRanges((0, 400, 1000)))
    deeper = abstract_params(dataclasses.replace(MODEL.config, depth=3))
    with pytest.raises(StatisticsError, match="blocks/2/attn/qkv: no statistics"):
        load_statistics(file, deeper)


def test_a_file_is_not_replaced_unasked(file, statistics):
    with pytest.raises(CheckpointError, match="exists already"):
        save_statistics(file, statistics)


@pytest.mark.slow
def test_the_shipped_model_end_to_end(tmp_path):
    """Files to statistics and back: each of its 40 linears, the noise itself at time 1."""
    folder = Path(__file__).parents[2] / "checkpoints" / "nouns-flux"
    shutil.copytree(folder, tmp_path / "model")
    saved = port(tmp_path / "model", dtype=jnp.float32)
    model = build(saved.model, saved.config)
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(settings).sigmas(4, 64)
    last = TimestepRanges((0, float(np.mean(sigmas[:2])), 1))  # its second range: the first step
    run = flux_run(model, sigmas, last, grid=(8, 8))
    rng = np.random.default_rng(0)
    starts = rng.standard_normal((2, 1, 64, model.config.in_channels), np.float32)
    texts = 0.3 * rng.standard_normal((2, 1, 32, model.config.context_in_dim), np.float32)
    pooled = 0.2 * rng.standard_normal((2, 1, model.config.vec_in_dim), np.float32)
    samples = [flux_sample(*parts) for parts in zip(starts, texts, pooled, strict=True)]
    path = tmp_path / "nouns.safetensors"
    found = collect(run, saved.params, samples, keep=partial(save_statistics, path, overwrite=True))

    assert sorted(found.layers) == sorted(layer_paths(saved.params)) and len(found.layers) == 40
    assert_identical(load_statistics(path, saved.params, config=saved.config), found)
    first = found.layers["img_in"]
    rows = starts.reshape(-1, starts.shape[-1]).astype(np.float64)
    np.testing.assert_array_equal(first.count, [[2 * 3 * 64, 2 * 64]])
    np.testing.assert_array_equal(first.absmax[0, 1], np.abs(rows).max(0).astype(np.float32))
    np.testing.assert_allclose(first.second_moment[0, 1], (rows**2).mean(0), rtol=1e-5)
    for name, layer in found.layers.items():
        assert (layer.mean**2 <= layer.second_moment * (1 + 1e-4) + 1e-12).all(), name
        assert (layer.absmax.max(-1) < 1e3).all() and (layer.absmax.max(-1) > 1e-3).all(), name
        tokens = {"img": 64, "txt": 32, "single_blocks": 96}
        kind = next((tokens[key] for key in tokens if key in name), 1)
        if "mod" in name or "_in/" in name:
            kind = 1
        kind = 64 if name == "final_layer/linear" else kind
        np.testing.assert_array_equal(layer.count, [[2 * 3 * kind, 2 * kind]], name)
