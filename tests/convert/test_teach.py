"""`convert_and_quantize --method`: from prompts alone, estimated before, said in the manifest."""

import dataclasses

import jax
import numpy as np
import pytest

from convert import teach
from convert.port import port
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import load, read_manifest
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reconstruct", "distill"])  # feedback is the first of both
def test_a_method(convert, tmp_path, source, prompts, method, monkeypatch):
    """What is saved has the bytes of plain rounding, other codes, and runs."""
    monkeypatch.setattr(teach, "STEPS", 4)
    monkeypatch.setattr(teach, "_planned", lambda folder, steps: 2)
    options = ["--method", method, "--prompts", str(prompts), "--grid", "2", "2"]
    code, out, errors = convert(source, *options, recipe="flux-1.58bit-a8")
    assert (code, errors) == (0, [])
    assert "a forward takes" in out and "memory, feedback: about" in out
    told = read_manifest(tmp_path / "out")["taught"]
    assert (told["method"], told["prompts"], told["steps"]) == (method, PROMPTS, 4)
    assert [rung["rung"] for rung in told["rungs"]] == ["feedback", method]
    assert told["rungs"][0]["rows"] == PROMPTS * 4
    steps = told["rungs"][1]["steps"]
    assert steps == (2 if method == "distill" else dict.fromkeys(steps, 2))
    taught, plain = load(tmp_path / "out").params, port(source, "flux-1.58bit-a8").params
    assert jax.tree.structure(taught) == jax.tree.structure(plain)
    assert tree_bytes(taught) == tree_bytes(plain)
    pairs = zip(iter_layers(taught), iter_layers(plain), strict=True)
    ternary = [(a, b) for (_, a, _), (_, b, _) in pairs if isinstance(a, QTensor)]
    assert ternary and all(not np.array_equal(a.codes, b.codes) for a, b in ternary)


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


def test_memory_of_full_size_flux():
    """By hand: 23.8 GB of bfloat16; k = 15360, n = 3072; 339.8 M parameters in a double block."""
    params = abstract_params(FLUX_DEV)
    found = teach.memory_bytes(params, "reconstruct", 1, 4608)
    weights = tree_bytes(params)
    assert found["feedback"] == weights + 12 * 15360**2 + 24 * 15360 * 3072
    shapes = jax.tree.leaves(params["double_blocks"])
    block = sum(int(np.prod(leaf.shape[1:])) for leaf in shapes)
    assert 339.7e6 < block < 339.9e6
    activations = 4 * 4608 * (21504 + 15360) * 2
    assert found["reconstruct"] == weights + 16 * block + activations
    assert max(found["feedback"], found["reconstruct"]) < 80e9
    assert teach.memory_bytes(params, "distill", 1, 4608)["distill"] > 80e9
    small = dataclasses.replace(FLUX_DEV, depth=0, depth_single_blocks=1)
    assert teach.memory_bytes(abstract_params(small), "feedback", 1, 4608)["feedback"] < 80e9
