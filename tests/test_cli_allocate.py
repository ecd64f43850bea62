"""`lowbit-jax allocate`: what it prints and writes; its recipe converts the shipped checkpoint."""

import json
import re
from pathlib import Path

import pytest

from convert.__main__ import main as convert
from lowbit_jax.checkpoint import abstract_parts, load, read_manifest
from lowbit_jax.cli import main
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import WeightSpec, load_recipe
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.stacks import iter_layers
from tests.references.sensitivity import random_harm, scan_file

MODEL = Path(__file__).parents[1] / "checkpoints" / "nouns-flux"
# quantisers that compile in no time
MENU = tuple(
    WeightSpec(format=format, quantizer=quantizer)
    for format, quantizer in (("ternary", "absmean"), ("int4", "absmax"), ("int8", "absmax"))
)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A scan of the shipped model's sizes, with harms that nobody measured."""
    fields = json.loads((MODEL / "transformer" / "config.json").read_text())
    network = NETWORKS["flux"]
    config = network.config(
        in_channels=fields["in_channels"],
        vec_in_dim=fields["pooled_projection_dim"],
        context_in_dim=fields["joint_attention_dim"],
        hidden_size=fields["num_attention_heads"] * fields["attention_head_dim"],
        num_heads=fields["num_attention_heads"],
        depth=fields["num_layers"],
        depth_single_blocks=fields["num_single_layers"],
        axes_dim=tuple(fields["axes_dims_rope"]),
        guidance_embed=fields["guidance_embeds"],
    )
    path = tmp_path_factory.mktemp("scan") / "scan.jsonl"
    scan_file(path, "flux", config, network.abstract_params(config), random_harm, menu=MENU)
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_recipe_is_written_that_stores_what_was_said(run, scan, tmp_path):
    """Through the converter, on the trained checkpoint: bits as measured on what was saved."""
    recipe, picture = tmp_path / "mixed.json", tmp_path / "map.png"
    arguments = ("--mean-bits", 4.5, "--out", recipe, "--heat-map", picture)
    code, out, error = run("allocate", scan, *arguments)
    assert (code, error) == (0, "")
    said = re.search(r"([\d,]+) bytes, ([\d.]+) bits per weight over everything", out)
    stored, bits = int(said[1].replace(",", "")), float(said[2])
    assert bits <= 4.5
    assert "double_blocks/*/txt_attn" in out and "scan segments" in out
    assert "units in floating point: none" in out
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 200_000

    folder = tmp_path / "converted"
    assert convert([str(MODEL), "--recipe", str(recipe), "--out", str(folder)]) == 0
    measured = size_report(abstract_parts(read_manifest(folder)))
    assert measured.after == stored
    assert f"{measured.bits_per_weight:.3f}" == f"{bits:.3f}"
    saved = load(folder)
    assert saved.recipe == load_recipe(recipe) and saved.recipe.name == "mixed"
    for path, kernel, _ in iter_layers(saved.params):
        rule = saved.recipe.rule_for(path)
        assert isinstance(kernel, QTensor) == (rule is not None)
        assert rule is None or (kernel.format, kernel.act_bits) == (rule.weights.format, 8)
    segments = sum(len(saved.params[stack]) for stack in ("double_blocks", "single_blocks"))
    assert f"{segments} scan segments" in out


def test_bytes_schemes_and_segments_are_options(run, scan, tmp_path):
    out = tmp_path / "r.json"
    code, text, _ = run(
        *("allocate", scan, "--bytes", 5_000_000, "--scheme", "mse", "--segments", 2),
        *("--act-bits", 0, "--out", out),
    )
    assert code == 0 and "2 scan segments" in text
    assert all(rule.act_bits is None for rule in load_recipe(out).rules)
    code, text, _ = run("allocate", scan, "--mean-bits", 5, "--mean-act-bits", 6, "--out", out)
    assert code == 0 and {rule.act_bits for rule in load_recipe(out).rules} == {4, 8}
    code, text, _ = run("allocate", scan, "--mean-bits", 5, "--like", "viditq-w4a8", "--out", out)
    rules = [rule for rule in load_recipe(out).rules if "_mod" not in rule.match]
    rotated = {rule.rotation for rule in rules if "modulation" not in rule.match}
    assert code == 0 and rotated == {"auto"} and load_recipe(out).needs_statistics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mean-bits", 2.5), "2.500 bits per weight, cannot be reached: the smallest is "),
        ((), "give one of them"),
        (("--mean-bits", 4, "--formats", "int3"), "tried ternary, int4, int8, not int3"),
        (("--mean-bits", 4, "--like", "viditq"), "recipe 'viditq' is neither a file nor one of"),
        (("--mean-bits", 4, "--bytes", 10), "give one of them"),
    ],
)
def test_bad_budgets_are_said_in_a_line(run, scan, tmp_path, arguments, message):
    code, _, error = run("allocate", scan, *arguments, "--out", tmp_path / "r.json")
    assert code == 2 and error.startswith("lowbit-jax: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "r.json").exists()


def test_a_missing_scan_is_said_in_a_line(run, tmp_path):
    code, _, error = run("allocate", tmp_path / "no", "--mean-bits", 4, "--out", tmp_path / "r")
    assert code == 2 and "no such file" in error
