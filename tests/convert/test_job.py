"""The conversion itself: what it reads when, what it says about NaN and inf, what it hands on."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from convert.checkpoint_files import Checkpoint, open_checkpoint
from convert.errors import CheckpointError
from convert.job import manifest, plan, run
from convert.port import port
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import OUTER, Writer, iter_parts, load
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES, Recipe, RecipeError, Rule, WeightSpec
from lowbit_jax.quant.transform import NonFiniteError, quantize
from tests.references.flux_files import TINY, diffusers_shapes, random_tensors, write_source

CONFIG = dataclasses.replace(TINY, depth=1, depth_single_blocks=2)
BLOCK = "single_transformer_blocks.1."
W8 = RECIPES["w8a8"]
KEEP = dataclasses.replace(W8, on_nonfinite="keep")


def convert(source, recipe, dtype=np.float32):
    """(job, parts, kept parameters)"""
    parts = []
    with open_checkpoint(source) as checkpoint:
        job = plan(checkpoint, recipe, dtype=dtype)
        kept = run(job, lambda name, part, bad: parts.append((name, part)))
    return job, parts, kept


def poisoned(value, *names):
    """Tensors of the source with one bad number each."""
    shapes = diffusers_shapes(CONFIG)
    tensors = random_tensors({name: shapes[name] for name in names})
    for array in tensors.values():
        array[(-1,) * array.ndim] = value
    return tensors


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source", CONFIG)


def test_a_plan_reads_no_weights_and_says_what_comes(source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read"))
        with open_checkpoint(source) as checkpoint:
            planned = plan(checkpoint, KEEP)
            sizes = planned.sizes()
    job, parts, kept = convert(source, W8, ml_dtypes.bfloat16)
    assert kept == []
    shapes = lambda part: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), part)  # noqa: E731
    abstract = {name: shapes(part) for name, part in iter_parts(planned.abstract)}
    assert abstract == {name: shapes(part) for name, part in parts}
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(parts) if not isinstance(leaf, str))
    assert (sizes.after, sizes.before) == (stored, job.checkpoint.total_bytes)
    assert planned.peak_bytes() > stored


def test_parts_come_in_order_and_progress_adds_up(source):
    steps = []
    with open_checkpoint(source) as checkpoint:
        job = plan(checkpoint, RECIPES["float"])
        names = []
        run(job, lambda name, part, bad: names.append(name), lambda *step: steps.append(step))
    assert names == [OUTER, "double_blocks/0", "single_blocks/0", "single_blocks/1"]
    assert sum(nbytes for _, nbytes in steps) == checkpoint.total_bytes
    assert len({name for name, _ in steps}) == len(job.leaves) == len(steps)
    assert "single_blocks/1/linear1/kernel" in dict(steps)


def test_what_progress_raises_ends_the_conversion(source):
    def stop(name, nbytes):
        raise KeyboardInterrupt

    with open_checkpoint(source) as checkpoint, pytest.raises(KeyboardInterrupt):
        run(plan(checkpoint, W8), lambda name, part, bad: pytest.fail("written"), stop)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"{BLOCK}proj_mlp.weight", "single_blocks/1/linear1/kernel"),
        (f"{BLOCK}attn.to_k.bias", "single_blocks/1/linear1/bias"),
        (f"{BLOCK}attn.norm_q.weight", "single_blocks/1/norm/query_norm/scale"),
        ("x_embedder.weight", "outer/img_in/kernel"),
    ],
    ids=["quantised", "bias", "norm", "float"],
)
def test_a_bad_number_anywhere_is_named(tmp_path, name, path, value):
    source = write_source(tmp_path, CONFIG, **poisoned(value, name))
    with pytest.raises(NonFiniteError) as caught:
        convert(source, W8)
    assert str(caught.value).startswith(f"NaN or inf in {path}: mend the checkpoint, or set")


def test_all_bad_numbers_are_named_and_nothing_after_the_first_is_written(tmp_path):
    names = [
        "norm_out.linear.bias",
        "transformer_blocks.0.attn.to_q.weight",
        f"{BLOCK}proj_out.bias",
    ]
    source = write_source(tmp_path, CONFIG, **poisoned(np.nan, *names))
    written = []
    with open_checkpoint(source) as checkpoint, pytest.raises(NonFiniteError) as caught:
        run(plan(checkpoint, W8), lambda name, part, bad: written.append(name))
    assert (
        "NaN or inf in outer/final_layer/adaLN_modulation/bias, "
        "double_blocks/0/img_attn/qkv/kernel, "
        "single_blocks/1/linear2/bias:"
    ) in str(caught.value)
    assert written == []


def test_keep_leaves_such_kernels_as_they_are(tmp_path):
    names = [f"{BLOCK}proj_out.weight", f"{BLOCK}norm.linear.bias", "x_embedder.weight"]
    bad = poisoned(np.inf, *names)
    source = write_source(tmp_path, CONFIG, dtype=np.float32, **bad)
    _, parts, kept = convert(source, KEEP)
    assert kept == [
        "outer/img_in/kernel",
        "single_blocks/1/modulation/lin/bias",
        "single_blocks/1/linear2/kernel",
    ]
    found = dict(parts)
    np.testing.assert_array_equal(found["single_blocks/1"]["linear2/kernel"], bad[names[0]].T)
    assert isinstance(found["single_blocks/1"]["linear1/kernel"], QTensor)
    assert isinstance(found["single_blocks/0"]["linear2/kernel"], QTensor)
    # the same as quantising the tree, where layers that differ are segments of their own
    float_keep = dataclasses.replace(RECIPES["float"], on_nonfinite="keep")
    tree = port(source, float_keep, dtype=np.float32).params
    expected = quantize(tree, KEEP)
    assert list(expected["single_blocks"]) == ["0", "1"]
    params = port(source, KEEP, dtype=np.float32).params
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_number_too_large_for_the_dtype_asked_for_is_not_finite(tmp_path):
    name = "x_embedder.bias"
    source = write_source(tmp_path, CONFIG, **poisoned(np.float32(3.4e38), name))
    assert convert(source, W8, np.float32)[2] == []
    with pytest.raises(NonFiniteError, match="outer/img_in/bias"):
        convert(source, W8, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"proj_out.bias": None}, r"missing tensor 'proj_out.bias' \(8,\) of flux \(diffusers"),
        ({"extra": np.ones(3, np.float32)}, "unknown tensor 'extra', not part of flux"),
        ({"a\nb\x1b[31m": np.ones(3, np.float32)}, r"unknown tensor 'a\\nb\\x1b\[31m'"),
        ({"proj_out.bias": np.ones(9, np.float32)}, r"has shape \(9,\), flux .* needs \(8,\)"),
        ({"proj_out.bias": np.ones((8, 1), np.float32)}, r"has shape \(8, 1\)"),
        ({"proj_out.bias": np.ones(8, np.int8)}, "'proj_out.bias' is int8, not one of float32"),
        ({"proj_out.bias": np.ones(8, ml_dtypes.float8_e4m3fn)}, "is float8_e4m3fn"),
        (
            {"x_embedder.weight": None},
            r"not a known model \(flux, .*\): its tensors look like 'context",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_it_is_read(tmp_path, changes, problem):
    source = write_source(tmp_path, CONFIG, **changes)
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError, match=problem):
        plan(checkpoint, W8)


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    changes = {
        "proj_out.bias": None,
        "x_embedder.bias": np.ones(3, np.float32),
        "extra.a": np.ones(1, np.float32),
        "extra.b": np.ones(1, np.float32),
        "norm_out.linear.bias": np.ones(128, np.int32),
    }
    source = write_source(tmp_path, CONFIG, **changes)
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, W8)
    assert len(caught.value.problems) == len(changes)
    for name in changes:
        assert sum(repr(name) in problem for problem in caught.value.problems) == 1


def test_a_layer_missing_in_the_middle_is_missing(tmp_path):
    gone = {name: None for name in diffusers_shapes(TINY) if name.startswith(BLOCK)}
    source = write_source(tmp_path, TINY, **gone)
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, W8)
    assert len(caught.value.problems) == len(gone) == 14
    assert "missing tensor 'single_transformer_blocks.1.attn.norm_k.weight' (32,)" in str(
        caught.value
    )


def test_an_unknown_model_and_the_wrong_one(source):
    with open_checkpoint(source) as checkpoint:
        with pytest.raises(ValueError, match="--model unet is neither 'auto' nor one of: flux"):
            plan(checkpoint, W8, model="unet")
    names = ("encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight")
    path = write_safetensors(
        source / "bert.safetensors", random_tensors(dict.fromkeys(names, (4, 4)))
    )
    for model in ("auto", "flux"):
        with open_checkpoint(path) as checkpoint:
            with pytest.raises(CheckpointError, match="not a .*flux.*: .*'embeddings.word_emb"):
                plan(checkpoint, W8, model=model)


def test_a_rule_that_decides_nothing_is_named(source):
    spec = WeightSpec(format="int8", quantizer="absmax")
    rules = (*W8.rules, Rule(match="double_blocks/7/.*", weights=spec))
    with open_checkpoint(source) as checkpoint, pytest.raises(RecipeError) as caught:
        plan(checkpoint, Recipe(name="mine", rules=rules))
    assert "recipe 'mine': no kernel is decided by rule(s) 'double_blocks/7/.*'" in str(
        caught.value
    )


def saved(source, folder, recipe=W8, archive=False):
    with open_checkpoint(source) as checkpoint:
        job = plan(checkpoint, recipe)
        with Writer(folder, manifest(job, checkpoint.digests()), archive=archive) as writer:
            run(job, writer.write)
            writer.finish()
    return json.loads((folder / "manifest.json").read_text())


def test_two_conversions_are_equal_however_the_source_is_cut(tmp_path, source):
    first, second = saved(source, tmp_path / "a"), saved(source, tmp_path / "b")
    assert first == second
    sharded = write_source(tmp_path / "shards", CONFIG, max_shard_bytes=100_000)
    third = saved(sharded, tmp_path / "c")
    assert len(third["source"]["files"]) > 5
    assert third | {"source": None} == first | {"source": None}


def test_a_port_is_the_saved_and_loaded_checkpoint(tmp_path, make_source):
    source = make_source()
    saved(source, tmp_path / "a", RECIPES["flux-1.58bit"], archive=True)
    loaded, direct = load(tmp_path / "a"), port(source, "flux-1.58bit")
    assert jax.tree.structure(direct.params) == jax.tree.structure(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, direct.params, loaded.params)
    assert (direct.model, direct.recipe) == (loaded.model, loaded.recipe)
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in direct.config.items()}
    assert config == loaded.config
