"""What the float model does on its way from noise to pictures: the data of data-free training.

The model samples from conditions alone, and every forward's input, time and output are kept, over
all timesteps of whole trajectories: noise alone, and trajectories of a few steps, failed others.

Shape letters: p samples, s steps, b batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num

from lowbit_jax.calibration.collect import Run, Sample, run_digest
from lowbit_jax.samplers import loop


class TrajectoryError(ValueError):
    """Trajectories that cannot be recorded, or that are damaged or of another run."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some samples' trajectories; numpy arrays, which may be views of a file.

    Attributes:
        x: what the model was given.
        output: what it gave.
        conditions: leaves of the samples' conditions.
        timestep: that it was told, the same for all samples.
    """

    x: Float[np.ndarray, "p s ..."]
    output: Float[np.ndarray, "p s ..."]
    conditions: list[Num[np.ndarray, "p ..."]]
    timestep: Num[np.ndarray, "s"]

    def __len__(self) -> int:
        return len(self.x)


def record(
    run: Run, params: Any, samples: Iterable[Sample], *, size: int = 32, skip: int = 0
) -> Iterator[Shard]:
    """Sample with `params` and give trajectories, `size` samples at a time.

    One jitted program serves every step; memory is that of one forward and one shard.

    Args:
        run: what is run, without guidance (a guided forward is two of other conditions).
        params: parameters of `run.model`, float.
        samples: what to sample, in order; may be made on the way.
        size: samples of a shard and of a forward; the last may have fewer.
        skip: shards that are there already: their samples are taken and not run.

    Raises:
        ValueError: a run with guidance or with noise in its steps.
        TrajectoryError: NaN or infinity on the way, with the sample and the step.
    """
    if run.guidance is not None or run.steps.std is not None:
        raise ValueError("trajectories are recorded without guidance and without added noise")
    program = jax.jit(_step(run))
    steps = [jax.tree.map(lambda leaf, i=i: leaf[i], run.steps) for i in range(len(run.steps))]
    rest = iter(samples)
    for number in range(2**62):
        batch = list(islice(rest, size))
        if not batch:
            return
        if number >= skip:
            yield _shard(program, params, run, batch, steps, number * size)


def samples_digest(run: Run, params: Any, size: int) -> str:
    """SHA-256 of a run's settings and parameters and the size of its forwards."""
    return hashlib.sha256(f"{run_digest(run, params)} {size}".encode()).hexdigest()


def _step(run: Run):
    def step(params, state, now, conditions):
        seen = {}

        def apply(*inputs, **named):
            return run.model.apply({"params": params}, *inputs, **named)

        def denoiser(x, timestep):
            out = run.denoise(apply, x, timestep, conditions)
            seen["x"], seen["out"] = x, out
            return out

        state = loop.advance(denoiser, state, now)
        return state, seen["x"].astype(jnp.float32), seen["out"].astype(jnp.float32)

    return step


def _shard(program, params, run: Run, batch: list[Sample], steps, first: int) -> Shard:
    conditions = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(s.conditions for s in batch)
    )
    noise = jnp.concatenate([jnp.asarray(sample.noise) for sample in batch])
    state = loop.start(noise, run.steps)
    inputs, outputs = [], []
    for number, now in enumerate(steps):
        state, x, out = jax.device_get(program(params, state, now, conditions))
        bad = ~np.isfinite(out.reshape(len(out), -1)).all(1)
        if bad.any():
            raise TrajectoryError(
                f"sample {first + int(bad.argmax())}, step {number}: NaN or infinity in the output"
            )
        inputs.append(x)
        outputs.append(out)
    return Shard(
        x=np.stack(inputs, 1),
        output=np.stack(outputs, 1),
        conditions=[np.asarray(leaf) for leaf in jax.tree.leaves(conditions)],
        timestep=np.asarray(run.steps.timestep),
    )


class Trajectories:
    """Recorded trajectories as batches of single forwards.

    Args:
        shards: of one run, in order.
        structure: of a sample's conditions, as `jax.tree.structure` gives it.
        digest: of the run and samples, for those who must know.

    Raises:
        TrajectoryError: no samples.
    """

    def __init__(self, shards: Sequence[Shard], structure: Any, digest: str = ""):
        self._shards, self._structure, self.digest = list(shards), structure, digest
        self._first = np.cumsum([0, *(len(shard) for shard in self._shards)])
        if len(self) == 0:
            raise TrajectoryError("no trajectories: record at least one sample")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def steps(self) -> int:
        """Steps of each trajectory."""
        return len(self._shards[0].timestep)

    def batch(self, number: int, size: int, seed: int) -> dict[str, Any]:
        """The batch of one training step: passes over all forwards, each shuffled by (seed, pass).

        Depends on the arguments alone, so that a resumed training sees what it would have seen.

        Returns:
            `x` and `output` [b, ...], `timestep` [b] and `conditions`, a tree of [b, ...].
        """
        return self.take(shuffled(len(self) * self.steps, number, size, seed))

    def take(self, index: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The forwards sample * steps + step of an index, as `batch` gives them."""
        rows = []
        for forward in np.asarray(index):
            sample, step = divmod(int(forward), self.steps)
            s = int(np.searchsorted(self._first, sample, side="right")) - 1
            shard, row = self._shards[s], sample - int(self._first[s])
            parts = (shard.x[row, step], shard.output[row, step], shard.timestep[step])
            rows.append((*parts, *(leaf[row] for leaf in shard.conditions)))
        x, output, timestep, *conditions = (np.stack(column) for column in zip(*rows, strict=True))
        return {
            "x": x,
            "output": output,
            "timestep": timestep,
            "conditions": jax.tree.unflatten(self._structure, conditions),
        }


def shuffled(n: int, number: int, size: int, seed: int) -> Int[np.ndarray, "b"]:
    """The indices of one batch: passes over n things, each pass shuffled by (seed, pass)."""
    at = range(number * size, (number + 1) * size)
    orders = {p: np.random.default_rng((seed, p)).permutation(n) for p in {i // n for i in at}}
    return np.array([orders[i // n][i % n] for i in at])
