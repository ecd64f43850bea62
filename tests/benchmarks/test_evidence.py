"""The bench of evidence on a model of one linear: what it keeps, counts, resumes and prints."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import evidence
from benchmarks.evidence import Bench, Outcome, Subject
from benchmarks.evidence_report import beats, markdown, save_grid, save_plot, table
from benchmarks.viditq import ladder
from lowbit_jax import ops
from lowbit_jax.quant.recipe import RECIPES, Recipe, Rule, WeightSpec

INT4 = Recipe(
    name="int4",
    rules=(Rule(match="paint", weights=WeightSpec(format="int4", quantizer="absmax")),),
)


@pytest.fixture
def subject():
    """Pictures 4 x 4 that are a linear function of captions; the judge asks for bright ones."""
    rng = np.random.default_rng(0)
    captions = rng.random((12, 16)).astype(np.float32)
    params = {"paint": {"kernel": jnp.asarray(rng.random((16, 48)).astype(np.float32) / 8)}}
    sampled = []

    def sample(params):
        sampled.append(1)
        pictures = ops.linear(jnp.asarray(captions), params["paint"]["kernel"])
        return np.clip(np.asarray(pictures).reshape(12, 4, 4, 3), 0, 1)

    made = Subject(
        name="linear",
        params=params,
        sample=sample,
        judge=lambda pictures: {"bright": pictures.mean(axis=(1, 2, 3)) > 0.4},
        accuracies=("bright",),
        calibrate=lambda: pytest.fail("no recipe here needs statistics"),
        settings={"captions": 12},
    )
    return made, sampled


@pytest.fixture
def bench(subject, tmp_path, monkeypatch):
    """The networks are left out: features are the pictures, LPIPS their mean distance."""
    flat = lambda x: np.float64(x).reshape(len(x), -1)  # noqa: E731
    monkeypatch.setattr(evidence, "see", flat)
    monkeypatch.setattr(evidence, "lpips", lambda a, b: np.abs(flat(a) - flat(b)).mean(axis=1))
    return Bench(subject[0], tmp_path)


def test_batches_are_padded_and_cut_again(monkeypatch):
    """Ten of seven and three: every pair once, in order, in one shape."""
    monkeypatch.setattr(evidence, "BATCH", 7)
    shapes = []

    def function(a, b):
        shapes.append(a.shape)
        return (a - 2 * b).sum(axis=(1, 2, 3))

    a, b = np.random.default_rng(0).random((2, 10, 4, 5, 3)).astype(np.float32)
    found = evidence._in_batches(function, a, b)
    np.testing.assert_allclose(found, (a - 2 * b).sum(axis=(1, 2, 3)), rtol=1e-5)
    assert shapes == [(7, 4, 5, 3)] * 2


def test_values_are_those_of_the_formulas(bench, subject):
    pictures, reference = bench.reference
    outcome = bench.recipe(INT4)
    found = subject[0].sample(bench.quantized(INT4))
    error = np.square(np.float64(found) - pictures).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(outcome.values["psnr"], -10 * np.log10(error), rtol=1e-6)
    np.testing.assert_array_equal(outcome.values["score"], outcome.values["bright"])
    assert np.isinf(reference.values["psnr"]).all() and reference.values["lpips"].max() == 0
    with pytest.raises(ValueError, match="12 pictures for 48 axes"):
        outcome.distance(reference)
    # int4 codes padded to 128 inputs: 64 bytes and a float32 scale for each of 48 outputs
    assert outcome.bytes == 48 * (64 + 4) and outcome.bits == 8 * outcome.bytes / (16 * 48)
    assert reference.bits == 16


def test_a_kept_result_is_found_and_other_settings_are_not(bench, subject, tmp_path):
    made, sampled = subject
    first = bench.recipe(INT4)
    count = len(sampled)
    again = Bench(made, tmp_path).recipe(INT4)
    assert len(sampled) == count
    for field in dataclasses.fields(Outcome):
        a, b = getattr(first, field.name), getattr(again, field.name)
        if field.name == "values":
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
        else:
            np.testing.assert_array_equal(a, b)
    other = dataclasses.replace(made, settings={"captions": 13})
    Bench(other, tmp_path).recipe(INT4)
    assert len(sampled) == count + 2  # the reference and the recipe


def test_reports_are_written(bench, tmp_path):
    rows = {"float": bench.reference[1], "int4": bench.recipe(INT4)}
    assert "| int4 | " in markdown(rows, "title")
    assert table(rows, "title").row_count == 2
    save_grid(tmp_path / "grid.png", rows)
    save_plot(tmp_path / "plot.png", rows, "title")
    for name in ("grid.png", "plot.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 10
    better = beats(rows["int4"], rows["int4"])
    assert better.low == better.high == 0


def test_the_ladder_changes_one_thing_at_a_time():
    steps = list(ladder().values())
    rules = [step.rules[-1] for step in steps]
    assert len({rule.weights for rule in rules[:-1]}) == 1
    changed = [
        {f.name for f in dataclasses.fields(Rule) if getattr(a, f.name) != getattr(b, f.name)}
        for a, b in zip(rules, rules[1:], strict=False)
    ]
    assert changed == [
        {"act_static"},
        {"balance"},
        {"balance", "rotation"},
        {"balance"},
        {"weights"},
    ]
    assert steps[-1].rules == RECIPES["viditq-w4a8"].rules
