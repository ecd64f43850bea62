"""The training loop learns, stops, goes on exactly and refuses another setup; its tasks."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("optax")
pytest.importorskip("matplotlib")

from benchmarks import training
from benchmarks.caption_pool import Pool, PoolSpec, open_pool
from benchmarks.moving_nouns_model import (
    MAX_LEN,
    SCHEDULE,
    TEXT_WIDTH,
    caption_mask,
    contact_sheet,
    init_params,
    make_loss,
    make_noise,
    sample_clips,
    shift_time,
    stdit_config,
)
from benchmarks.picture_task import held_out_scores, training_batch
from benchmarks.picture_worlds import Scenes
from benchmarks.training_optim import OptimOptions, _muon_axes
from lowbit_jax.evaluation import moving_nouns, nouns, scenes
from lowbit_jax.models.stdit import STDiTTransformer
from tests.references.scenes import made_up_scene


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3
    size: tuple[int, int] = (1, 2)


def line_task():
    """Fit a line to noisy points: the loss uses the key, the batch depends on the step."""
    slope = np.arange(3.0)

    def loss(params, key, x):
        noise = 0.01 * jax.random.normal(key, (len(x),))
        return jnp.mean(jnp.square(x @ params["w"]["kernel"][:, 0] - x @ slope - noise))

    return training.Task(
        config=Config(),
        init=lambda seed: {"w": {"kernel": jnp.zeros((3, 1))}},
        loss=loss,
        batch=lambda step: {"x": np.random.default_rng(step).normal(size=(8, 3))},
        evaluate=lambda params: (
            {"right": 1.0, "slope": float(params["w"]["kernel"][2, 0])},
            np.zeros((2, 2, 3), np.uint8),
        ),
        accuracies=("right",),
        scores=("slope",),
    )


def options(out, steps, **changes):
    optim = OptimOptions(steps=steps, optimizer="adamw", lr=0.05, warmup=2, decay=0.1)
    return training.TrainOptions(out=out, optim=optim, eval_every=10, **changes)


def run(options):
    return training.train(options, line_task(), Console(quiet=True))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = options(tmp_path / "whole", 30)
    assert run(whole)["slope"] > 0.5  # of 2; an average over the run
    # plateau to step 27 of the long run and to step 18 of the short one
    run(options(tmp_path / "parts", 20, minutes=0.0))  # ends before its first step
    run(options(tmp_path / "parts", 20, resume=True))
    assert (tmp_path / "parts" / "checkpoints" / "20").exists()
    run(options(tmp_path / "parts", 30, resume=True))
    rows = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[row.split(",")[:2] for row in part] for part in rows]
    assert losses[0][:19] == losses[1][:19]
    assert len(losses[0]) == len(losses[1]) == 31
    assert rows[0][0] == "step,loss,seconds,right,slope"
    assert ",1.0," in rows[0][10] and rows[0][11].endswith(",,")
    for name in ("log.png", "samples.png"):
        assert (tmp_path / "parts" / name).stat().st_size


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    """With the same number of steps everything is equal: parameters, averages, log."""
    run(options(tmp_path / "whole", 12))
    task, ends = line_task(), options(tmp_path / "parts", 12)

    def batch(step):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)  # the step that has begun is finished
        return task.batch(step)

    training.train(ends, task._replace(batch=batch), Console(quiet=True))
    assert (tmp_path / "parts" / "checkpoints" / "5").exists()
    run(dataclasses.replace(ends, resume=True))
    whole, parts = (training.load_ema(tmp_path / name, Config) for name in ("whole", "parts"))
    assert whole[0] == parts[0] == Config()  # tuples are tuples again
    jax.tree.map(np.testing.assert_array_equal, whole[1], parts[1])


def test_refusals(tmp_path):
    run(options(tmp_path, 5))
    with pytest.raises(SystemExit, match="holds step 5; add --resume"):
        run(options(tmp_path, 8))
    with pytest.raises(SystemExit, match="trained otherwise.*batch: 96 -> 7"):
        run(options(tmp_path, 8, batch=7, resume=True))
    assert json.loads((tmp_path / "options.json").read_text())["batch"] == 96


@dataclasses.dataclass
class Letters:
    name: str = "letters"

    def sample_attrs(self, rng, n, held_out):
        return rng.integers(0, 26, (n, 1)) + 100 * held_out

    def caption(self, attrs):
        return [str(row[0]) for row in attrs]


def test_a_pool_is_encoded_once_and_dealt_by_the_step(tmp_path):
    def encode(texts, max_len):
        numbers = np.array([float(text) for text in texts], np.float16)
        calls.append(len(texts))
        return np.broadcast_to(numbers[:, None, None], (len(texts), max_len, 2)), numbers[:, None]

    calls = []
    spec = PoolSpec(size=300, seed=1, held_out=True, max_len=4)
    pool = open_pool(tmp_path, spec, Letters(), lambda: encode)
    assert calls == [256, 44]
    np.testing.assert_array_equal(pool.states[:, 0, 0], pool.attrs[:, 0])
    np.testing.assert_array_equal(pool.pooled, pool.attrs)
    open_pool(tmp_path, spec, Letters(), lambda: pytest.fail("encoded again"))

    rows = np.concatenate([pool.rows(step, 64, seed=0) for step in range(10)])
    assert sorted(rows[:300]) == sorted(rows[300:600]) == list(range(300))
    assert (rows[:300] != rows[300:600]).any()
    np.testing.assert_array_equal(pool.rows(3, 64, seed=0), rows[192:256])


@pytest.fixture(scope="module")
def small():
    config = stdit_config(hidden=32, heads=2, depth=1, factor=4)
    return config, init_params(config, seed=0)


def test_the_network_starts_at_zero_and_its_blocks_go_to_muon(small):
    config, params = small
    model = STDiTTransformer(config)
    txt = jnp.ones((1, 5, TEXT_WIDTH))
    out = jax.jit(model.apply)(
        {"params": params}, make_noise(config, 1, 0), jnp.ones(1), txt, txt[..., 0]
    )
    assert out.shape == (1, 48, 8, 8, 8) and not out.any()
    axes = jax.tree_util.tree_leaves_with_path(
        _muon_axes(params), is_leaf=lambda leaf: leaf is None or hasattr(leaf, "output_axis")
    )
    muon = {jax.tree_util.keystr(path) for path, leaf in axes if leaf is not None}
    assert len(muon) == 9 and all("blocks" in name and "kernel" in name for name in muon)


def test_loss_of_a_clip(small):
    """At the start the network gives 0, so the loss is the mean square of data / t."""
    config, params = small
    scene = made_up_scene()
    attrs = moving_nouns.sample_attrs(np.random.default_rng(0), 6, scene)
    clips, key = moving_nouns.clips(scene, attrs), jax.random.key(3)
    txt = np.random.default_rng(1).normal(size=(6, MAX_LEN, TEXT_WIDTH)).astype(np.float16)
    txt[:, 20:] = 0
    assert caption_mask(txt).sum(axis=1).tolist() == [20] * 6
    loss = jax.jit(jax.value_and_grad(make_loss(config, jnp.float32)))
    value, grads = loss(params, key, clips, txt)
    u = (np.arange(6) + jax.random.uniform(jax.random.split(key, 3)[1], (6,))) / 6
    data, t = moving_nouns.to_latent(clips / 127.5 - 1), np.maximum(4 * u / (1 + 3 * u), 0.2)
    expected = (np.square(data).mean(axis=(1, 2, 3, 4)) / t**2).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jnp.abs(grads["final_layer"]["linear"]["kernel"]).max() > 0


def test_training_times_are_the_sampler_s():
    for steps in (1, 7, 20):
        times = SCHEDULE.timesteps(steps, height=32, width=32, num_frames=1) / 1000
        np.testing.assert_allclose(shift_time(np.arange(steps, 0, -1) / steps), times)


def test_sampled_clips_are_clips(small):
    config, params = small
    model = STDiTTransformer(config)
    txt = np.ones((2, MAX_LEN, TEXT_WIDTH), np.float32)
    final = params["final_layer"]["linear"]
    bias = jnp.tile(jnp.linspace(-1.5, 1.5, 48), 4)  # patches are laid out "row column channel"
    params = params | {"final_layer": params["final_layer"] | {"linear": final | {"bias": bias}}}
    clips = sample_clips(model, params, make_noise(config, 2, seed=4), txt, steps=2)
    latents = np.broadcast_to(np.linspace(-1.5, 1.5, 48)[:, None, None, None], (2, 48, 8, 8, 8))
    expected = np.clip(127.5 * moving_nouns.from_latent(latents) + 127.5, 0, 255)
    np.testing.assert_allclose(clips, expected, atol=1e-3)  # the data it gives, whatever the noise


def test_contact_sheet():
    exact = np.arange(4 * 3 * 2 * 2 * 3).reshape(4, 3, 2, 2, 3) % 200
    sheet = contact_sheet(exact, exact + 0.6, across=2)
    assert sheet.shape == (8, 12, 3)
    np.testing.assert_array_equal(sheet[4:6, 8:10], exact[3, 1])


@pytest.fixture(scope="module")
def world():
    return Scenes(scenes.make_things(made_up_scene(), (9, 99, 199)))


@pytest.fixture(scope="module")
def pool(world):
    attrs = world.sample_attrs(np.random.default_rng(0), 40, held_out=False)
    numbers = np.arange(40, dtype=np.float16)
    states = np.broadcast_to(numbers[:, None, None], (40, world.max_len, 384))
    return Pool(attrs=attrs, states=states, pooled=states[:, 0])


def test_batch_of_scenes_is_of_the_step_and_pictures_fit_their_text(world, pool):
    first, again, later = (training_batch(pool, world, 16, 5, step) for step in (2, 2, 3))
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert (values != later[name]).any()
    rows = first["pooled"][:, 0].astype(int)
    np.testing.assert_array_equal(first["txt"][:, 3, 7], rows)
    assert scenes.score(world.things, first["images"], pool.attrs[rows])["right"].all()
    # the same captions in a later pass: other cells
    passes = [training_batch(pool, world, 40, 5, step) for step in (0, 1)]
    in_order = [one["images"][np.argsort(one["pooled"][:, 0])] for one in passes]
    assert 0.2 < (in_order[0] != in_order[1]).any(axis=(1, 2, 3)).mean() < 1


def test_held_out_scores_of_scenes(world, pool):
    """A sampler that draws the first thirty captions exactly, then one that exchanges the cells."""
    cells = scenes.place(world.things, pool.attrs[:30], np.random.default_rng(6))

    def sampler(cells):
        pictures = scenes.compose(world.things, cells).astype(np.float32) / 127.5 - 1
        return lambda params, noise, txt, pooled: nouns.to_latent(pictures)

    scores, sheet = held_out_scores(sampler(cells), world, pool, 30, None)
    assert set(scores) == {*world.accuracies, *world.scores}
    assert scores.pop("clarity") > 100 and set(scores.values()) == {1.0}
    assert sheet.shape == (64, 512, 3)
    scores, _ = held_out_scores(sampler(cells[:, ::-1]), world, pool, 30, None)
    expected = {"single": 1, "two": 1, "counting": 1, "position": 0, "right": 0.6, "place": 0.6}
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
