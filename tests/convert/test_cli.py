"""`convert_and_quantize`: bad input ends with code 2 and a line that names it."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from convert.checkpoint_files import Checkpoint
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import load, read_manifest
from tests.references.flux_files import random_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_conversion_says_what_it_will_do_and_what_it_did(convert, tmp_path, source):
    code, out, errors = convert(source)
    assert (code, errors) == (0, [])
    assert f"{source / WEIGHTS}: flux in diffusers layout, 1 file(s)" in out
    assert "plan: recipe 'w8a8'" in out and "single_blocks/*/modulation/lin" in out
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert f"{written / 1e6:,.1f} MB on disk" in out
    assert load(tmp_path / "out").model == "flux"
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["dtype"], manifest["source"]["layout"]) == ("bfloat16", "diffusers")
    assert list(manifest["source"]["files"]) == [WEIGHTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_names_that_look_like_markup_are_printed_as_they_are(convert, tmp_path, source):
    odd = source.rename(tmp_path / "[bold]flux[")
    code, out, _ = convert(odd, out="[red]out")
    assert code == 0
    assert str(odd) in out and str(tmp_path / "[red]out") in out


def test_a_dry_run_reads_no_weights_and_writes_nothing(convert, snapshot, source, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read"))
    before = snapshot()
    for options, out in ((["--dry-run"], None), (["--dry-run", "--archive"], "out")):
        code, text, errors = convert(source, *options, recipe="flux-1.58bit", out=out)
        assert (code, errors) == (0, [])
        assert "bits per weight over everything stored" in text
    assert snapshot() == before


def truncate(source):
    raw = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def cut_header(source):
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:100])


def duplicate_key(source):
    raw = (source / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].decode()
    first = re.search(r'"[^"]+":\{[^}]*\}', header)[0]
    header = header.replace("{", "{" + first + ",", 1).encode()
    (source / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def pickle(source):
    (source / WEIGHTS).rename(source / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (cut_header, "truncated"),
        (duplicate_key, "the key 'context_embedder.bias' appears twice"),
        (pickle, "diffusion_pytorch_model.bin: starts b"),
        (lambda source: (source / WEIGHTS).unlink(), "holds no file of weights"),
        (lambda source: (source / "config.json").write_text("{"), "config.json: is not valid JSON"),
    ],
)
def test_a_damaged_source(refused, source, damage, message):
    damage(source)
    assert message in refused(source)


def test_a_tensor_in_two_shards(refused, make_source):
    source = make_source(max_shard_bytes=100_000)
    first, second, *_ = sorted(source.glob("*.safetensors"))
    shutil.copy(first, second)
    code_lines = refused(source, lines=None)
    assert re.search(
        r"tensor 'context_embedder.bias' is in 2 shards: .*-00001-.*-00002-", code_lines
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proj_out.bias": None}, "missing tensor 'proj_out.bias' (8,)"),
        ({"more": np.ones(2, np.float32)}, "unknown tensor 'more'"),
        ({"proj_out.bias": np.ones(9, np.float32)}, "'proj_out.bias' has shape (9,)"),
        ({"proj_out.bias": np.ones(8, ml_dtypes.float8_e5m2)}, "'proj_out.bias' is float8_e5m2"),
        ({"proj_out.bias": np.ones(8, np.int32)}, "'proj_out.bias' is int32"),
        ({"proj_out.bias": np.full(8, np.nan, np.float32)}, "NaN or inf in outer/final_layer/lin"),
        ({"x_embedder.weight": None}, "not a known model (flux, "),
    ],
)
def test_a_source_that_does_not_fit(refused, make_source, changes, message):
    assert message in refused(make_source(**changes))


def test_several_problems_take_a_line_each(refused, make_source):
    changes = {"proj_out.bias": None, "more": np.ones(2, np.float32)}
    said = refused(make_source(**changes), lines=3)
    assert "2 problems" in said and "'proj_out.bias'" in said and "'more'" in said


def test_another_model(refused, tmp_path):
    names = ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight")
    path = write_safetensors(
        tmp_path / "model.safetensors", random_tensors(dict.fromkeys(names, (8, 8)))
    )
    assert "its tensors look like 'embeddings.word_embeddings.weight'" in refused(path)
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "--model unet is neither 'auto' nor one of: flux" in refused(path, "--model", "unet")


RULE = {"match": "single_blocks/.*", "weights": {"format": "int8", "quantizer": "absmax"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "recipe: expected an object, found list"),
        (json.dumps({"name": "r", "rules": 5}), "rules: expected a list, found int"),
        (
            json.dumps({"name": "r", "rules": [{"match": 5, "weights": None}]}),
            "match 5 is not a str",
        ),
        (json.dumps({"name": "r", "rule": []}), "unknown fields ['rule']"),
        (json.dumps({"name": "r", "rules": [RULE | {"match": "("}]}), "not a regular expression"),
        (json.dumps({"name": "r", "rules": [RULE | {"act_bits": 9}]}), "act_bits 9 outside 2..8"),
        (json.dumps({"name": "r", "rules": [RULE | {"match": "blocks"}]}), "rule(s) 'blocks'; lay"),
    ],
)
def test_a_recipe_that_does_not_fit(refused, tmp_path, source, text, message):
    (tmp_path / "recipe.json").write_text(text)
    assert message in refused(source, recipe=tmp_path / "recipe.json")
    assert "recipe 'w9' is neither a file nor one of: float" in refused(source, recipe="w9")


def test_what_is_kept_is_said(convert, make_source, tmp_path):
    bad = {"single_transformer_blocks.0.proj_out.weight": np.full((64, 320), np.nan, np.float32)}
    source = make_source(**bad)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"name": "mine", "rules": [RULE], "on_nonfinite": "keep"}))
    code, out, _ = convert(source, recipe=recipe)
    assert code == 0
    assert "NaN or inf kept, in floating point: single_blocks/0/linear2/kernel\n" in out
    kernel = load(tmp_path / "out").params["single_blocks"]["0"]["linear2"]["kernel"]
    assert np.isnan(np.asarray(kernel, np.float32)).all()
