"""Trajectories: what the sampler saw, in shards that an interruption does not change."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.errors import CheckpointError
from convert.trajectories import open_trajectories, save_trajectories
from lowbit_jax.calibration import drivers
from lowbit_jax.distill.trajectories import TrajectoryError, record
from lowbit_jax.models.flux import FluxConfig, FluxTransformer, abstract_params
from lowbit_jax.pipelines.flux import sample_tokens

CONFIG = FluxConfig(
    in_channels=4,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=16,
    num_heads=1,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
    guidance_embed=False,
)
MODEL = FluxTransformer(CONFIG)
SIGMAS = np.array([1.0, 0.7, 0.4, 0.0], np.float32)
RUN = drivers.flux_run(MODEL, SIGMAS, grid=(2, 2))


def params(seed=0):
    leaves, structure = jax.tree.flatten(abstract_params(CONFIG, jnp.float32))
    rng = np.random.default_rng(seed)
    return structure.unflatten([0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves])


def samples(count=5, seed=1):
    rng = np.random.default_rng(seed)
    shapes = (1, 4, 4), (1, 3, 10), (1, 6)
    return [
        drivers.flux_sample(*(rng.standard_normal(shape, np.float32) for shape in shapes))
        for _ in range(count)
    ]


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_they_are_the_samplers():
    """The last input, moved on by the last output, is the sampler's picture; 1e-5: batches."""
    given = samples()
    shards = list(record(RUN, params(), given, size=2))
    assert [len(shard) for shard in shards] == [2, 2, 1]
    x, output = (np.concatenate([getattr(s, name) for s in shards]) for name in ("x", "output"))
    noise, txt, pooled = (
        np.concatenate(parts)
        for parts in zip(*((s.noise, *s.conditions[:2]) for s in given), strict=True)
    )
    expected = sample_tokens(MODEL, params(), noise, txt, pooled, SIGMAS, grid=(2, 2))
    np.testing.assert_array_equal(x[:, 0], noise)
    steps = np.diff(SIGMAS)[:, None, None]
    np.testing.assert_allclose(x[:, 1:], (x + steps * output)[:, :-1], atol=1e-6)
    np.testing.assert_allclose((x + steps * output)[:, -1], expected, atol=1e-5)


def test_an_interrupted_folder_is_completed_to_the_byte(tmp_path):
    whole = save_trajectories(tmp_path / "whole", RUN, params(), samples(), size=2)
    seen = []

    def stop(done):
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_trajectories(tmp_path / "cut", RUN, params(), samples(), size=2, progress=stop)
    assert seen == [0, 2, 4] and len(digests(tmp_path / "cut")) == 2
    rest = save_trajectories(tmp_path / "cut", RUN, params(), samples(), size=2)
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")
    assert rest.digest == whole.digest
    assert len(rest) == 5 and rest.steps == 3


def test_batches_pass_over_every_forward(tmp_path):
    data = save_trajectories(tmp_path, RUN, params(), samples(), size=2)
    seen = [data.batch(number, 5, seed=3) for number in range(3)]
    outputs = np.concatenate([batch["output"] for batch in seen])
    every = data.take(range(15))
    assert len(np.unique(outputs.reshape(15, -1), axis=0)) == 15
    for batch in (every, seen[1]):  # each row is one forward of the model
        txt, pooled, guidance = batch["conditions"]
        assert guidance is None
        apply = lambda *inputs, **named: MODEL.apply({"params": params()}, *inputs, **named)  # noqa: E731
        found = RUN.denoise(apply, batch["x"], batch["timestep"], batch["conditions"])
        np.testing.assert_allclose(found, batch["output"], atol=1e-5)
    again = data.batch(1, 5, seed=3)
    jax.tree.map(np.testing.assert_array_equal, again, seen[1])
    assert not np.array_equal(data.batch(1, 5, seed=4)["output"], again["output"])


def test_other_runs_and_damage_are_refused(tmp_path):
    save_trajectories(tmp_path, RUN, params(), samples(4), size=2)
    with pytest.raises(CheckpointError, match="other parameters"):
        save_trajectories(tmp_path, RUN, params(1), samples(4), size=2)
    with pytest.raises(CheckpointError, match="sample 0 has other noise"):
        save_trajectories(tmp_path, RUN, params(), samples(4, seed=2), size=2)
    with pytest.raises(CheckpointError, match="2 conditions, the structure has 3"):
        open_trajectories(tmp_path, jax.tree.structure((0, 0, 0)))
    with pytest.raises(CheckpointError, match="no trajectories"):
        open_trajectories(tmp_path / "none", jax.tree.structure((0, 0, None)))
    (tmp_path / "trajectories-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="number"):
        open_trajectories(tmp_path, jax.tree.structure((0, 0, None)))
    broken = params()
    broken["img_in"]["bias"][0] = np.nan
    with pytest.raises(TrajectoryError, match="sample 0, step 0"):
        list(record(RUN, broken, samples(1)))
