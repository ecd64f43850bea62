"""A sensitivity scan: every unit quantised alone, at every level, in every timestep range.

Two programs are compiled, once each: one that makes a candidate's parameters (FAKE quantisation,
see `quant.fake`) and one step of the sampler. What a candidate quantises, and how, is data to both.
Of the samples of a range only the steps from its first on are run: those before are the floating
model's, which are kept.

In memory: the parameters and one fake-quantised copy in float32, the last states of all samples,
and their states at the first step of each range.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress

from lowbit_jax.calibration.collect import Run, Sample, run_digest, sample_digest
from lowbit_jax.precision.menu import ACT_BITS, MENU, check_menu, level_name
from lowbit_jax.precision.records import (
    MSE,
    Appender,
    Candidate,
    Header,
    Record,
    ScanError,
    check_begun,
)
from lowbit_jax.precision.sensitivity import Sensitivity, load_sensitivity
from lowbit_jax.precision.units import METRICS, Unit, find_units
from lowbit_jax.quant.fake import choose, fake_quantize
from lowbit_jax.quant.recipe import WeightSpec
from lowbit_jax.quant.stacks import iter_layers
from lowbit_jax.samplers import loop

# (samples of a candidate, those of the floating model) -> {metric: a score of each sample}
Scorer = Callable[
    [Float[np.ndarray, "s ..."], Float[np.ndarray, "s ..."]], Mapping[str, np.ndarray]
]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is scanned and how, but for the parameters and the samples.

    Attributes:
        run: the model, its sampler and the timestep ranges in which units are quantised; `grams` is
            not used.
        scorer: gives every sample a score by each metric, finite, more is better. It gets the
            sampler's last states of all samples in order, and the floating model's, undecoded.
            "mse" to the floating model's is always measured and need not be one of them.
        scorer_name: what the file calls it: another name is another scan.
        menu: levels of the weights.
        act_bits: levels of the activations, on floating weights; none: they are not scanned.
        metrics: which metric judges which units, see `find_units`.

    Raises:
        ValueError: levels that are impossible or there twice.
    """

    run: Run
    scorer: Scorer
    scorer_name: str
    menu: tuple[WeightSpec, ...] = MENU
    act_bits: tuple[int, ...] = ACT_BITS
    metrics: Sequence[tuple[str, str]] = METRICS

    def __post_init__(self) -> None:
        check_menu(self.menu, self.act_bits)


def scan(
    spec: Scan,
    params: Any,
    samples: Sequence[Sample],
    path: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Sensitivity:
    """Run a scan, or the rest of one; its file grows a line with each candidate.

    Args:
        spec: what is scanned.
        params: floating parameters.
        samples: what is sampled with every candidate. Unlike in calibration a sample may be a batch
            (of noise and conditions); all must have the same shapes.
        path: of the file, see `records`.
        resume: go on with the file of an equal scan that was cut. The result is that of one scan.
        console: where the plan and a progress bar are shown; None for none.

    Raises:
        ScanError: parameters that are quantised or transformed already (names the first); a file
            of another scan (names the setting), or one that is there without
            `resume`; a metric that the scorer does not give; scores that are not finite, by
            candidate; samples of different shapes.
        ValueError: a sample's key does not fit the steps.
    """
    units = find_units(params, spec.metrics)
    _check_floating(params)
    _check_shapes(samples)
    header = _header(spec, params, samples, units)
    check_begun(path, header, resume)
    sampler = _Sampler(spec, params, units, samples)
    _show_plan(spec, units, sampler, console)
    begin = time.perf_counter()
    finals = sampler.reference()
    reference = _scores(spec.scorer, finals, finals, "the floating model")
    _check_metrics(units, reference)
    header = dataclasses.replace(header, reference=reference)
    file = Appender(path, header)
    waiting = [candidate for candidate in header.candidates() if candidate not in file.done]
    _say(console, f"floating model, with compilation: {time.perf_counter() - begin:.1f} s")
    if file.done:
        _say(console, f"resumed: {len(file.done)} candidates are there, {len(waiting)} to go")
    with Progress(console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("scanning", total=len(waiting))
        for number, candidate in enumerate(waiting):
            begin = time.perf_counter()
            found = sampler.finals(candidate)
            error = np.square(found - finals, dtype=np.float64).reshape(len(finals), -1).mean(1)
            scores = _scores(spec.scorer, found, finals, str(candidate))
            file.add(Record(candidate=candidate, mse=error.tolist(), scores=scores))
            progress.advance(task)
            if number == 0:
                seconds = time.perf_counter() - begin
                rest = seconds * (len(waiting) - 1)
                _say(console, f"first candidate: {seconds:.1f} s; the rest about {rest:.0f} s")
    return load_sensitivity(path)


class _Sampler:
    """The two programs and what they are called with."""

    def __init__(self, spec: Scan, params: Any, units: Sequence[Unit], samples: Sequence[Sample]):
        self.samples = samples
        self._params = params
        self._run = spec.run
        self._levels = {level_name(entry): i for i, entry in enumerate(spec.menu, 1)}
        self._layers = {unit.name: unit.layers for unit in units}
        self._nothing = dict.fromkeys((path for unit in units for path in unit.layers), (0, 0))
        self._steps = spec.run.each_step()
        ranges = np.asarray(spec.run.ranges.index(jnp.asarray(spec.run.steps.timestep)))
        self._in_range = [ranges == r for r in range(len(spec.run.ranges))]
        self._before: list[list[Any]] = []  # by sample: its state before each range's first step
        self._weights = jax.jit(partial(fake_quantize, menu=spec.menu))

        def step(tree, state, now, conditions, key):
            def apply(*inputs, **named):
                return spec.run.model.apply({"params": tree}, *inputs, **named)

            return spec.run.advance(apply, state, now, conditions, key)

        self._step = jax.jit(step)
        self._floating = self._weights(params, choose(params, self._nothing))

    def forwards(self) -> int:
        """Steps of the sampler that one whole scan of one level takes, over all units."""
        each = sum(len(self._steps) - int(np.argmax(steps)) for steps in self._in_range)
        return each * len(self.samples) * len(self._layers)

    def reference(self) -> np.ndarray:
        """Last states of the floating model; keeps the states that the ranges begin with."""
        firsts = [int(np.argmax(steps)) for steps in self._in_range]
        finals = []
        for sample in self.samples:
            states = list(self._states(sample, loop.start(sample.noise, self._run.steps), 0, None))
            self._before.append([states[first] for first in firsts])
            finals.append(np.asarray(states[-1][0]))
        return np.concatenate(finals)

    def finals(self, candidate: Candidate) -> np.ndarray:
        """Last states of all samples, one after the other."""
        weights = 0 if candidate.level is None else self._levels[candidate.level]
        treatment = weights, candidate.act_bits or 0
        chosen = self._nothing | dict.fromkeys(self._layers[candidate.unit], treatment)
        tree = self._weights(self._params, choose(self._params, chosen))
        r = candidate.range
        first = int(np.argmax(self._in_range[r]))
        finals = []
        for sample, before in zip(self.samples, self._before, strict=True):
            for state in self._states(sample, before[r], first, (tree, self._in_range[r])):
                last = state[0]
            finals.append(np.asarray(last))
        return np.concatenate(finals)

    def _states(self, sample: Sample, state: Any, first: int, candidate: Any) -> Iterator[Any]:
        """The state before step `first`, and after every step from there on."""
        yield state
        keys = self._run.keys(sample)
        for i in range(first, len(self._steps)):
            tree = self._floating
            if candidate is not None and candidate[1][i]:
                tree = candidate[0]
            state = self._step(tree, state, self._steps[i], sample.conditions, keys[i])
            yield state


def _check_floating(params: Any) -> None:
    """A recipe of an allocation neither balances nor rotates: it must be the same model."""
    for path, kernel, _ in iter_layers(params):
        if not isinstance(kernel, jax.Array | np.ndarray):
            raise ScanError(
                f"{path} is a {type(kernel).__name__}: scan the floating parameters, neither "
                "quantised nor balanced or rotated"
            )


def _check_shapes(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ScanError("no samples were given")
    shapes = [jax.tree.map(lambda leaf: (jnp.shape(leaf), str(leaf.dtype)), s) for s in samples]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ScanError(
                f"sample {number} has other shapes than the first, {shape} and {shapes[0]}: each "
                "would need a program of its own"
            )


def _scores(scorer: Scorer, found, reference, what: str) -> dict[str, list[float]]:
    out = {}
    for name, values in scorer(found, reference).items():
        values = np.asarray(values, np.float64)
        if values.shape != (len(reference),):
            raise ScanError(
                f"the scorer's '{name}' has shape {values.shape} for {len(reference)} samples"
            )
        if not np.isfinite(values).all():
            raise ScanError(f"{what}: the scorer's '{name}' holds NaN or infinity")
        out[name] = values.tolist()
    if MSE in out:
        raise ScanError(f"the scorer gives '{MSE}', which the scan measures itself: rename it")
    return out


def _check_metrics(units: Sequence[Unit], reference: Mapping[str, Any]) -> None:
    for unit in units:
        if unit.metric not in (*reference, MSE):
            raise ScanError(
                f"{unit.name} is judged by '{unit.metric}', the scorer gives "
                f"{', '.join(reference) or 'nothing'}: add it there, or give other `metrics`"
            )


def _header(spec: Scan, params, samples, units) -> Header:
    """Without the reference, which has to be run."""
    digest = ""
    for sample in samples:
        digest = sample_digest(digest, sample)
    run = spec.run
    settings = {
        "scorer": spec.scorer_name,
        "dtype": jnp.dtype(run.model.dtype).name,  # type: ignore[attr-defined]
        "timesteps": np.asarray(run.steps.timestep).tolist(),
        "guidance scale": run.scale,
        "sha256 of the samples": digest,
        "sha256 of the run and its parameters": run_digest(run, params),
    }
    return Header(
        model=run.name,
        config=json.loads(run.config),
        units=tuple(units),
        menu=spec.menu,
        act_bits=spec.act_bits,
        ranges=run.ranges.edges,
        samples=sum(len(sample.noise) for sample in samples),
        settings=settings,
        reference={},
    )


def _show_plan(spec: Scan, units, sampler: _Sampler, console: Console | None) -> None:
    levels = len(spec.menu) + len(spec.act_bits)
    ranges = len(spec.run.ranges)
    size = len(sampler.samples[0].noise)
    _say(
        console,
        f"scan of {spec.run.name}: {len(units)} units x {levels} levels x {ranges} timestep "
        f"range(s) = {len(units) * levels * ranges} candidates, {size * len(sampler.samples)} "
        f"samples each: {levels * sampler.forwards():,} steps of the sampler on {size} samples at "
        "a time; FAKE quantisation, one program for all",
    )
    groups = {metric: [u for u in units if u.metric == metric] for metric in _metrics(units)}
    for metric, members in groups.items():
        kinds = ", ".join(dict.fromkeys(f"{u.stack}/*/{u.kind}" for u in members))
        _say(console, f"judged by {metric}: {kinds}")


def _metrics(units: Sequence[Unit]) -> list[str]:
    return list(dict.fromkeys(unit.metric for unit in units))


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, soft_wrap=True)
