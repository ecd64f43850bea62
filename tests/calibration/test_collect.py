"""Whole runs: the sampler's own inputs, halves and ranges against NumPy; cut and resumed runs."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lowbit_jax.calibration.collect import Run, collect
from lowbit_jax.calibration.drivers import (
    caption_sample,
    dit_run,
    dit_sample,
    flux_run,
    flux_sample,
    pixart_run,
    video_run,
)
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.calibration.statistics import StatisticsError
from lowbit_jax.models.dit import DiTTransformer
from lowbit_jax.models.flux import FluxTransformer
from lowbit_jax.models.pixart import PixArtTransformer
from lowbit_jax.models.stdit3 import STDiT3Transformer
from lowbit_jax.pipelines import dit as dit_pipeline
from lowbit_jax.pipelines.video import Shot
from lowbit_jax.quant.stacks import layer_paths
from lowbit_jax.samplers import ddim, ddpm
from lowbit_jax.samplers.dpm_solver import PIXART_SCHEDULE
from lowbit_jax.samplers.flow_euler import FlowSchedule, euler_steps
from lowbit_jax.samplers.flow_euler import sample as flow_sample
from lowbit_jax.samplers.guidance import OPENSORA_1_2, PIXART
from lowbit_jax.samplers.rectified_flow import RectifiedFlowSchedule
from tests.references import dit_files, flux_files, pixart_files, stdit3_files
from tests.references.calibration import linear_inputs, random_params

HALVES = TimestepRanges.from_pairs([(0, 500), (501, 1000)])
DIT = DiTTransformer(dataclasses.replace(dit_files.TINY, depth=2))
SIDE = DIT.config.sample_size
LABELS = (3, 7, 0)


@pytest.fixture(scope="module")
def params():
    x = np.zeros((1, DIT.config.in_channels, SIDE, SIDE), np.float32)
    return random_params(DIT, x, np.zeros(1, np.float32), np.zeros(1, np.int32))


def noise(seed, channels=DIT.config.in_channels, size=(SIDE, SIDE)):
    return np.random.default_rng(seed).standard_normal((1, channels, *size), np.float32)


def guided(**changes):
    steps = ddim.DIT_SCHEDULE.steps(3)
    return dit_run(DIT, steps, HALVES, scale=4.0, **changes)


def samples(run, keys=(None,) * 3, labels=LABELS):
    for seed, (label, key) in enumerate(zip(labels, keys, strict=True)):
        yield dit_sample(run, noise(seed), np.int32([label]), key)


def assert_identical(found, expected):
    """To the bit, and everything that is not an array too."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_guided_run_is_the_sum_over_its_steps(params):
    """The inputs of step i from the pipeline cut after i steps; sums in NumPy, half by half."""
    run = guided(grams="blocks/1/mlp/fc2")
    found = collect(run, params, samples(run))
    assert found.halves == ("conditional", "unconditional") and found.samples == 3
    assert sorted(found.layers) == sorted(layer_paths(params))

    shape = (2, len(HALVES))
    rows = {path: np.empty(shape, object) for path in found.layers}
    for seed, label in enumerate(LABELS):
        labels = np.int32([label, DIT.config.num_classes])
        for i, t in enumerate(run.steps.timestep):
            x = noise(seed)
            if i:
                cut = jax.tree.map(lambda leaf, i=i: leaf[:i], run.steps)
                x = dit_pipeline.sample_latents(DIT, params, x, labels[:1], cut, scale=4.0)
            both = np.concatenate([x, x])
            inputs = linear_inputs(DIT, params, both, np.full(2, t, np.float32), labels)
            r = 0 if t <= 500 else 1
            for path, (seen,) in inputs.items():
                for half, part in enumerate(np.split(seen, 2)):
                    before = rows[path][half, r]
                    rows[path][half, r] = part if before is None else np.concatenate([before, part])

    for path, layer in found.layers.items():
        for at in np.ndindex(shape):
            seen = rows[path][at]
            assert layer.count[at] == len(seen), path
            size = np.abs(seen).max()
            expect = {
                "absmax": (np.abs(seen).max(0), size),
                "mean": (seen.mean(0), size),
                "second_moment": ((seen**2).mean(0), size**2),
            }
            for name, (values, scale) in expect.items():
                error = np.abs(getattr(layer, name)[at] - values).max()
                assert error < 1e-4 * scale, (path, at, name)
    everything = np.concatenate(list(rows["blocks/1/mlp/fc2"].flat))
    gram = everything.T @ everything
    assert np.abs(found.layers["blocks/1/mlp/fc2"].gram - gram).max() < 1e-4 * np.abs(gram).max()
    assert [path for path, layer in found.layers.items() if layer.gram is not None] == [
        "blocks/0/mlp/fc2",  # one program for all layers of the stack
        "blocks/1/mlp/fc2",
    ]


def test_the_halves_differ_where_the_label_enters_and_only_there(params):
    found = collect(guided(), params, samples(guided())).layers
    same = {name for name, layer in found.items() if np.array_equal(*layer.absmax)}
    assert same == {"x_embedder/proj", "t_embedder/in_layer", "t_embedder/out_layer"}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_is_one_run(params, cut):
    """`keep` gave what a run that died after `cut` samples leaves."""
    run, kept = guided(grams=".*/fc1"), []
    whole = collect(run, params, samples(run), keep=kept.append)
    assert [part.samples for part in kept] == [1, 2, 3]
    resumed = collect(run, params, samples(run), resume=kept[cut - 1])
    assert_identical(resumed, whole)
    assert_identical(kept[-1], whole)


def test_how_samples_are_handed_over_does_not_matter(params):
    run = guided()
    whole = collect(run, params, list(samples(run)))
    first = collect(run, params, list(samples(run))[:1])
    assert_identical(collect(run, params, samples(run), resume=first), whole)
    assert first.digest != whole.digest


def test_resuming_something_else_is_refused(params):
    run = guided()
    first = collect(run, params, list(samples(run))[:2])
    others = samples(run, labels=(3, 6, 0))
    with pytest.raises(StatisticsError, match="other parameters, settings or samples"):
        collect(run, params, others, resume=first)
    changed = jax.tree.map(lambda leaf: leaf * 1.5, params)
    with pytest.raises(StatisticsError, match="other parameters"):
        collect(run, changed, samples(run), resume=first)
    one = jax.tree.map(np.array, params)  # the last layer of one stacked kernel
    one["blocks"]["0"]["mlp"]["fc2"]["kernel"][1] += 1
    with pytest.raises(StatisticsError, match="other parameters"):
        collect(run, one, samples(run), resume=first)
    other = dataclasses.replace(run, scale=5.0)
    with pytest.raises(StatisticsError, match="settings"):
        collect(other, params, samples(run), resume=first)
    wider = dataclasses.replace(run, ranges=TimestepRanges((0, 400, 1000)))
    with pytest.raises(StatisticsError, match="ranges"):
        collect(wider, params, samples(run), resume=first)
    with pytest.raises(StatisticsError, match="1 samples were given, 2 are in `resume`"):
        collect(run, params, list(samples(run))[:1], resume=first)


def test_noise_of_the_steps_comes_from_each_samples_key(params):
    """DDPM: a sample's figures do not depend on which samples came before it."""
    run = dit_run(DIT, ddpm.DIT_SCHEDULE.steps(3), HALVES)
    assert run.halves == ("all",)
    keys = jax.random.split(jax.random.key(1), 3)
    all_three = list(samples(run, keys))
    parts = [collect(run, params, [one]) for one in all_three]
    whole = collect(run, params, all_three)
    for name, layer in whole.layers.items():
        top = np.max([part.layers[name].absmax for part in parts], axis=0)
        np.testing.assert_array_equal(layer.absmax, top)
        np.testing.assert_allclose(
            layer.squares, sum(part.layers[name].squares for part in parts), rtol=1e-12
        )
    again = collect(run, params, [all_three[0]._replace(key=keys[1])])
    assert not np.array_equal(
        again.layers["x_embedder/proj"].total, parts[0].layers["x_embedder/proj"].total
    )
    with pytest.raises(ValueError, match="steps that add noise need one"):
        collect(run, params, samples(run))


def test_nan_names_the_layer(params):
    run = dit_run(DIT, ddim.DIT_SCHEDULE.steps(2))
    with pytest.raises(StatisticsError, match="blocks/0/adaLN_modulation: its input holds NaN"):
        collect(run, params, [dit_sample(run, noise(0), np.int32([99]), None)])


def test_no_samples(params):
    with pytest.raises(StatisticsError, match="0 samples were given"):
        collect(guided(), params, [])


def test_ranges_that_do_not_fit_the_steps():
    with pytest.raises(ValueError, match=r"no timestep of .* falls into \(990, 1000\]"):
        dit_run(DIT, ddim.DIT_SCHEDULE.steps(3), TimestepRanges((0, 990, 1000)))
    with pytest.raises(ValueError, match="lie outside the ranges, 0 to 1"):
        dit_run(DIT, ddim.DIT_SCHEDULE.steps(3), TimestepRanges((0, 1)))
    with pytest.raises(ValueError, match="give both"):
        dataclasses.replace(guided(), scale=None)


def test_one_program_for_all_steps_and_samples(params):
    traces = []

    def denoise(apply, x, t, labels):
        traces.append(t.shape)
        return apply(x, t, labels)

    run = dataclasses.replace(guided(), denoise=denoise)
    collect(run, params, samples(run))
    assert traces == [(2,)]


@pytest.mark.slow
def test_pixart_is_calibrated_as_its_pipeline_samples():
    """The first step's inputs are known: both halves see the noise, each its own caption."""
    config = dataclasses.replace(pixart_files.TINY, compressed_layers=(2,))
    model = PixArtTransformer(config)
    start = noise(0, config.in_channels, (4, 6))
    rng = np.random.default_rng(1)
    texts = rng.standard_normal((2, 1, 5, config.caption_channels), np.float32)
    mask = np.int32([[1, 1, 1, 0, 0]])
    sizes = np.float32([[32, 48]]), np.float32([32 / 48])
    weights = random_params(model, start, np.zeros(1, np.float32), texts[0], mask, *sizes)
    steps = jax.tree.map(lambda leaf: leaf[:1], PIXART_SCHEDULE.steps(20))
    run = pixart_run(model, steps)
    one = caption_sample(run, weights, start, (texts[0], mask), (texts[1], mask))
    found = collect(run, weights, [one])
    assert found.halves == ("unconditional", "conditional") and PIXART.order.startswith("uncond")
    for half, text in enumerate(texts[::-1]):
        inputs = (start, steps.timestep.astype(np.float32), text, mask, *sizes)
        for path, (rows,) in linear_inputs(model, weights, *inputs).items():
            layer = found.layers[path]
            assert layer.count[half, 0] == len(rows), path
            error = np.abs(layer.second_moment[half, 0] - (rows**2).mean(0)).max()
            assert error < 1e-4 * (rows**2).mean(0).max(), path


@pytest.mark.slow
def test_a_video_is_calibrated_as_its_pipeline_samples():
    """As above; times of STDiT3's rectified flow run to 1000 and need not be whole."""
    model = STDiT3Transformer(stdit3_files.TINY)
    start = noise(0, model.config.in_channels, (2, 4, 6))
    rng = np.random.default_rng(1)
    texts = rng.standard_normal((2, 1, 7, model.config.caption_channels), np.float32)
    mask = np.int32([[1, 1, 1, 0, 0, 0, 0]])
    shot = Shot(fps=24, height=32, width=48)
    numbers = [np.float32([value]) for value in shot]
    weights = random_params(model, start, np.zeros(1, np.float32), texts[0], mask, *numbers)
    schedule = RectifiedFlowSchedule()
    steps = schedule.steps(3, height=32, width=48, num_frames=1)
    assert steps.timestep[0] == 1000 and steps.timestep[1] % 1 != 0
    steps = jax.tree.map(lambda leaf: leaf[1:2], steps)
    run = video_run(model, steps, guidance=OPENSORA_1_2, shot=shot)
    one = caption_sample(run, weights, start, (texts[0], mask), (texts[1], mask))
    found = collect(run, weights, [one])
    for half, text in enumerate(texts):
        inputs = (start, steps.timestep, text, mask, *numbers)
        for path, (rows,) in linear_inputs(model, weights, *inputs).items():
            layer = found.layers[path]
            assert layer.count[half, 0] == len(rows), path
            error = np.abs(layer.second_moment[half, 0] - (rows**2).mean(0)).max()
            assert error < 1e-4 * (rows**2).mean(0).max(), path
    with pytest.raises(ValueError, match="was given no shot"):
        collect(video_run(model, steps, guidance=OPENSORA_1_2), weights, [one])


def test_a_bar_is_shown_where_there_is_a_console(params):
    run, text = guided(), io.StringIO()
    collect(run, params, samples(run), console=Console(file=text, force_terminal=True))
    assert "calibrating" in text.getvalue()


def test_flux_of_a_distilled_guidance():
    model = FluxTransformer(flux_files.TINY)
    config, rng = model.config, np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((1, *shape), np.float32)  # noqa: E731
    start, txt, pooled = draw(6, 8), draw(5, config.context_in_dim), draw(config.vec_in_dim)
    guidance = np.float32([3.5])
    ids = np.zeros((6, 3), np.float32), np.zeros((5, 3), np.float32)
    weights = random_params(model, start, txt, guidance, pooled, *ids, guidance)
    sigmas = FlowSchedule().sigmas(4, 6)
    run = flux_run(model, sigmas, TimestepRanges((0, 0.5, 1)), grid=(2, 3))
    found = collect(run, weights, [flux_sample(start, txt, pooled, guidance)])
    layers = found.layers
    np.testing.assert_array_equal(layers["single_blocks/2/linear2"].count, [[22, 22]])
    np.testing.assert_allclose(layers["txt_in"].mean[0, 1], txt[0].mean(0), atol=1e-6)
    np.testing.assert_allclose(layers["vector_in/in_layer"].absmax[0, 0], np.abs(pooled[0]))


def test_euler_as_steps_is_the_closed_form():
    """dx/dt = -x from 1 to 0 in n steps of Euler: x (1 + dt)^n, and nothing is doubled."""
    sigmas = np.linspace(1, 0, 6, dtype=np.float32)
    steps = euler_steps(sigmas)
    np.testing.assert_array_equal(steps.timestep, sigmas[:-1])
    out = flow_sample(lambda x, t: -x, jnp.ones((2, 3, 4)), sigmas)
    np.testing.assert_allclose(out, 1.2**5, rtol=1e-6)


def test_a_model_that_is_in_no_registry():
    with pytest.raises(ValueError, match="none of the registry's networks"):
        Run(
            model=type("Other", (DiTTransformer,), {})(DIT.config),
            denoise=lambda apply, x, t, c: apply(x, t, c),
            steps=ddim.DIT_SCHEDULE.steps(2),
            ranges=TimestepRanges((0, 1000)),
        )
