"""`calibrate_model`: the statistics that `collect` gives, of every network, cut and resumed."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import calibrate as program
from convert import sampling
from convert.checkpoint_files import open_checkpoint
from convert.minilm import load_minilm
from convert.port import port
from convert.safetensors import write_safetensors
from convert.statistics import load_statistics, save_statistics
from lowbit_jax.calibration.collect import collect
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
from lowbit_jax.checkpoint import read_manifest
from lowbit_jax.models.registry import MODELS, NETWORKS, build
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.samplers import ddpm, loop
from lowbit_jax.samplers.dpm_solver import PIXART_SCHEDULE
from lowbit_jax.samplers.flow_euler import FLUX_DEV_SCHEDULE, FlowSchedule
from lowbit_jax.samplers.guidance import DIT_DIFFUSERS, OPENSORA_1_2
from lowbit_jax.samplers.registry import SAMPLERS
from lowbit_jax.samplers.schedule import space_timesteps
from tests.convert.conftest import CONFIG
from tests.references import (
    dit_files,
    latte_files,
    latte_t2v_files,
    pixart_files,
    stdit3_files,
    stdit_files,
)
from tests.references.conversion import write_checkpoint
from tests.references.video_tables import latte_tables, stdit3_tables, stdit_tables

NOUNS = Path(__file__).parents[2] / "checkpoints" / "nouns-flux"
CLIPS = NOUNS.parent / "moving-nouns-stdit"
TEXTS = ["a red cat with square glasses", "a blue hat"]


@pytest.fixture
def calibrate(tmp_path, capsys):
    """Run the program in this process: (code, stdout, lines of stderr)."""

    def run(source, prompts, *options, steps=2, out="s.safetensors"):
        where = ["--out", str(tmp_path / out)] if out else []
        arguments = [source, "--prompts", prompts, "--steps", steps, *where, *options]
        code = program.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def rejected(calibrate, snapshot):
    """Run it on something bad: the line it says, after checking that nothing changed."""

    def run(*arguments, **named):
        before = snapshot()
        code, _, errors = calibrate(*arguments, **named)
        assert code == 2 and len(errors) == 1, errors
        assert errors[0].startswith("calibrate_model: ")
        assert snapshot() == before
        return errors[0]

    return run


@pytest.fixture
def write(tmp_path):
    def text(*lines, name="prompts.txt"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    return text


@pytest.fixture
def encode(tmp_path):
    """A file of encoded prompts, and what is in it."""

    def write(name="encoded.safetensors", count=2, t=3, width=CONFIG.context_in_dim, **more):
        rng = np.random.default_rng(0)
        tensors = {"txt": rng.standard_normal((count, t, width), np.float32)}
        for key, shape in more.items():
            tensors[key] = rng.standard_normal(shape, np.float32)
        return write_safetensors(tmp_path / name, tensors, overwrite=True), tensors

    return write


def noise(i, *shape):
    """Of sample i with seed 0."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (1, *shape))


def test_the_shipped_flux(calibrate, write, tmp_path):
    """Text to the bytes that `collect` gives in Python, with X^T X of a recipe's linears."""
    options = ["--grid", 8, 8, "--dtype", "f32", "--ranges", 2, "--grams", ".*/img_mlp/.*"]
    code, said, errors = calibrate(NOUNS, write(*TEXTS), *options, steps=4)
    assert (code, errors) == (0, [])
    assert "2 samples x 4 steps = 8 forwards of batch 1 (flow-matching Euler)" in said

    saved = port(NOUNS, dtype=jnp.float32)
    settings = json.loads((NOUNS / "scheduler" / "scheduler_config.json").read_text())
    run = flux_run(
        build(saved.model, saved.config),
        FlowSchedule.from_json(settings).sigmas(4, 64),
        TimestepRanges((0, 0.5, 1)),
        grid=(8, 8),
        grams=".*/img_mlp/.*",
    )
    txt, pooled = map(jnp.asarray, load_minilm()(TEXTS, 32))
    samples = [flux_sample(noise(i, 64, 48), txt[i : i + 1], pooled[i : i + 1]) for i in range(2)]
    expected = save_statistics(tmp_path / "expected", collect(run, saved.params, samples))
    assert (tmp_path / "s.safetensors").read_bytes() == expected.read_bytes()


def test_the_shipped_stdit(calibrate, write, tmp_path):
    """Its schedule is in a file: times shifted by 4, of a network that gives the data."""
    caption = "a noun with a cat head, blue glasses and a red body moves up slowly"
    options = ["--dtype", "f32", "--guidance", 1.5]
    code, said, errors = calibrate(CLIPS, write(caption), *options)
    assert (code, errors) == (0, [])
    assert "2 steps = 2 forwards of batch 2 (OpenSORA's rectified flow, guidance 1.5)" in said

    saved = port(CLIPS, dtype=jnp.float32)
    times, after = np.array([1000, 800]), np.array([800, 0])  # 4 u / (1 + 3 u) at u = 1, 1/2
    steps = loop.Steps.of(np.float32(times), keep=after / times, push=1 - after / times)
    model = build(saved.model, saved.config)
    run = video_run(model, steps, guidance=OPENSORA_1_2, scale=1.5)
    states = jnp.asarray(load_minilm()([caption], 32)[0], jnp.float32)
    start = noise(0, 48, 8, 8, 8)
    one = caption_sample(run, saved.params, start, (states, (states != 0).any(axis=-1)))
    expected = save_statistics(tmp_path / "expected", collect(run, saved.params, [one]))
    assert (tmp_path / "s.safetensors").read_bytes() == expected.read_bytes()


def test_cut_resumed_and_used(calibrate, source, encode, tmp_path, monkeypatch, rejected, convert):
    """Equal to the byte to a run in one go; and a conversion takes it."""
    prompts, _ = encode(pooled=(2, CONFIG.vec_in_dim))
    given = [source, prompts, "--grid", 2, 2, "--recipe", "viditq-w8a8"]
    assert calibrate(*given, out="whole.safetensors")[0] == 0

    def die(*arguments, **named):
        save_statistics(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(program, "save_statistics", die)
        code, _, errors = calibrate(*given)
    assert code == 130 and "interrupted; what was sampled before is in" in errors[0]
    out = tmp_path / "s.safetensors"
    kept = program.partial_file(out)
    params = MODELS["flux"].abstract_params(CONFIG)
    assert load_statistics(kept, params).samples == 1 and not out.exists()
    assert "pass --resume to go on with it" in rejected(*given)
    said = rejected(*given, "--resume", "--seed", 1)
    assert "`resume` is of other parameters, settings or samples" in said
    code, said, _ = calibrate(*given, "--resume")
    assert code == 0 and "1 samples are there; 1 to go" in said
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not kept.exists()

    assert convert(source, "--stats", str(out), recipe="viditq-w8a8")[0] == 0
    assert read_manifest(tmp_path / "out")["statistics"]["samples"] == 2


def test_a_lora_is_watched_merged(calibrate, make_source, encode, tmp_path, rejected):
    """The same statistics as of a checkpoint whose tensor was changed by hand."""
    rng, name = np.random.default_rng(1), "single_transformer_blocks.0.proj_out"
    source, (prompts, _) = make_source(), encode(pooled=(2, CONFIG.vec_in_dim))
    with open_checkpoint(source) as checkpoint:
        weight = np.float32(checkpoint.read(f"{name}.weight"))
    down, up = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, weight.shape[1]), (len(weight), 2))
    )
    ends = {"lora_A.weight": down, "lora_B.weight": up}
    lora = write_safetensors(
        tmp_path / "style.safetensors", {f"transformer.{name}.{end}": x for end, x in ends.items()}
    )
    by_hand = make_source("merged", **{f"{name}.weight": weight + 0.5 * up @ down})
    options = ["--grid", 2, 2, "--dtype", "f32"]
    code, said, _ = calibrate(source, prompts, "--lora", f"{lora}=0.5", *options)
    assert code == 0 and "merging style.safetensors x 0.5: 1 linears, rank up to 2" in said
    for of, out in ((by_hand, "by_hand"), (source, "without")):
        assert calibrate(of, prompts, *options, out=f"{out}.safetensors")[0] == 0
    params = MODELS["flux"].abstract_params(CONFIG)
    found, expected, without = (
        load_statistics(tmp_path / f"{n}.safetensors", params).layers
        for n in ("s", "by_hand", "without")
    )
    for layer, statistics in found.items():
        np.testing.assert_allclose(statistics.squares, expected[layer].squares, rtol=1e-4)
    last = "single_blocks/1/linear1"  # behind the changed one
    assert not np.allclose(found[last].squares, without[last].squares, rtol=1e-2)
    assert "none is given" in rejected(source, prompts, "--lora-skip", "x", out="other.safetensors")


def test_guided_pixart(calibrate, encode, tmp_path):
    """diffusers' layout stores no null caption: `negative` is of the file; masks are heeded."""
    config, t = pixart_files.TINY, 4
    source = pixart_files.write_diffusers(tmp_path / "source", config)
    width = config.caption_channels
    prompts, given = encode(t=t, width=width, mask=(2, t), negative=(t, width), negative_mask=(t,))
    given["mask"][:] = [[1, 1, 1, 0], [1, 1, 0, 0]]
    given["negative_mask"][:] = [1, 0, 0, 0]
    write_safetensors(prompts, given, overwrite=True)
    code, said, errors = calibrate(source, prompts, "--dtype", "f32", "--grid", 3, 5)
    assert (code, errors) == (0, []) and "of batch 2 (DPM-Solver++ 2M, guidance 4.5)" in said

    saved = port(source, dtype=jnp.float32)
    run = pixart_run(build(saved.model, saved.config), PIXART_SCHEDULE.steps(2), scale=4.5)
    negative = jnp.asarray(given["negative"])[None], jnp.asarray([[True, False, False, False]])
    samples = [
        caption_sample(
            run,
            saved.params,
            noise(i, 3, 6, 10),
            (given["txt"][i : i + 1], given["mask"][i : i + 1] != 0),
            negative,
        )
        for i in range(2)
    ]
    expected = save_statistics(tmp_path / "expected", collect(run, saved.params, samples))
    assert (tmp_path / "s.safetensors").read_bytes() == expected.read_bytes()


def test_guided_dit_of_labels_goes_on_with_more(calibrate, write, tmp_path):
    """Steps that add noise have their key; a line more in the file is a sample more."""
    config = dit_files.TINY
    source, labels = dit_files.write_source(tmp_path / "source", config), write(3)
    assert calibrate(source, labels, "--dtype", "f32", "--guidance", 1.5)[0] == 0
    labels = write(3, 7)
    code, said, _ = calibrate(source, labels, "--dtype", "f32", "--guidance", 1.5, "--resume")
    assert code == 0 and "1 samples are there; 1 to go" in said

    saved = port(source, dtype=jnp.float32)
    steps = ddpm.DIT_SCHEDULE.steps_at(space_timesteps(1000, "2"))
    model = build(saved.model, saved.config)
    run = dit_run(model, steps, scale=1.5, guidance=DIT_DIFFUSERS)
    samples = [
        dit_sample(
            run,
            noise(i, 3, 8, 8),
            np.int32([label]),
            jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 1),
        )
        for i, label in enumerate((3, 7))
    ]
    expected = save_statistics(tmp_path / "expected", collect(run, saved.params, samples))
    assert (tmp_path / "s.safetensors").read_bytes() == expected.read_bytes()


def original(files, tables, heads, folder):
    tiny = files.TINY
    made = {name: np.asarray(table, np.float32) for name, table in tables(tiny).items()}
    shapes = files.original_shapes(tiny)
    return write_checkpoint(folder, shapes, {heads: tiny.num_heads}, dtype=np.float32, **made)


def diffusers_latte(folder):
    shapes = latte_t2v_files.diffusers_shapes(latte_t2v_files.TINY)
    return write_checkpoint(
        folder, shapes, latte_t2v_files.diffusers_config(latte_t2v_files.TINY), dtype=np.float32
    )


# name -> how a checkpoint is written, options, what the plan says of the sampler
OTHERS = {
    "pixart": (
        lambda folder: pixart_files.write_original(folder, pixart_files.TINY_ORIGINAL),
        [],
        "DPM-Solver++ 2M, guidance 4.5",
    ),
    "latte": (
        partial(original, latte_files, latte_tables, "num_attention_heads"),
        [],
        "DDPM / IDDPM, guidance 7",
    ),
    "latte-t2v": (diffusers_latte, ["--frames", "3"], "DDIM, guidance 7.5"),
    "stdit": (
        partial(original, stdit_files, stdit_tables, "num_heads"),
        ["--grid", "2", "3"],
        "DDPM / IDDPM, guidance 7",
    ),
    "stdit3": (
        partial(original, stdit3_files, stdit3_tables, "num_heads"),
        ["--grid", "2", "3", "--frames", "5"],
        "OpenSORA's rectified flow, guidance 7",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_plans_of_the_other_networks(calibrate, encode, write, tmp_path, name):
    """Traced with the samples and steps that would be run; nothing is written."""
    make, options, said = OTHERS[name]
    tiny = {
        "pixart": pixart_files.TINY_ORIGINAL,
        "latte": latte_files.TINY,
        "latte-t2v": latte_t2v_files.TINY,
        "stdit": stdit_files.TINY,
        "stdit3": stdit3_files.TINY,
    }[name]
    if name == "latte":
        prompts = write(3, 9)
    else:
        t, width = getattr(tiny, "null_caption_length", 0) or 4, tiny.caption_channels
        more = {} if hasattr(tiny, "null_caption_length") else {"negative": (t, width)}
        prompts, _ = encode(t=t, width=width, **more)
    source = make(tmp_path / "source")
    code, out, errors = calibrate(source, prompts, *options, "--dry-run", out=None)
    assert (code, errors) == (0, []), errors
    linears = len(list(program.layer_paths(MODELS[name].abstract_params(tiny))))
    assert f"{linears} linears" in out
    assert f"2 samples x 2 steps = 4 forwards of batch 2 ({said})" in out


def test_every_network_has_its_schedule():
    assert set(sampling.SCHEDULES) == set(NETWORKS) == set(sampling.SCALES) | {"flux"}
    for name, network in NETWORKS.items():
        assert type(sampling.SCHEDULES[name]) in [SAMPLERS[s].schedule for s in network.samplers]


def test_what_recipes_need():
    """By hand: all linears of blocks but modulations; both halves of time for v1."""
    params = MODELS["flux"].abstract_params(CONFIG)
    blocks = [f"single_blocks/{i}/linear{j}" for i in range(2) for j in (1, 2)]
    assert program.recipe_needs(RECIPES["viditq-w4a8"], params) == ("|".join(blocks), 1)
    assert program.recipe_needs(RECIPES["viditq-w8a8"], params) == (None, 1)
    assert program.recipe_needs(RECIPES["viditq-v1-w4a8"], params) == (None, 2)
    assert program.recipe_needs(RECIPES["naive-w8a8"], params) == (None, 1)
    with pytest.raises(ValueError, match="'w8a8' needs no statistics"):
        program.recipe_needs(RECIPES["w8a8"], params)


def test_the_plan_of_a_recipe(calibrate, source, encode):
    """Bytes by hand: channels and halves of time, k^2 of what has error feedback."""
    prompts, _ = encode(pooled=(2, CONFIG.vec_in_dim))
    widths = [
        kernel.shape[-2]
        for path, kernel in jax.tree_util.tree_leaves_with_path(
            MODELS["flux"].abstract_params(CONFIG)
        )
        for _ in range(kernel.shape[0] if "single_blocks" in str(path[0]) else 1)
        if path[-1].key == "kernel"
    ]
    options = ["--grid", 2, 2, "--dry-run"]
    _, said, _ = calibrate(
        source, prompts, *options, "--recipe", "viditq-v1-w4a8", steps=8, out=None
    )
    total = sum(2 * (20 * k + 8) for k in widths)
    assert f"statistics: {total / 1e6:,.1f} MB to write; X^T X of 0 linears" in said
    assert "2 timestep range(s)" in said
    _, said, _ = calibrate(source, prompts, *options, "--recipe", "viditq-w4a4", out=None)
    assert "X^T X of 4 linears" in said


def test_bad_arguments_are_refused_by_name(rejected, source, encode, write, tmp_path):
    prompts, _ = encode(pooled=(2, CONFIG.vec_in_dim))
    ok = ["--grid", 2, 2]
    assert "give --out FILE" in rejected(source, prompts, *ok, out=None)
    assert "no folder" in rejected(source, prompts, *ok, out="no/s.safetensors")
    assert "needs no statistics" in rejected(source, prompts, *ok, "--recipe", "w4a16")
    assert "no linear; they look like" in rejected(source, prompts, *ok, "--grams", "blocks")
    assert "--grams '('" in rejected(source, prompts, *ok, "--grams", "(")
    said = rejected(source, prompts, *ok, "--grams", ".*", "--recipe", "viditq-w4a8")
    assert "leave --grams out" in said
    said = rejected(source, prompts, *ok, "--ranges", 3, "--recipe", "viditq-v1-w4a8")
    assert "has masks for 2" in said
    assert "falls into [0, 0.125]" in rejected(source, prompts, *ok, "--ranges", 8)
    assert "--frames 3" in rejected(source, prompts, *ok, "--frames", 3)
    assert "give one" in rejected(source, prompts, *ok, "--resume", "--overwrite")
    assert "No such file" in rejected(source, tmp_path / "none.txt", *ok)
    assert "only MiniLM (384)" in rejected(source, write("a cat"), *ok)
    taken = tmp_path / "taken.safetensors"
    write_safetensors(taken, {"x": np.ones(3)})
    assert "exists already" in rejected(source, prompts, *ok, out=taken.name)
    said = rejected(source, prompts, *ok, "--overwrite", out=taken.name)
    assert "holds no statistics" in said
    (source / "model_index.json").write_text("{}")
    assert "a whole pipeline; give" in rejected(source, prompts, *ok)


def test_bad_prompts_are_refused_by_name(rejected, source, encode, tmp_path):
    width, ok = CONFIG.vec_in_dim, ["--grid", 2, 2]
    file, good = encode(pooled=(2, width))

    def changed(**tensors):
        kept = {name: array for name, array in (good | tensors).items() if array is not None}
        return write_safetensors(file, kept, overwrite=True)

    bad = good["pooled"].copy()
    bad[1, 3] = np.nan
    assert "pooled of prompt(s) 1 holds NaN" in rejected(source, changed(pooled=bad), *ok)
    assert "missing tensors ['pooled']" in rejected(source, changed(pooled=None), *ok)
    assert "unknown tensors ['text']" in rejected(source, changed(text=np.ones(2)), *ok)
    assert "txt is (2, 3, 5)" in rejected(source, changed(txt=np.ones((2, 3, 5))), *ok)
    assert "txt is (0, 3," in rejected(source, changed(txt=good["txt"][:0]), *ok)
    said = rejected(source, changed(mask=np.ones((2, 4)), pooled=bad[:1]), *ok)
    assert "mask is (2, 4), not (2, 3); pooled is (1," in said
    said = rejected(source, changed(negative_mask=np.ones(3)), *ok)
    assert "negative_mask without negative" in said


def test_labels_and_networks_are_refused_by_name(rejected, write, encode, tmp_path):
    source = dit_files.write_source(tmp_path / "dit")
    assert "line 2: label 10; the model has 0 to 9" in rejected(source, write(3, 10))
    assert "line 1: 'cat' is no class label" in rejected(source, write("cat"))
    assert "holds no class labels" in rejected(source, write(""))
    assert "is for 4 4 alone" in rejected(source, write(3), "--grid", 4, 8)
    (source / "scheduler").mkdir()
    file = source / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    assert "a FlowSchedule; dit is sampled with ddpm or ddim" in rejected(source, write(3))
    alone = shutil.copytree(CLIPS / "transformer", tmp_path / "without a schedule")
    assert "gives no variance, which the published sampler" in rejected(alone, write("a cat"))
    pixart = pixart_files.write_diffusers(tmp_path / "pixart")
    prompts, _ = encode(width=pixart_files.TINY.caption_channels)
    assert "stores no null caption" in rejected(pixart, prompts)


def test_a_schedule_beside_the_weights_is_taken(calibrate, source, encode):
    prompts, _ = encode(pooled=(2, CONFIG.vec_in_dim))
    with program.open_checkpoint(source) as checkpoint:
        job = program.plan(checkpoint, RECIPES["float"])
        plain = program.make_subject(job, prompts, program.Settings(steps=3, grid=(2, 2))).run
        (source / "scheduler").mkdir()
        (source / "scheduler" / "scheduler_config.json").write_text(
            '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}'
        )
        shifted = program.make_subject(job, prompts, program.Settings(steps=3, grid=(2, 2))).run
    np.testing.assert_array_equal(plain.steps.timestep, FLUX_DEV_SCHEDULE.sigmas(3, 4)[:-1])
    np.testing.assert_array_equal(shifted.steps.timestep, FlowSchedule().sigmas(3, 4)[:-1])
