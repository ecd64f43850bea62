"""Saved trees: bit-identical after loading, damage found and named, whole or not there at all."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lowbit_jax import checkpoint, checkpoint_store
from lowbit_jax.checkpoint import OutputError, SavedModelError, Writer, iter_parts, load, save
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES, Recipe, Rule, WeightSpec
from lowbit_jax.quant.report import size_report
from lowbit_jax.quant.transform import quantize, rotate
from tests.references.conversion import TREATMENT

N, K, LAYERS = 48, 330, 4  # k: 2.6 blocks of 128, 66 bytes of trits
PARTS = ["outer", *(f"double_blocks/{i}" for i in range(LAYERS))]


def tree(dtype=np.float32):
    rng = np.random.default_rng(0)
    random = lambda *shape: rng.standard_normal(shape, np.float32).astype(dtype)  # noqa: E731
    stack = {
        "attn": {"qkv": {"kernel": random(LAYERS, K, N), "bias": random(LAYERS, N)}},
        "norm": {"scale": random(LAYERS, 3)},
    }
    outer = {"img_in": {"kernel": random(40, 64), "bias": random(64)}, "gain": random()}
    return jax.tree.map(jnp.asarray, {**outer, "double_blocks": {"0": stack}})


def write(folder, params, recipe=RECIPES["float"], **options):
    save(folder, params, model="flux", config={"depth": 2}, recipe=recipe, **options)
    return folder


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("archive", [False, True], ids=["plain", "archive"])
@pytest.mark.parametrize("recipe", TREATMENT)
def test_every_recipe_comes_back_bit_by_bit(tmp_path, recipe, archive):
    params = quantize(tree(), RECIPES[recipe])
    write(tmp_path / "out", params, RECIPES[recipe], archive=archive)
    saved = load(tmp_path / "out")
    assert_same(saved.params, params)
    assert (saved.recipe, saved.model, saved.config) == (RECIPES[recipe], "flux", {"depth": 2})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.int8, np.uint8])
def test_arrays_of_every_dtype_and_of_no_axes(tmp_path, dtype):
    params = tree(dtype)
    assert params["gain"].shape == ()
    assert_same(load(write(tmp_path / "out", params)).params, params)


def test_what_a_qtensor_knows_is_kept(tmp_path):
    """Static fields, zero points, one scale per tensor, formats that no recipe uses."""
    rng = np.random.default_rng(1)

    def qtensor(format, size, scales, zero, **static):
        array = lambda dtype, *shape: jnp.asarray(rng.integers(0, 99, shape), dtype)  # noqa: E731
        return QTensor(
            codes=array(jnp.uint8 if size != K else jnp.int8, N, size),
            scale=array(jnp.float32, *scales),
            zero=array(jnp.int8, *scales) if zero else None,
            format=format,
            shape=(N, K),
            **static,
        )

    params = {
        "a": {"kernel": qtensor("int6", 288, (1, 1), False, group=K, act_bits=6)},
        "b": {"kernel": qtensor("int4", 192, (N, 3), True, group=128, act_bits=None)},
        "c": {"kernel": qtensor("int8", K, (N, 1), True, group=K, act_bits=8)},
        "d": {"kernel": qtensor("ternary", 96, (N, 11), False, group=32, act_bits=2)},
    }
    found = load(write(tmp_path / "out", params)).params
    assert_same(found, params)
    assert (found["d"]["kernel"].group, found["d"]["kernel"].act_bits) == (32, 2)


def test_masks_rotations_and_static_scales_come_back(tmp_path):
    rng = np.random.default_rng(2)
    params = rotate(tree(), match="img_in", rotation="full", seed=3)
    int8 = WeightSpec(format="int8", quantizer="absmax")
    made = quantize(tree(), Recipe(name="x", rules=(Rule(match=".*", weights=int8, act_bits=8),)))
    mask = jnp.asarray(rng.standard_normal((LAYERS, K), np.float32))
    stack = made["double_blocks"]["0"]["attn"]["qkv"]
    scale = jnp.arange(1.0, LAYERS + 1)
    stack["kernel"] = dataclasses.replace(stack["kernel"], mask=mask, rotation=66, act_scale=scale)
    params["double_blocks"] = made["double_blocks"]
    write(tmp_path / "out", params)
    assert_same(load(tmp_path / "out").params, params)
    manifest = checkpoint.read_manifest(tmp_path / "out")
    plan = dict(checkpoint.abstract_parts(manifest))
    for name, part in iter_parts(params):
        assert jax.tree.structure(plan[name]) == jax.tree.structure(dict(part))
    sizes = size_report(iter_parts(params)), size_report(checkpoint.abstract_parts(manifest))
    assert sizes[0].after == sizes[1].after == sum(x.nbytes for x in jax.tree.leaves(params))
    # a version before there were masks is still read
    manifest["format_version"] = 1
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert_same(load(tmp_path / "out").params, params)


@pytest.mark.parametrize("ocdbt", [False, True], ids=["zarr", "ocdbt"])
def test_a_part_is_orbaxs_and_may_be_of_its_other_kind(tmp_path, ocdbt):
    """orbax reads our folders without us, and we read those of earlier versions, with OCDBT."""
    params = quantize(tree(), RECIPES["w8a8"])
    write(tmp_path / "out", params, RECIPES["w8a8"])
    path = tmp_path / "out" / "params" / "double_blocks.1"
    stored = ocp.PyTreeCheckpointer().restore(path)
    expected = params["double_blocks"]["0"]["attn"]["qkv"]["kernel"].codes[1]
    np.testing.assert_array_equal(stored["attn.qkv.kernel.codes"], expected)
    shutil.rmtree(path)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=True)
    ocp.Checkpointer(handler).save(path, args=ocp.args.PyTreeSave(stored))
    assert (path / "manifest.ocdbt").exists() == ocdbt
    assert_same(load(tmp_path / "out").params, params)


def test_two_folders_of_one_tree_are_equal_in_every_file(tmp_path):
    params = quantize(tree(), MIXED)
    found = []
    for name in ("a", "b"):
        folder = write(tmp_path / name, params, MIXED)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        found.append({path.relative_to(folder): path.read_bytes() for path in paths})
    assert found[0] == found[1] and len(found[0]) > 20


MIXED = Recipe(
    name="mixed",
    rules=(
        Rule(match=".*/0/.*", weights=WeightSpec(format="int8", quantizer="absmax"), act_bits=8),
        Rule(match=".*/[12]/.*", weights=WeightSpec(format="ternary", quantizer="absmean")),
    ),
)


def test_layers_that_differ_come_back_as_the_same_segments(tmp_path):
    params = quantize(tree(), MIXED)
    assert list(params["double_blocks"]) == ["0", "1", "3"]
    folder = write(tmp_path / "out", params, MIXED, archive=True)
    assert_same(load(folder).params, params)
    manifest = checkpoint.read_manifest(folder)
    assert list(manifest["parts"]) == PARTS
    part = checkpoint.read_part(folder, manifest, "double_blocks/1")
    assert part["attn/qkv/kernel"].format == "ternary" and part["attn/qkv/kernel"].layers == 1


def test_parts_are_the_tree_and_no_more(tmp_path):
    params = quantize(tree(), MIXED)
    parts = list(iter_parts(params))
    assert [name for name, _ in parts] == PARTS
    assert_same(checkpoint.assemble(parts), params)
    assert_same(checkpoint.assemble(reversed(parts)), params)  # in any order
    assert [len(part) for _, part in parts] == [3, 3, 3, 3, 3]  # and taking nothing away
    with pytest.raises(ValueError, match=r"double_blocks: layers \[0, 2, 3\] are not 0 to 2"):
        checkpoint.assemble(part for part in parts if part[0] != "double_blocks/1")
    shapes = jax.eval_shape(lambda: quantize(tree(), MIXED))
    manifest = checkpoint.read_manifest(write(tmp_path / "out", params, MIXED, archive=True))
    wanted = dict(iter_parts(shapes))
    found = dict(checkpoint.abstract_parts(manifest))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(wanted)
    ]


def stored_bytes(manifest):
    """By the manifest's shapes alone."""
    arrays = []
    for specs in manifest["parts"].values():
        for spec in specs.values():
            fields = [spec] if spec["kind"] == "array" else [spec["codes"], spec["scale"]]
            arrays += [*fields, *([spec["zero"]] if "zero" in spec else [])]
    return sum(math.prod(x["shape"]) * np.dtype(x["dtype"]).itemsize for x in arrays)


def test_an_archive_is_smaller_by_the_bits_of_its_codes(tmp_path):
    recipe = RECIPES["flux-1.58bit"]
    params = quantize(tree(), recipe)
    sizes = {}
    for archive in (False, True):
        folder = write(tmp_path / str(archive), params, recipe, archive=archive)
        sizes[archive] = stored_bytes(checkpoint.read_manifest(folder))
        report = size_report(iter_parts(params), archive=archive)
        assert report.disk == sizes[archive]
    codes = LAYERS * N * np.array([3 * 128 / 4, K / 5])
    assert sizes[False] - sizes[True] == codes[0] - codes[1] > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint to make damaged copies of."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return write(folder, quantize(tree(), MIXED), MIXED)


@pytest.fixture
def saved(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "out"))


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = change(manifest) or manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("part", ["outer", "double_blocks.1"])
def test_a_flipped_bit_is_found_and_named_or_does_no_harm(saved, part):
    before = load(saved).params
    data = max((saved / "params" / part).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    raw = data.read_bytes()
    said = []
    for place in np.linspace(0, len(raw) - 1, 8).astype(int):
        data.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        try:
            assert_same(load(saved).params, before)  # a byte that no tensor needs
        except SavedModelError as error:
            said.append(str(error))
    assert len(said) >= 4
    assert all(line.startswith(f"{saved}/params/{part}: ") for line in said)
    assert all("\n" not in line and len(line) < 500 for line in said)
    tensor = "img_in.kernel" if part == "outer" else "attn.qkv.kernel.codes"
    assert any(f": tensor {tensor} is damaged (sha256 " in line for line in said)


@pytest.mark.parametrize(
    ("field", "value"), [("sha256", "0" * 64), ("shape", [N, K + 1]), ("dtype", "uint8")]
)
def test_a_tensor_that_is_not_the_manifests_is_named(saved, field, value):
    def change(manifest):
        manifest["parts"]["double_blocks/0"]["attn/qkv/kernel"]["codes"][field] = value

    edit(saved, change)
    with pytest.raises(SavedModelError) as caught:
        load(saved)
    message = f"double_blocks.0: tensor attn.qkv.kernel.codes is damaged ({field} "
    assert message in str(caught.value) and f"manifest says {value})" in str(caught.value)
    assert load(saved, verify=False).model == "flux"


def test_a_part_that_is_gone_is_named(saved):
    shutil.rmtree(saved / "params" / "double_blocks.2")
    with pytest.raises(SavedModelError, match="params/double_blocks.2: missing; convert again"):
        load(saved)
    (saved / "params" / "double_blocks.2").mkdir()
    with pytest.raises(SavedModelError, match="params/double_blocks.2: cannot be read"):
        load(saved)


def rename_tensor(manifest):
    part = manifest["parts"]["outer"]
    part["img_in/weight"] = part.pop("img_in/kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "format_version": 9}, "format_version is 9, this library reads 1, 2"),
        (lambda m: {**m, "layout_version": 9}, "layout_version is 9, this library reads 1; update"),
        (lambda m: {**m, "format": "other"}, "not a lowbit-jax manifest"),
        (lambda m: [m], "not a lowbit-jax manifest"),
        (lambda m: m.pop("recipe") and m, "manifest.json lacks 'recipe'"),
        (lambda m: m.pop("parts") and m, "manifest.json lacks 'parts'"),
        (lambda m: m["parts"].pop("double_blocks/1") and m, r"layers \[0, 2, 3\] are not 0 to 2"),
        (lambda m: {**m, "parts": []}, "manifest.json is malformed"),
        (lambda m: {**m, "parts": {"outer": {"gain": 5}}}, "manifest.json is malformed"),
        (lambda m: {**m, "recipe": {"name": "x", "rules": [{}]}}, "manifest.json is malformed"),
        (rename_tensor, "params/outer: cannot be read"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(saved, change, message):
    edit(saved, change)
    with pytest.raises(SavedModelError, match=message):
        load(saved)


def test_a_folder_without_a_manifest_is_no_checkpoint(saved):
    (saved / "manifest.json").write_text("{ not JSON")
    with pytest.raises(SavedModelError, match="not JSON"):
        load(saved)
    (saved / "manifest.json").unlink()
    with pytest.raises(SavedModelError, match="no manifest.json, so not a finished lowbit-jax"):
        load(saved)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_block_ends_early(tmp_path, error):
    part = {"a": np.zeros(3, np.float32)}
    with pytest.raises(error), Writer(tmp_path / "x" / "y" / "out", {}) as writer:
        writer.write("outer", part)
        assert len(list((tmp_path / "x" / "y").iterdir())) == 1
        raise error
    assert list(tmp_path.iterdir()) == []
    with Writer(tmp_path / "out", {}) as writer:  # and when nobody finished it
        writer.write("outer", part)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        Writer(tmp_path / "out", {"config": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_earlier_checkpoint_stays_until_the_new_one_is_there(saved, monkeypatch):
    before = load(saved)
    rename = Path.rename

    def fail(self, target):
        if self.name == "checkpoint":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="out: cannot be written: Input/output error"):
        write(saved, tree(), overwrite=True)
    monkeypatch.undo()
    assert_same(load(saved).params, before.params)
    assert [path.name for path in saved.parent.iterdir()] == ["out"]
    assert_same(load(write(saved, tree(), overwrite=True)).params, tree())
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_what_orbax_says_about_a_disk_is_one_line(tmp_path, monkeypatch):
    """As tensorstore puts it; whatever it still writes afterwards is removed too."""

    class Full:
        def save(self, path, args):
            raise ValueError(f"RESOURCE_EXHAUSTED: {path}\nFailed [os_error_code='28']")

    monkeypatch.setattr(checkpoint_store, "_handler", Full)
    with pytest.raises(OutputError) as caught:
        write(tmp_path / "out", tree())
    assert re.fullmatch(
        f"{tmp_path}/out: the disk is full: [0-9,.]+ MB free, the next layer takes [0-9.]+ MB.*",
        str(caught.value),
    )
    assert list(tmp_path.iterdir()) == []
