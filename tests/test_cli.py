"""`lowbit-jax`: what it prints of a checkpoint, and how it says that there is none."""

import dataclasses
import json

import numpy as np
import pytest

from lowbit_jax.checkpoint import save
from lowbit_jax.cli import main
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from pallas_kernels.audit.cases import cases
from tests.references.findings import GOOD


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 64, 16), np.float32)
    params = {
        "img_in": {"kernel": kernel[0], "bias": np.zeros(16, np.float32)},
        "single_blocks": {"0": {"linear1": {"kernel": kernel}}},
    }
    recipe = RECIPES["w8a8"]
    source = {"layout": "diffusers", "files": {"model[red].safetensors": "ab" * 32}}
    options = {"model": "flux", "config": {"depth": 0, "note": "[bold]"}, "source": source}
    save(tmp_path / "out[/x]", quantize(params, recipe), recipe=recipe, **options)
    return tmp_path / "out[/x]"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result):
    code, _, error = result
    assert code == 2 and error.startswith("lowbit-jax: ") and error.count("\n") == 1
    return error


def test_inspect_prints_contents_sizes_and_origin(run, folder):
    code, out, error = run("inspect", folder)
    assert (code, error) == (0, "")
    text = " ".join(out.split())
    assert "flux, recipe 'w8a8' (int8 weights per channel, int8 activations per token)" in text
    assert "config: depth 0, note [bold]" in text
    assert f"from model[red].safetensors (diffusers layout), sha256 {'ab' * 32}" in text
    assert "written with" in text and "orbax-checkpoint" in text
    assert "single_blocks/*/linear1 3" in text
    stored = 3 * (64 * 16 + 4 * 16) + 4 * (64 * 16 + 16)
    assert f"{8 * stored / (4 * 64 * 16 + 16):.3f} bits per weight" in text
    assert "matches its digest" not in text


def test_inspect_verifies_when_asked(run, folder):
    assert "every tensor matches its digest" in run("inspect", folder, "--verify")[1]
    data = max(folder.glob("params/single_blocks.1/**/*"), key=lambda p: p.stat().st_size)
    data = max((p for p in data.parent.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert run("inspect", folder)[0] == 0  # it reads no tensor
    assert "params/single_blocks.1: " in refused(run("inspect", folder, "--verify"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, "format_version is 7, this library reads 1, 2, 3"),
        ({"config": None}, "manifest.json is incomplete"),
        ({"parts": {"outer": {"a": {"kind": "array", "shape": [2], "dtype": "??"}}}}, "incomplete"),
        ({"recipe": {}}, "manifest.json is incomplete: 'name'"),
    ],
)
def test_inspect_says_what_is_wrong(run, folder, change, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    assert message in refused(run("inspect", folder))


def test_inspect_of_something_else(run, tmp_path):
    assert "no manifest.json, so not a finished" in refused(run("inspect", tmp_path))
    assert "no manifest.json" in refused(run("inspect", tmp_path / "nowhere"))


def test_recipes_lists_every_name(run):
    code, out, _ = run("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    assert all(recipe.description in out for recipe in RECIPES.values())


@pytest.fixture
def audited(monkeypatch):
    """Lets the audit compile nothing: every job's finding is one good kernel's, changed."""

    def install(**changes):
        jobs = []

        def examine_all(asked, workers):
            for case, target, _ in asked:
                jobs.append((case, target))
                yield dataclasses.replace(GOOD, case=case, target=target, **changes)

        monkeypatch.setattr("lowbit_jax.cli.examine_all", examine_all)
        return jobs

    return install


def test_audit_prints_every_kernel_and_the_figure(run, audited, tmp_path):
    jobs = audited()
    code, out, _ = run(
        "audit", "--ops", "int8_a8", "--targets", "a100", "h100", "--json", tmp_path / "a.json"
    )
    assert code == 0 and jobs == [(c, t) for t in ("a100", "h100") for c in cases(("int8_a8",))]
    written = json.loads((tmp_path / "a.json").read_text())
    assert out.count("128x128x64 w8 s4") == len(written) == len(jobs)
    assert "nothing here is a measured speed" in out and "FAILED" not in out
    assert out.splitlines()[-1] == f"figure: int8_bound_min=1.000 spills=0 kernels={len(jobs)}"


def test_audit_fails_by_name(run, audited):
    audited(spill_bytes=24)
    code, out, _ = run("audit", "--ops", "ternary_a8")
    assert code == 1
    assert "FAILED a100 ternary_a8 4608 x 3072 x 3072: 24 B of registers spilled" in out


def test_audit_of_an_unknown_op(run):
    assert "no op named int5" in refused(run("audit", "--ops", "int5"))
