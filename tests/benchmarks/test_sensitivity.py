"""Subjects of scans sample what their pipelines do; tables tell decoupled measures from others."""

from functools import partial

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import sensitivity_subjects
from benchmarks.mixed_precision import allocations
from benchmarks.sensitivity import agreement_table, kinds_table
from benchmarks.sensitivity_subjects import Draw, moving_nouns_subject
from benchmarks.video_samples import Prompts
from lowbit_jax.evaluation import moving_nouns
from lowbit_jax.models.stdit import STDiTConfig, abstract_params
from lowbit_jax.quant.recipe import WeightSpec
from lowbit_jax.samplers import loop
from tests.references.scenes import made_up_scene
from tests.references.sensitivity import scan_file

CONFIG = STDiTConfig(
    input_size=(2, 4, 4),
    in_channels=3,
    hidden_size=128,
    depth=3,
    num_heads=2,
    caption_channels=8,
    null_caption_length=3,
)
MENU = (
    WeightSpec(format="int4", quantizer="absmax"),
    WeightSpec(format="int8", quantizer="absmax"),
)
GROUPS = {"attn": "quality", "mlp": "quality", "attn_temp": "time", "cross_attn": "text"}


def text(table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_scan_samples_what_the_pipeline_does(monkeypatch):
    """The shipped video model, on made-up sprites and captions; scores are of those captions."""
    rng, scene = np.random.default_rng(0), made_up_scene()
    attrs = moving_nouns.sample_attrs(rng, 3, scene)
    states = rng.standard_normal((3, 32, 384)).astype(np.float32)
    prompts = Prompts(["", "", ""], attrs, states)
    monkeypatch.setattr(sensitivity_subjects.moving_nouns, "load_scene", lambda: scene)
    monkeypatch.setattr(sensitivity_subjects.video_samples, "load_prompts", lambda count: prompts)
    subject = moving_nouns_subject(Draw(captions=range(1, 3), batch=1, steps=2, seed=0))

    @jax.jit
    def step(params, state, now, conditions):
        apply = partial(subject.run.model.apply, {"params": params})
        return subject.run.advance(apply, state, now, conditions, None)

    finals = []
    for sample in subject.samples:
        state = loop.start(sample.noise, subject.run.steps)
        for now in subject.run.each_step():
            state = step(subject.saved.params, state, now, sample.conditions)
        finals.append(np.asarray(state[0]))
    found = np.concatenate(finals)
    expected = subject.sample(subject.saved.params)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert subject.decode(expected).shape == (2, 8, 32, 32, 3)
    scores = subject.scores(
        moving_nouns.to_latent(moving_nouns.clips(scene, attrs[1:]) / 127.5 - 1)
    )
    best = {"text": 1, "quality": 60, "time": 60, "motion": 1, "exact": 60}
    assert {name: values.tolist() for name, values in scores.items()} == {
        name: pytest.approx([value] * 2) for name, value in best.items()
    }


@pytest.mark.parametrize("captions", [range(0), range(3), range(126, 130)])
def test_captions_that_do_not_come_out_even_are_refused(captions):
    with pytest.raises(ValueError, match="must be a multiple of the batch"):
        Draw(captions=captions, batch=2, steps=1, seed=0).parts()


@pytest.fixture(scope="module")
def decoupled(tmp_path_factory):
    """Each metric sees its own kinds of units alone, and quality sees what MSE does."""

    def harm(measure, unit, bits):
        number = {"attn": 1, "mlp": 4, "attn_temp": 7, "cross_attn": 10}[unit.kind] + unit.block
        sees = measure in ("mse", GROUPS[unit.kind])
        return (number if sees else 1e-3 * (13 - number)) * 4.0**-bits

    path = tmp_path_factory.mktemp("scan") / "scan.jsonl"
    shapes = abstract_params(CONFIG)
    return scan_file(path, "stdit", CONFIG, shapes, harm, menu=MENU, act_bits=())


def test_tables_tell_what_decouples(decoupled):
    agreement = {
        line[:32].strip(): [float(value) for value in line.split()[-2:]]
        for line in text(agreement_table(decoupled)).splitlines()
        if " - " in line
    }
    assert len(agreement) == 9 and all(a == b for a, b in agreement.values())
    alone = ("quality, its 6 units", "time, its 3 units", "text, its 3 units")
    assert [agreement[f"mse - {group}"][0] for group in alone] == [1, 1, 1]
    assert agreement["mse - quality"][0] < 0 < agreement["mse - text"][0]
    lines = [line.split() for line in text(kinds_table(decoupled, 0)).splitlines()]
    measures = next(line for line in lines if line[:1] == ["units"])[3:]
    shares = {line[0]: line[1:] for line in lines if line and line[0] in GROUPS}
    for kind, metric in GROUPS.items():
        assert shares[kind][0] == metric
        seen = {name: int(share) for name, share in zip(measures, shares[kind][1:], strict=True)}
        assert seen.pop("mse") > 0
        assert seen.pop(metric) == (40 if kind == "attn" else 100)  # 2 of 5
        assert set(seen.values()) == {0}


def test_levels_everywhere_stand_beside_both_schemes(decoupled):
    found = dict(allocations(decoupled, (7.0,)))
    assert list(found) == ["all 4", "all 8", "mse 7", "metric 7"]
    assert {len(set(found[name].levels)) for name in ("all 4", "all 8")} == {1}
    sizes = [made.sizes.after for made in found.values()]
    assert sizes[0] < sizes[2] <= sizes[1]
    assert found["metric 7"].sizes.bits_per_weight <= 7
