"""facebook's DiT files: tree and output, sizes from shapes, position table, and the way back."""

import dataclasses
import json
import math
from argparse import Namespace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import dit, export
from convert.checkpoint_files import Checkpoint, open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.job import plan, run
from convert.registry import recognise
from convert.safetensors import write_safetensors
from convert.table import check, check_constants
from lowbit_jax import cli
from lowbit_jax.checkpoint import load, read_manifest
from lowbit_jax.models.dit import DIT_XL_2_256, SIZES, DiTConfig, DiTTransformer
from lowbit_jax.models.dit import dit as published
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES
from tests.references import dit_files
from tests.references.conversion import (
    assert_same,
    assert_same_files,
    ported,
    source_shapes,
)

torch = pytest.importorskip("torch", reason="the reference is torch")

from tests.references.dit_original import (  # noqa: E402
    meta_dit,
    original_dit,
    original_params,
    positions,
    run_original,
)

# Both sum in float32, in different orders. At steps other than 0 comes the embedding: frequencies
# rounded to float32 by other means, times up to 999. (As against diffusers.)
AT_ZERO, AT_USUAL = 4e-6, 5e-5
FACEBOOK = {"time_shift": 0, "mlp_norm_eps": 1e-6}
TINY = dataclasses.replace(dit_files.TINY, **FACEBOOK)
HEADS = {"num_attention_heads": TINY.num_heads}


def inputs(config, batch=3):
    rng = np.random.default_rng(1)
    size = (batch, config.in_channels, config.sample_size, config.sample_size)
    return {
        "x": rng.standard_normal(size, np.float32),
        "timestep": np.array([500, 3, 999], np.int32)[:batch],
        "labels": np.array([config.num_classes, 0, 3], np.int32)[:batch],
    }


def save(folder, value, *, name="model.pt", heads=HEADS, legacy=False):
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name, _use_new_zipfile_serialization=not legacy)
    if heads:
        (folder / "config.json").write_text(json.dumps(heads))
    return folder


def relative_error(out, expected):
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


def assert_parity(model, params, config, batch=3):
    usual = inputs(config, batch)
    apply = jax.jit(DiTTransformer(config).apply)
    for given, bound in ((usual | {"timestep": 0 * usual["timestep"]}, AT_ZERO), (usual, AT_USUAL)):
        out = np.asarray(apply({"params": params}, **given))
        assert relative_error(out, run_original(model, given)) < bound


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="patch-2"),
        pytest.param({"patch_size": 4, "sample_size": 12, "in_channels": 4}, id="patch-4"),
        pytest.param({"patch_size": 8, "sample_size": 16, "learn_sigma": False}, id="patch-8"),
        pytest.param({"num_heads": 4, "depth": 1, "num_classes": 3}, id="heads"),
    ],
)
def test_what_torch_saves_gives_its_tree_and_its_output(tmp_path, changes):
    config = dataclasses.replace(TINY, **changes)
    model = original_dit(config)
    heads = {"num_attention_heads": config.num_heads}
    job, params = ported(save(tmp_path, model.state_dict(), heads=heads))
    assert (job.model, job.layout.name, job.config) == ("dit", "original", config)
    expected = original_params(model.state_dict(), config)  # by a mapping of its own
    assert_same(params, jax.tree.map(jnp.asarray, expected))
    assert_parity(model, params, config)


@pytest.mark.slow
def test_full_width_blocks_equal_the_reference(tmp_path):
    """Two blocks at DiT-XL/2's own width, classes and tokens; the heads follow from the width."""
    config = dataclasses.replace(DIT_XL_2_256, depth=2, **FACEBOOK)
    model = original_dit(config)
    job, params = ported(save(tmp_path, model.state_dict(), heads=None))
    assert job.config == config
    assert_parity(model, params, config, batch=2)


def test_both_layouts_differ_where_their_code_does(tmp_path):
    """Same weights, facebook's arithmetic and diffusers': a mistake would pass each alone."""
    model = original_dit(TINY)
    _, params = ported(save(tmp_path, model.state_dict()))
    given = inputs(TINY)
    theirs = np.asarray(DiTTransformer(dit_files.TINY).apply({"params": params}, **given))
    assert relative_error(theirs, run_original(model, given)) > 100 * AT_USUAL


def test_a_training_checkpoint_gives_its_moving_average(tmp_path):
    model, ema = original_dit(TINY, seed=1), original_dit(TINY, seed=2)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = {
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "ema": ema.state_dict(),
        "opt": optimizer.state_dict(),
        "args": Namespace(model="DiT-XL/2", image_size=256, lr=1e-4),
    }
    for legacy in (False, True):
        folder = save(tmp_path / f"{legacy}", saved, legacy=legacy)
        for weights, source in (("auto", ema), ("ema", ema), ("model", model)):
            written = []
            with open_checkpoint(folder, weights) as checkpoint:
                job = plan(checkpoint, RECIPES["float"], dtype=np.float32)
                run(job, lambda *part, into=written: into.append(part))
                notes = checkpoint.notes
            parts = {name: part for name, part, _ in written}
            stored = source.state_dict()["final_layer.linear.weight"].numpy()
            np.testing.assert_array_equal(parts["outer"]["final_layer/linear/kernel"], stored.T)
            other = "'ema'" if weights == "model" else "'model'"
            assert f"left {other}, 'opt', 'args'" in notes[0]
            assert len(notes) == (2 if weights == "model" else 1)


def shapes_of(config):
    """Name -> shape of every tensor of the published file of a config, by the torch module."""
    return {name: tuple(value.shape) for name, value in meta_dit(config).state_dict().items()}


class Shapes(SimpleNamespace):
    """As much of a `Checkpoint` as sizes are read from."""

    def __init__(self, shapes, config=None):
        super().__init__(shapes=shapes, names=tuple(sorted(shapes)), config=config, source="x.pt")

    def info(self, name):
        return SimpleNamespace(shape=self.shapes[name])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("sample", [32, 64])
def test_all_published_sizes_follow_from_shapes(size, patch, sample):
    config = dataclasses.replace(published(size, patch, sample), **FACEBOOK)
    shapes = shapes_of(config)
    checkpoint = Shapes(shapes)
    assert recognise(checkpoint) == ("dit", dit.ORIGINAL)
    assert dit.read_config(checkpoint, dit.ORIGINAL) == config
    table = {"pos_embed": (1, (sample // patch) ** 2, config.hidden_size)}
    assert source_shapes("dit", config, dit.ORIGINAL) | table == shapes


def test_the_published_model_by_arithmetic():
    """DiT-XL/2 for 256 x 256: 675,129,632 numbers, as facebook's training program prints."""
    h, depth = 1152, 28
    block = (3 * h + h + 4 * h + 4 * h + 6 * h) * h + (3 * h + h + 4 * h + h + 6 * h)
    times = 256 * h + h + h * h + h
    final = 2 * h * h + 2 * h + 2 * 2 * 8 * h + 2 * 2 * 8
    whole = depth * block + times + 1001 * h + (4 * 2 * 2 * h + h) + final + 256 * h
    shapes = shapes_of(dataclasses.replace(DIT_XL_2_256, **FACEBOOK))
    assert whole == sum(math.prod(shape) for shape in shapes.values()) == 675_129_632
    assert len(shapes) == 28 * 10 + 2 + 4 + 1 + 1 + 4
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["t_embedder.mlp.0.weight"] == (1152, 256)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert shapes["blocks.27.adaLN_modulation.1.bias"] == (6912,)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (2304, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, None, 'heads of a width of 80 are in no tensor .*384.*"num_attention_heads": N'),
        ({}, {"num_attention_heads": 3}, "hidden_size 80 is not a multiple of num_heads 3"),
        ({}, {"num_attention_heads": "2"}, "num_attention_heads is '2', not an integer"),
        ({"pos_embed": (1, 15, 80)}, HEADS, "'pos_embed' has 15 positions, which is no square"),
        ({"pos_embed": (16, 80)}, HEADS, r"'pos_embed' has shape \(16, 80\), not 3 axes"),
        ({"pos_embed": None}, HEADS, "has no tensor 'pos_embed'"),
        ({"x_embedder.proj.weight": (80, 12)}, HEADS, r"has shape \(80, 12\), not 4 axes"),
        ({"final_layer.linear.weight": (20, 80)}, HEADS, "out_channels is 5; the network predicts"),
        ({"x_embedder.proj.weight": (80, 3, 2, 3)}, HEADS, r"\(80, 3, 2, 3\), .*\(80, 3, 2, 2\)"),
        ({"blocks.1.attn.qkv.weight": None}, HEADS, "missing tensor 'blocks.1.attn.qkv.weight'"),
        ({"blocks.0.attn.q_norm.weight": (40,)}, HEADS, "unknown tensor 'blocks.0.attn.q_norm.w"),
    ],
)
def test_sizes_that_do_not_fit_are_named(tmp_path, change, config, message):
    shapes = {name: shape for name, shape in (shapes_of(TINY) | change).items() if shape}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save(tmp_path, tensors, heads=config)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        plan(checkpoint, RECIPES["float"])


@pytest.mark.parametrize("grid", [4, 16, 32])
def test_the_published_table_is_the_one_the_model_computes(grid):
    """To the last bit of float32, the check allows 1e-6."""
    config = dataclasses.replace(TINY, sample_size=2 * grid, hidden_size=96)
    (constant,) = dit.ORIGINAL.constants
    found, expected = np.asarray(constant.value(config)), positions(grid, 96)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-8)


def turned(table):
    """Rows first, columns second: what everybody gets wrong."""
    return table.reshape(1, 4, 4, 80).transpose(0, 2, 1, 3).reshape(1, 16, 80)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda table: table + np.float32(5e-7), None),
        (lambda table: table + np.float32(3e-6), "differs by 3"),
        (lambda table: table.astype(ml_dtypes.bfloat16), None),
        (lambda table: table.astype(np.float16), None),
        (lambda table: (table + np.float32(0.02)).astype(ml_dtypes.bfloat16), "differs by 0.02"),
        (turned, "differs by"),
        (lambda table: 0 * table, "differs by 1 from what the model computes"),
        (lambda table: np.where(np.arange(80) == 7, np.nan, table), "differs by nan"),
    ],
    ids=[
        "last-bits",
        "changed",
        "bfloat16",
        "float16",
        "changed-bfloat16",
        "turned",
        "zero",
        "nan",
    ],
)
def test_the_stored_table_is_compared_not_dropped(tmp_path, change, error):
    state = {k: v.numpy() for k, v in original_dit(TINY).state_dict().items()}
    path = write_safetensors(
        tmp_path / "a.safetensors", state | {"pos_embed": change(state["pos_embed"])}
    )
    (tmp_path / "config.json").write_text(json.dumps(HEADS))
    if error is None:
        assert "pos_embed" not in ported(path)[1]
    else:
        with pytest.raises(CheckpointError, match=f"tensor 'pos_embed' {error}"):
            ported(path)


def test_a_table_that_publishers_may_leave_out(tmp_path):
    state = {k: v.numpy() for k, v in original_dit(TINY).state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(HEADS))
    job, _ = ported(write_safetensors(tmp_path / "a.safetensors", state))
    ((constant, value),) = job.constants.items()
    del state["pos_embed"]
    path = write_safetensors(tmp_path / "b.safetensors", state)
    with open_checkpoint(path) as checkpoint:
        optional = {dataclasses.replace(constant, optional=True): value}
        check(checkpoint, job.leaves, "dit", optional)
        check_constants(checkpoint, optional)
        with pytest.raises(CheckpointError, match=r"missing tensor 'pos_embed' \(1, 16, 80\)"):
            check(checkpoint, job.leaves, "dit", job.constants)


def test_progress_counts_the_table_and_a_plan_reads_nothing(tmp_path, monkeypatch):
    save(tmp_path, original_dit(TINY).state_dict())
    with open_checkpoint(tmp_path) as checkpoint:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read"))
            job = plan(checkpoint, RECIPES["float"])
        steps = []
        run(job, lambda name, part, bad: None, lambda *step: steps.append(step))
    assert sum(nbytes for _, nbytes in steps) == checkpoint.total_bytes
    assert dict(steps)["pos_embed"] == 16 * 80 * 4


def test_a_latte_is_not_taken_for_a_dit():
    shapes = shapes_of(TINY) | {"temp_embed": (1, 16, 80)}
    assert not dit.ORIGINAL.matches(shapes)
    assert dit.ORIGINAL.matches(shapes_of(TINY)) and not dit.DIFFUSERS.matches(shapes_of(TINY))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_export_is_the_source_bit_by_bit(tmp_path, dtype):
    state = {k: v.numpy().astype(dtype) for k, v in original_dit(TINY).state_dict().items()}
    (tmp_path / "source").mkdir()
    write_safetensors(tmp_path / "source" / "model.safetensors", state)
    (tmp_path / "source" / "config.json").write_text(json.dumps(HEADS))
    job, params = ported(tmp_path / "source", dtype=dtype)
    out = tmp_path / "out"
    export_diffusers(out, params, "dit", job.config, layout="original", dtype=dtype)
    assert_same_files(tmp_path / "source", out)
    assert_same(ported(out, dtype=dtype)[1], params)


def test_torch_loads_an_export_and_computes_the_same(tmp_path):
    from safetensors.torch import load_file

    model = original_dit(TINY)
    job, params = ported(save(tmp_path, model.state_dict()))
    out = tmp_path / "out"
    export_diffusers(out, params, "dit", job.config, layout="original", dtype=jnp.float32)
    again = original_dit(TINY, seed=9)
    again.load_state_dict(load_file(out / "diffusion_pytorch_model.safetensors"), strict=True)
    expected = run_original(model, inputs(TINY))
    np.testing.assert_array_equal(run_original(again, inputs(TINY)), expected)


def test_a_model_is_not_exported_in_a_layout_that_computes_otherwise():
    with pytest.raises(ValueError, match="time_shift 1, not 0: choose layout 'original'"):
        dit.to_diffusers_config(TINY)
    for change in ({"time_shift": 1}, {"mlp_norm_eps": 1e-5}):
        with pytest.raises(ValueError, match="facebook's code fixes .*: choose layout 'diffusers'"):
            dit.to_original_config(dataclasses.replace(TINY, **change))
    assert dit.to_original_config(TINY) == HEADS
    assert DiTConfig().time_shift == 1


def test_the_programs_there_and_back(tmp_path, convert, capsys):
    model = original_dit(TINY)
    source = save(tmp_path / "source", {"ema": model.state_dict(), "args": Namespace(a=1)})
    code, said, errors = convert(source, recipe="w8a8")
    assert (code, errors) == (0, [])
    assert f"{source / 'model.pt'}: dit in original layout, 1 file(s)" in said
    assert "model.pt: took 'ema'; left 'args'" in said
    saved = load(tmp_path / "out")
    assert isinstance(saved.params["blocks"]["0"]["mlp"]["fc1"]["kernel"], QTensor)
    origin = read_manifest(tmp_path / "out")["source"]
    assert origin["notes"] == ["model.pt: took 'ema'; left 'args'"]
    assert list(origin["files"]) == ["model.pt"] and origin["layout"] == "original"
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "model.pt: took 'ema'; left 'args'\n" in capsys.readouterr().out
    code, _, errors = convert(source, "--weights", "model", out="other")
    assert code == 2 and "weights 'model': it holds none of model, state_dict" in errors[0]

    back = ["--out", str(tmp_path / "back")]
    assert export.main([str(tmp_path / "out"), *back]) == 2
    assert "choose layout 'original'" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert export.main([str(tmp_path / "out"), *back, "--layout", "original"]) == 0
    assert "in original layout" in capsys.readouterr().out
    with open_checkpoint(tmp_path / "back") as checkpoint:
        assert set(checkpoint.names) == set(model.state_dict())
        assert checkpoint.config == HEADS
