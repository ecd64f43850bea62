"""Scans of a small STDiT: against the integer model, in one program, cut and resumed, refused."""

import dataclasses
import io
import json

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lowbit_jax.calibration.collect import Sample
from lowbit_jax.calibration.drivers import video_run
from lowbit_jax.calibration.ranges import WHOLE, TimestepRanges
from lowbit_jax.models.stdit import STDiTConfig, STDiTTransformer
from lowbit_jax.precision.allocate import allocate
from lowbit_jax.precision.menu import level_name
from lowbit_jax.precision.problem import Request
from lowbit_jax.precision.records import MSE, Candidate, ScanError, read
from lowbit_jax.precision.scan import Scan, scan
from lowbit_jax.precision.sensitivity import load_sensitivity
from lowbit_jax.quant.recipe import Recipe, Rule, WeightSpec
from lowbit_jax.quant.transform import quantize
from lowbit_jax.samplers import ddim, loop
from lowbit_jax.samplers.guidance import OPENSORA_1_0
from tests.references.calibration import random_params

MODEL = STDiTTransformer(
    STDiTConfig(
        input_size=(2, 4, 4),
        in_channels=3,
        hidden_size=32,
        depth=2,
        num_heads=2,
        caption_channels=8,
        null_caption_length=3,
    )
)
HALVES = TimestepRanges.from_pairs([(0, 500), (501, 1000)])
MENU = (
    WeightSpec(format="int4", quantizer="absmax"),
    WeightSpec(format="int8", quantizer="absmax"),
)


def samples(count=2, batch=1):
    rng = np.random.default_rng(0)
    for _ in range(count):
        noise = rng.standard_normal((batch, 3, 2, 4, 4), np.float32)
        caption = rng.standard_normal((batch, 3, 8), np.float32), np.ones((batch, 3), bool)
        yield Sample(noise, jax.tree.map(jnp.asarray, caption))


@pytest.fixture(scope="module")
def params():
    sample = next(samples())
    return random_params(MODEL, sample.noise, np.zeros(1, np.float32), *sample.conditions)


def scorer(found, reference):
    """Each blind to something, as real ones are."""
    off = np.asarray(found - reference, np.float64).reshape(len(found), -1)
    return {
        "text": -np.abs(off.sum(1)),
        "quality": -np.square(off).mean(1),
        "time": -np.abs(np.diff(np.asarray(found), axis=2)).mean((1, 2, 3, 4)),
    }


def spec(ranges=WHOLE, **changes):
    steps = ddim.DIT_SCHEDULE.steps(3)
    run = video_run(MODEL, steps, ranges, guidance=OPENSORA_1_0, scale=None)
    options = {"scorer": scorer, "scorer_name": "test", "menu": MENU, "act_bits": (4,)}
    return Scan(run=run, **(options | changes))


class Counted:
    """A scorer that notes how often jax has traced and lowered programs, candidate by candidate."""

    def __init__(self):
        self.lowered, self.traced, self.seen = 0, 0, []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event, duration, **_):
        self.lowered += event == "/jax/core/compile/jaxpr_to_mlir_module_duration"

    def __call__(self, found, reference):
        self.seen.append(self.lowered)
        return scorer(found, reference)


@pytest.fixture(scope="module")
def whole(params, tmp_path_factory):
    """A scan with two ranges: its file, what it counted and what it printed."""
    path = tmp_path_factory.mktemp("scan") / "whole.jsonl"
    counted, out = Counted(), io.StringIO()
    wanted = spec(HALVES, scorer=counted)
    plain = wanted.run.denoise

    def denoise(*arguments):
        counted.traced += 1
        return plain(*arguments)

    wanted = dataclasses.replace(wanted, run=dataclasses.replace(wanted.run, denoise=denoise))
    console = Console(file=out, width=200)
    found = scan(wanted, params, list(samples()), path, console=console)
    return path, found, counted, out.getvalue()


def test_all_candidates_run_in_programs_that_are_compiled_once(whole):
    """The model is traced once, and once the first candidate has run nothing is lowered again."""
    _, found, counted, _ = whole
    assert len(counted.seen) == 1 + 2 * 4 * 3 * 2  # the reference; blocks, kinds, levels, ranges
    assert counted.traced == 1
    assert counted.lowered > 0
    assert set(counted.seen[2:]) == {counted.seen[1]}


def test_the_plan_comes_first_and_a_time_after_the_first_candidate(whole):
    lines = whole[3].splitlines()
    assert lines[0].startswith(
        "scan of stdit: 8 units x 3 levels x 2 timestep range(s) = 48 candidates, 2 samples each: "
    )
    assert "FAKE quantisation, one program" in lines[0]
    assert "judged by time: blocks/*/attn_temp" in lines
    assert any(line.startswith("first candidate: ") and "the rest about" in line for line in lines)


def by_hand(params, unit_layers, spec_, ranges, r):
    """Mean squared change of each sample where the real integer weights run in one range."""
    rule = Rule(match="|".join(unit_layers), weights=spec_)
    real = quantize(params, Recipe(name="r", rules=(rule,)))
    run, errors = spec(ranges).run, []

    @jax.jit
    def step(tree, state, now, conditions):
        apply = lambda *x, **named: MODEL.apply({"params": tree}, *x, **named)  # noqa: E731
        return run.advance(apply, state, now, conditions, None)

    for sample in samples():
        finals = []
        for quantised in (False, True):
            state = loop.start(sample.noise, run.steps)
            for now in run.each_step():
                inside = int(ranges.index(now.timestep)) == r
                tree = real if quantised and inside else params
                state = step(tree, state, now, sample.conditions)
            finals.append(np.asarray(state[0], np.float64))
        errors.append(np.square(finals[1] - finals[0]).mean())
    return np.array(errors)


@pytest.mark.parametrize("r", [0, 1])
def test_a_candidate_is_the_integer_model_in_its_range(whole, params, r):
    """Codes are equal and sums are float32: 1e-3 of an error that is 1e-3 of the state."""
    header, records = read(whole[0])
    unit = next(unit for unit in header.units if unit.name == "blocks/1/attn_temp")
    key = Candidate(unit=unit.name, level=level_name(MENU[0]), act_bits=None, range=r)
    expected = by_hand(params, unit.layers, MENU[0], HALVES, r)
    assert (expected > 0).all()
    np.testing.assert_allclose(records[key].mse, expected, rtol=1e-3)


def test_harms_add_up_over_ranges_and_fall_with_bits(whole):
    _, found, _, _ = whole
    _, records = read(whole[0])
    unit = found.header.units[0]
    keys = [
        Candidate(unit=unit.name, level=level_name(MENU[1]), act_bits=None, range=r) for r in (0, 1)
    ]
    expected = sum(np.mean(records[key].mse) for key in keys)
    assert found.weights[MSE][0, 1] == pytest.approx(expected, rel=1e-12)
    assert (found.weights[MSE][:, 0] > found.weights[MSE][:, 1]).all()
    assert (found.weights[MSE][:, 1] > 0).all() and (found.acts[MSE][:, 0] > 0).all()
    assert not found.weights["time"][:, -1].any()


def test_a_small_stdit_is_allocated(whole):
    """Three groups, each with a metric of its own."""
    made = allocate(whole[1], Request(mean_bits=12.5))
    assert {unit.metric for unit in made.header.units} == {"text", "quality", "time"}
    assert made.sizes.bits_per_weight <= 12.5 and made.segments <= 2


class Killed(Exception):
    """In the middle of a candidate."""


@pytest.mark.parametrize("at", [1, 9])
def test_a_resumed_scan_is_one_scan(whole, params, tmp_path, at):
    """To the byte, whatever was being written when it was cut."""
    path, calls = tmp_path / "scan.jsonl", []

    def dying(found, reference):
        calls.append(None)
        if len(calls) > at:
            raise Killed
        return scorer(found, reference)

    with pytest.raises(Killed):
        scan(spec(HALVES, scorer=dying), params, list(samples()), path)
    assert len(path.read_bytes().splitlines()) == at  # the header, and candidates that were done
    with path.open("ab") as file:
        file.write(b'{"unit": "blocks/1/at')
    scan(spec(HALVES), params, list(samples()), path, resume=True)
    assert path.read_bytes() == whole[0].read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer_name": "other"}, "scorer is test in the file and other here"),
        ({"act_bits": (4, 8)}, r"act_bits is \(4,\) in the file and \(4, 8\) here"),
        ({"menu": MENU[:1]}, "menu is "),
        ({"metrics": [(".*", MSE)]}, "units is "),
        ({"ranges": WHOLE}, r"ranges is \(0.0, 500.0, 1000.0\) in the file and \(0.0, 1000.0\)"),
    ],
)
def test_another_scan_is_not_gone_on_with(whole, params, change, message):
    ranges = change.pop("ranges", HALVES)
    with pytest.raises(ScanError, match=message):
        scan(spec(ranges, **change), params, list(samples()), whole[0], resume=True)


def test_other_samples_parameters_and_names_are_refused(whole, params):
    with pytest.raises(ScanError, match="sha256 of the samples is "):
        scan(spec(HALVES), params, list(samples())[::-1], whole[0], resume=True)
    other = jax.tree.map(lambda leaf: leaf * 1.5, params)
    with pytest.raises(ScanError, match="sha256 of the run and its parameters is "):
        scan(spec(HALVES), other, list(samples()), whole[0], resume=True)
    with pytest.raises(ScanError, match="is there already: resume it, or name another file"):
        scan(spec(HALVES), params, list(samples()), whole[0])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"text": 2, "quality": 2}, "is judged by 'time', the scorer gives text, quality"),
        ({"text": 2, "quality": 2, "time": 3}, r"'time' has shape \(3,\) for 2 samples"),
        ({"text": 2, "quality": 2, "time": 2, "mse": 2}, "the scorer gives 'mse'"),
        ({"text": np.array([0, np.nan]), "quality": 2, "time": 2}, "'text' holds NaN"),
    ],
)
def test_a_scorer_that_does_not_fit_is_refused(params, tmp_path, scores, message):
    made = {k: np.zeros(v) if isinstance(v, int) else v for k, v in scores.items()}
    with pytest.raises(ScanError, match=message):
        scan(spec(scorer=lambda *_: made), params, list(samples()), tmp_path / "scan.jsonl")
    assert not (tmp_path / "scan.jsonl").exists()


def test_parameters_that_are_treated_already_are_refused(params, tmp_path):
    rule = Rule(match="blocks/1/mlp/fc1", weights=MENU[1])
    for recipe in (rule, dataclasses.replace(rule, weights=None, rotation="auto")):
        tree = quantize(params, Recipe(name="r", rules=(recipe,)))
        with pytest.raises(ScanError, match="blocks/1/mlp/fc1 is a (QTensor|TransformedKernel)"):
            scan(spec(), tree, list(samples()), tmp_path / "scan.jsonl")


def test_samples_of_several_shapes_are_refused(params, tmp_path):
    mixed = [*samples(1), *samples(1, batch=2)]
    with pytest.raises(ScanError, match="sample 1 has other shapes than the first"):
        scan(spec(), params, mixed, tmp_path / "scan.jsonl")
    with pytest.raises(ScanError, match="no samples"):
        scan(spec(), params, [], tmp_path / "scan.jsonl")


def test_damaged_and_unfinished_files_are_refused(whole, tmp_path):
    lines = whole[0].read_text().splitlines(keepends=True)
    path = tmp_path / "scan.jsonl"

    def refused(text, message):
        path.write_text(text)
        with pytest.raises(ScanError, match=message):
            load_sensitivity(path)

    with pytest.raises(ScanError, match="no such file"):
        load_sensitivity(path)
    refused("".join(lines[:-2]), "2 of 48 candidates are missing, such as blocks/")
    refused("".join([*lines, lines[-1]]), "line 50: blocks/.* is there twice")
    refused("".join([lines[0], "nonsense\n"]), "line 2: malformed")
    refused(lines[0][:20], "its first line is not whole")
    refused('{"a": 1}\n', "does not say that it is a sensitivity file")
    newer = json.loads(lines[0]) | {"version": 9}
    refused(json.dumps(newer) + "\n", "version 9, this library reads 1")
    record = json.loads(lines[1])
    refused(lines[0] + json.dumps(record | {"unit": "blocks/7/attn"}) + "\n", "is no candidate")
    refused(lines[0] + json.dumps(record | {MSE: [1.0]}) + "\n", "has the scores .*'mse': 1")
