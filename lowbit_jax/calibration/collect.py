"""Run a model through its sampler and collect statistics: no data but noise and conditions.

Samples run one at a time, so that no batch size can enter the figures: a model's products differ in
the last bit between batches. One jitted program serves every step of every sample. A step gives 12
bytes per channel of every linear and half (21 MB for FLUX.1-dev), and 4 k^2 for each linear whose
X^T X is wanted; the host keeps 20 bytes per channel, half and range (8 k^2), twice while a copy is
handed out. None of it grows with the number of samples or steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from operator import length_hint
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key
from rich.console import Console
from rich.progress import Progress

from lowbit_jax.calibration.observe import Reading, iter_readings, observe
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.calibration.statistics import Statistics, StatisticsError, Sums
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.samplers import loop
from lowbit_jax.samplers.guidance import Guidance

# (apply, x, timestep, conditions) -> output; `apply` takes what the model's __call__ does
Denoise = Callable[[Callable[..., Array], Array, Array, Any], Array]


class Sample(NamedTuple):
    """One picture or video to sample.

    Attributes:
        noise: standard normal start, a batch of one.
        conditions: what `denoise` needs beside: any pytree of arrays, for the batch of the forward
            (2 with guidance, in the order of `Guidance.double`).
        key: of the noise that is added in every step, for steps that add any.
    """

    noise: Float[Array, "1 c ..."]
    conditions: Any
    key: Key[Array, ""] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is run and how, but for the samples.

    Attributes:
        model: the module; its dtype is the dtype of the computation.
        denoise: gives the model its inputs, see `Denoise`.
        steps: of the sampler.
        ranges: of the timesteps that the model is told; each must hold one of the steps.
        guidance: of classifier-free guidance; None for one forward of one entry.
        scale: of `guidance`.
        grams: linears whose X^T X is wanted, see `observe`.

    Raises:
        ValueError: a timestep outside the ranges, a range without a timestep, guidance without a
            scale or a scale without guidance, a model that is not in the registry.
    """

    model: nn.Module
    denoise: Denoise
    steps: loop.Steps
    ranges: TimestepRanges
    guidance: Guidance | None = None
    scale: float | None = None
    grams: str | None = None

    def __post_init__(self) -> None:
        if (self.guidance is None) != (self.scale is None):
            raise ValueError(f"guidance is {self.guidance} and scale {self.scale}: give both")
        times = np.asarray(self.steps.timestep)
        found = np.asarray(self.ranges.index(jnp.asarray(times)))
        if (found < 0).any():
            raise ValueError(
                f"timesteps {times[found < 0].tolist()} lie outside the ranges, 0 to "
                f"{self.ranges.edges[-1]:g}"
            )
        empty = [self.ranges.label(r) for r in range(len(self.ranges)) if r not in found]
        if empty:
            raise ValueError(
                f"no timestep of {times.tolist()} falls into {', '.join(empty)}: take more steps "
                "or wider ranges"
            )
        _ = self.name  # raises

    @property
    def name(self) -> str:
        """The model's name in the registry."""
        for name, network in NETWORKS.items():
            if network.module is type(self.model):
                return name
        raise ValueError(f"{type(self.model).__name__} is none of the registry's networks")

    @property
    def config(self) -> str:
        """The model's config fields, as JSON."""
        return json.dumps(dataclasses.asdict(self.model.config), sort_keys=True)  # type: ignore[attr-defined]

    @property
    def halves(self) -> tuple[str, ...]:
        """What the entries of a forward are."""
        if self.guidance is None:
            return ("all",)
        names = ("conditional", "unconditional")
        return names if self.guidance.order == "conditional first" else names[::-1]

    def advance(self, apply: Callable[..., Array], state: Any, now: Any, conditions: Any, key: Any):
        """One guided step of the sampler with `apply` for the model: the next state.

        Args:
            apply: what the model's __call__ does.
            state: of `samplers.loop`.
            now: one of `steps`.
            conditions: of a `Sample`.
            key: of the step's noise; None for steps that add none.
        """

        def denoiser(x, timestep):
            return self.denoise(apply, x, timestep, conditions)

        if self.guidance is not None and self.scale is not None:
            denoiser = self.guidance.guide(denoiser, self.scale)
        z = None if key is None else jax.random.normal(key, state[0].shape)
        return loop.advance(denoiser, state, now, z)

    def keys(self, sample: Sample) -> Any:
        """A key, or None, for each step of a sample.

        Raises:
            ValueError: a key for steps that add no noise, or none for steps that do.
        """
        if (sample.key is None) != (self.steps.std is None):
            raise ValueError(
                f"key is {sample.key}: steps that add noise need one, others take none"
            )
        count = len(self.steps)
        return [None] * count if sample.key is None else jax.random.split(sample.key, count)

    def each_step(self) -> list[loop.Steps]:
        """The steps one by one."""
        return [jax.tree.map(lambda leaf, i=i: leaf[i], self.steps) for i in range(len(self.steps))]


def collect(
    run: Run,
    params: Any,
    samples: Iterable[Sample],
    *,
    resume: Statistics | None = None,
    keep: Callable[[Statistics], object] | None = None,
    console: Console | None = None,
) -> Statistics:
    """Sample with `params` and sum up what every linear is given.

    Args:
        run: what is run.
        params: parameters of `run.model`, float or quantised.
        samples: what to sample, in order; may be made on the way.
        resume: what `keep` was given last by an equal run that was cut: its samples, which must be
            the first of `samples`, are not run again. The result is that of one run, to the bit.
        keep: called after every sample, such as with `convert.statistics.save_statistics`.
        console: where a progress bar is shown; None for none.

    Raises:
        StatisticsError: NaN or infinity in a layer, by its name; a `resume` of another run;
            no samples.
    """
    if resume is not None:
        _check_resumed(resume, run, params)
    before = 0 if resume is None else resume.samples
    program, digest, done = jax.jit(_step(run)), run_digest(run, params), 0
    sums = Sums(len(run.halves), run.ranges, {} if resume is None else resume.layers)
    steps = run.each_step()
    with Progress(console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("calibrating", total=length_hint(samples) * len(steps) or None)
        for done, sample in enumerate(samples, 1):
            digest = sample_digest(digest, sample)
            if done <= before:
                if resume is not None and done == before and digest != resume.digest:
                    raise StatisticsError(
                        f"`resume` is of other parameters, settings or samples: the digest of its "
                        f"{before} is {resume.digest[:16]}, of these {digest[:16]}"
                    )
                progress.advance(task, len(steps))
                continue
            for r, readings in _sample(program, params, run, sample, steps):
                sums.add(r, iter_readings(readings))
                progress.advance(task)
            if keep is not None:
                keep(_statistics(run, sums, done, digest))
    if done == 0 or done < before:
        raise StatisticsError(f"{done} samples were given, {before} are in `resume`")
    statistics = _statistics(run, sums, done, digest)
    statistics.check(params, run.ranges)
    return statistics


def abstract_readings(
    run: Run, params: Any, sample: Callable[[Any], Sample]
) -> dict[str, list[Reading]]:
    """What one step would give, by layer path, as shapes: what a run takes, before it is made.

    Args:
        run: what would be run.
        params: parameters, or their `jax.ShapeDtypeStruct`s.
        sample: makes a sample of parameters, which are traced.

    Raises:
        ValueError: a sample that the model or the steps do not take.
    """

    def step(params):
        one = sample(params)
        state, now = loop.start(jnp.asarray(one.noise), run.steps), run.each_step()[0]
        _, _, readings = _step(run)(params, state, now, one.conditions, run.keys(one)[0])
        return dict(iter_readings(readings))

    return jax.eval_shape(step, params)


def _statistics(run: Run, sums: Sums, samples: int, digest: str) -> Statistics:
    return Statistics(
        layers=sums.layers(),
        ranges=run.ranges,
        halves=run.halves,
        model=run.name,
        config=run.config,
        samples=samples,
        digest=digest,
    )


def _sample(program, params, run: Run, sample: Sample, steps):
    """(range, readings as numpy) of every step."""
    noise = jnp.asarray(sample.noise)
    if len(noise) != 1:
        raise ValueError(f"noise has shape {noise.shape}: a sample is a batch of 1")
    state = loop.start(noise, run.steps)
    for now, key in zip(steps, run.keys(sample), strict=True):
        state, r, readings = program(params, state, now, sample.conditions, key)
        yield int(r), jax.device_get(readings)


def _step(run: Run):
    """The one program: a sampler's step that also gives its range and its readings."""

    def step(params, state, now, conditions, key):
        apply, readings = observe(run.model, params, entries=len(run.halves), grams=run.grams)
        state = run.advance(apply, state, now, conditions, key)
        return state, run.ranges.index(now.timestep), readings()

    return step


def _check_resumed(resume: Statistics, run: Run, params: Any) -> None:
    ours = {"model": run.name, "config": run.config, "ranges": run.ranges, "halves": run.halves}
    for name, value in ours.items():
        if getattr(resume, name) != value:
            raise StatisticsError(
                f"`resume` has {name} {getattr(resume, name)}, this run has {value}"
            )
    resume.check(params, run.ranges)


def run_digest(run: Run, params: Any) -> str:
    """Of the settings, and of every parameter: its shape and 64 numbers of each layer or row."""
    model = run.model
    settings = (run.name, run.config, model.dtype, run.ranges, run.guidance, run.scale, run.grams)  # type: ignore[attr-defined]
    start = [
        (jax.tree_util.keystr(path), str(leaf.shape), np.asarray(leaf[_corner(leaf.ndim)]))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return _hash(repr(settings), (run.steps, start))


def sample_digest(before: str, sample: Sample) -> str:
    """Of what was digested before, and of a sample."""
    key = None if sample.key is None else jax.random.key_data(sample.key)
    return _hash(before, sample._replace(key=key))


def _corner(ndim: int) -> tuple[Any, ...]:
    """Indices of 64 numbers of each layer of a stack, or of each row of a matrix."""
    first = slice(64)
    return (first,) * ndim if ndim < 2 else (slice(None), *[0] * (ndim - 2), first)


def _hash(before: str, tree: Any) -> str:
    """SHA-256 of a text and a pytree: its structure, dtypes, shapes and bytes."""
    leaves, structure = jax.tree.flatten(tree)
    digest = hashlib.sha256(f"{before} {structure}".encode())
    for leaf in leaves:
        array = None if isinstance(leaf, str) else np.asarray(leaf)
        text = leaf if array is None else f"{array.dtype}{array.shape}"
        digest.update(f" {text} ".encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
