"""`convert_and_quantize --method`: from prompts alone, estimated before, said in the manifest."""

import dataclasses

import jax
import numpy as np
import pytest

from convert import teach
from convert.port import port
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import load, read_manifest
from lowbit_jax.distill import train
from lowbit_jax.models.flux import FLUX_DEV, abstract_params
from lowbit_jax.quant.qtensor import QTensor, tree_bytes
from lowbit_jax.quant.stacks import iter_layers
from tests.convert.conftest import CONFIG

PROMPTS = 3


@pytest.fixture
def prompts(tmp_path):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((PROMPTS, 3, CONFIG.context_in_dim), np.float32)
    pooled = rng.standard_normal((PROMPTS, CONFIG.vec_in_dim), np.float32)
    return write_safetensors(tmp_path / "prompts.safetensors", {"txt": states, "pooled": pooled})


@pytest.fixture
def teach_by(convert, tmp_path, source, prompts, monkeypatch):
    """Run a method with two steps of training: what the manifest says, ternary layers by path."""
    monkeypatch.setattr(teach, "STEPS", 4)
    monkeypatch.setattr(teach, "_planned", lambda folder, steps: 2)
    options = ["--prompts", str(prompts), "--grid", "2", "2", "--overwrite"]

    def run(method):
        code, out, errors = convert(source, "--method", method, *options, recipe="flux-1.58bit-a8")
        assert (code, errors) == (0, [])
        assert "a forward takes" in out and "memory, feedback: about" in out
        told = read_manifest(tmp_path / "out")["taught"]
        assert (told["method"], told["prompts"], told["steps"]) == (method, PROMPTS, 4)
        taught, plain = load(tmp_path / "out").params, port(source, "flux-1.58bit-a8").params
        assert jax.tree.structure(taught) == jax.tree.structure(plain)
        assert tree_bytes(taught) == tree_bytes(plain)
        pairs = zip(iter_layers(taught), iter_layers(plain), strict=True)
        ternary = {path: (a, b) for (path, a, _), (_, b, _) in pairs if isinstance(a, QTensor)}
        assert ternary and all(not np.array_equal(a.codes, b.codes) for a, b in ternary.values())
        rungs = {rung["rung"]: rung for rung in told["rungs"]}
        assert tuple(rungs) == teach.RUNGS[method]
        assert rungs["feedback"]["rows"] == PROMPTS * 4
        return rungs, {path: layer for path, (layer, _) in ternary.items()}

    return run


@pytest.mark.slow
def test_codes(teach_by):
    """What is saved has the bytes of plain rounding, other codes, and runs."""
    rungs, _ = teach_by("distill")
    first, last = rungs["distill"]["loss"]
    assert rungs["distill"]["steps"] == 2 and last < first


@pytest.mark.slow
def test_blocks_and_then_scales(teach_by):
    """In one folder: the blocks are there and not trained again; then scales move, codes stay."""
    rungs, blocks = teach_by("reconstruct")
    steps = rungs["reconstruct"]["steps"]
    assert steps == dict.fromkeys(steps, 2)
    rungs, scaled = teach_by("scales")
    assert rungs["reconstruct"]["steps"] == steps and rungs["scales"]["steps"] == 2
    assert all(np.array_equal(blocks[path].codes, scaled[path].codes) for path in blocks)
    assert all(not np.array_equal(blocks[path].scale, scaled[path].scale) for path in blocks)


@pytest.mark.slow
def test_a_training_that_helps_nothing_is_left_out(teach_by, monkeypatch):
    """What is saved is the rung before, and the manifest says so."""

    def spoil(loss, parts, *_, **options):
        spoilt = {name: leaf + 1 for name, leaf in parts.trained.items()}
        return train.Fit(trained=spoilt, losses=np.zeros(2, np.float32), step=1, seconds=0.0)

    _, before = teach_by("feedback")
    monkeypatch.setattr(train, "fit", spoil)
    rungs, after = teach_by("distill")
    lower, higher = rungs["distill"]["loss"]
    assert rungs["distill"]["left_out"] and lower < higher
    assert all(np.array_equal(before[path].codes, after[path].codes) for path in before)
    assert all(np.array_equal(before[path].scale, after[path].scale) for path in before)


def test_what_is_missing_is_said(convert, source, prompts, tmp_path, refused):
    assert "give --prompts FILE" in refused(source, "--method", "feedback", recipe="flux-1.58bit")
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n")
    given = ["--method", "feedback", "--grid", "2", "2", "--prompts"]
    said = refused(source, *given, str(lines), recipe="flux-1.58bit")
    assert "only MiniLM (384) is run here" in said
    said = refused(source, *given, str(prompts), "--budget-minutes", "0", recipe="flux-1.58bit")
    assert "must be positive" in said
    lines.write_text("\n")
    assert "holds no prompts" in refused(source, *given, str(lines), recipe="flux-1.58bit")


def test_what_a_rung_has_begun_with_stays(convert, tmp_path, source, prompts, monkeypatch):
    """Blocks that the budget cut short are not gone on with once scales have begun."""
    given = {}

    def note(rung, lesson, run, params, tree, data, rows, seconds, minutes, console):
        given[rung] = params is None, minutes
        return tree, {"rung": rung}

    monkeypatch.setattr(teach, "STEPS", 2)
    monkeypatch.setattr(teach, "_train", note)
    options = ["--method", "scales", "--prompts", str(prompts), "--grid", "2", "2", "--overwrite"]
    assert convert(source, *options, recipe="flux-1.58bit")[0] == 0
    assert given["scales"][0] and not given["reconstruct"][0]  # the float model is let go
    assert 0 < given["reconstruct"][1] < 30 < given["scales"][1] < 60
    (tmp_path / "out.work" / "scales").mkdir()
    assert convert(source, *options, recipe="flux-1.58bit")[0] == 0
    assert given["reconstruct"][1] == 0 < given["scales"][1]


def test_memory_of_full_size_flux():
    """By hand: 23.8 GB of bfloat16; k = 15360, n = 3072; 339.8 M parameters in a double block."""
    params, quantized = abstract_params(FLUX_DEV), 3 * 10**9
    found = teach.memory_bytes(params, quantized, "scales", 1, 4608)
    weights = tree_bytes(params)
    assert found["feedback"] == weights + 12 * 15360**2 + 24 * 15360 * 3072
    shapes = jax.tree.leaves(params["double_blocks"])
    block = sum(int(np.prod(leaf.shape[1:])) for leaf in shapes)
    assert 339.7e6 < block < 339.9e6
    activations = 4 * 4608 * (21504 + 15360) * 2
    assert found["reconstruct"] == weights + 16 * block + activations
    assert max(found["feedback"], found["reconstruct"]) < 80e9
    # outputs of modulation, q k v, attention's projection and both MLP linears; a block's inputs
    outputs = 19 * 2 * (18432 + 9216 + 3072 + 12288 + 3072) + 38 * (9216 + 21504 + 3072)
    held = quantized + 32 * outputs + 57 * 4 * 4608 * 3072
    assert found["scales"] == held + activations < 10e9
    assert teach.memory_bytes(params, quantized, "distill", 1, 4608)["distill"] > 80e9
    small = abstract_params(dataclasses.replace(FLUX_DEV, depth=0, depth_single_blocks=1))
    assert teach.memory_bytes(small, quantized, "feedback", 1, 4608)["feedback"] < 80e9
