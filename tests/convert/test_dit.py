"""DiT files in diffusers' layout: tree, shared embedders, config, and the way back."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import dit
from convert.__main__ import main
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.job import plan, run
from convert.table import expand
from lowbit_jax.checkpoint import assemble, iter_parts, load
from lowbit_jax.models.dit import DIT_XL_2_256, DIT_XL_2_512, DiTTransformer, abstract_params
from lowbit_jax.models.registry import build
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from tests.references import flux_files
from tests.references.conversion import TREATMENT
from tests.references.dit_files import (
    TINY,
    diffusers_config,
    diffusers_shapes,
    write_source,
)

# see tests/models/test_dit.py: the float32 noise of the network, and of the time embedding
AT_USUAL = 5e-5
EMBEDDER = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2.weight"
TABLE = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"


def ported(path, recipe="float", dtype=jnp.float32):
    """(job, tree) of a checkpoint, converted leaf by leaf."""
    parts = []
    with open_checkpoint(path) as checkpoint:
        job = plan(checkpoint, RECIPES[recipe], dtype=dtype)
        run(job, lambda name, part, bad: parts.append((name, part)))
    return job, assemble(parts)


def assert_same(found, expected):
    """Equal in structure, static fields, dtypes, shapes and every bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side of DiT."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.dit as reference

    return reference


def test_what_diffusers_saves_gives_its_tree_and_its_output(tmp_path, reference):
    theirs = reference.diffusers_dit(TINY)
    theirs.save_pretrained(tmp_path / "file")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    job, params = ported(tmp_path / "file")
    assert (job.model, job.layout.name, job.config) == ("dit", "diffusers", TINY)
    assert_same(ported(tmp_path / "shards")[1], params)
    expected = reference.dit_params(theirs.state_dict(), TINY)  # by a mapping of its own
    assert_same(params, jax.tree.map(jnp.asarray, expected))
    inputs = reference.dit_inputs(TINY)
    out = jax.jit(DiTTransformer(TINY).apply)({"params": params}, **inputs)
    exact = reference.run_dit(theirs, inputs)
    assert np.abs(out - exact).max() < AT_USUAL * np.abs(exact).max()


@pytest.mark.parametrize("config", [DIT_XL_2_256, DIT_XL_2_512, TINY], ids=["256", "512", "tiny"])
def test_the_table_names_the_published_tensors_with_their_shapes(config):
    parts = iter_parts(abstract_params(config))
    paths = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in parts}
    leaves = expand(dit.DIFFUSERS, config, paths)
    found = [item for leaf in leaves for item in leaf.source_shapes().items()]
    expected = diffusers_shapes(config)  # compared with diffusers' module in tests/models/test_dit
    assert len(found) == len(expected) == 6 + 19 * config.depth
    assert dict(found) == expected


# the plain ternary one has the same matrices as its -a8
@pytest.mark.parametrize("name", sorted(set(TREATMENT) - {"float", "flux-1.58bit"}))
def test_quantising_on_the_way_is_quantising_the_ported_tree(tmp_path, name):
    source = write_source(tmp_path, dtype=np.float32)
    _, params = ported(source)
    job, found = ported(source, name)
    assert_same(found, quantize(params, RECIPES[name]))
    quantised = {path for path, rule in job.rules.items() if rule is not None}
    linears = ("adaLN_modulation", "attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    assert quantised == {f"blocks/{i}/{linear}" for i in range(3) for linear in linears}
    kept = set(job.rules) - quantised
    assert kept == {
        "x_embedder/proj", "t_embedder/in_layer", "t_embedder/out_layer",
        "final_layer/adaLN_modulation", "final_layer/linear",
    }  # fmt: skip


def test_a_converted_folder_loads_and_its_w8a8_is_near_the_float_model(tmp_path, capsys):
    """Random weights of 3 blocks: 8 bits leave about 1 % of the output."""
    source = write_source(tmp_path / "source", dtype=np.float32)
    out = tmp_path / "out"
    assert main([str(source), "--recipe", "w8a8", "--out", str(out), "--dtype", "f32"]) == 0
    assert "dit in diffusers layout" in capsys.readouterr().out
    saved = load(out)
    assert isinstance(saved.params["blocks"]["0"]["mlp"]["fc1"]["kernel"], QTensor)
    model = build(saved.model, saved.config)
    assert isinstance(model, DiTTransformer) and model.config == TINY
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)
    inputs = x, jnp.array([10, 700]), jnp.array([3, 10])
    _, params = ported(source)
    low, exact = (np.asarray(model.apply({"params": p}, *inputs)) for p in (saved.params, params))
    assert 0 < np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["file", "shards"])
def test_an_export_is_the_source_bit_by_bit(tmp_path, limit):
    source = write_source(tmp_path / "source")
    job, params = ported(source, dtype=jnp.bfloat16)
    export_diffusers(tmp_path / "export", params, "dit", job.config, max_shard_bytes=limit)
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "export") as b:
        assert a.names == b.names and (len(b.files) == 1) == (limit == 10**9)
        for name in a.names:
            assert a.info(name).dtype == b.info(name).dtype == ml_dtypes.bfloat16
            assert a.info(name).shape == b.info(name).shape
            assert a.read(name).tobytes() == b.read(name).tobytes(), name


def test_diffusers_loads_an_export_and_computes_the_same(tmp_path, reference):
    from diffusers import DiTTransformer2DModel

    theirs = reference.diffusers_dit(TINY)
    theirs.save_pretrained(tmp_path / "source")
    job, params = ported(tmp_path / "source")
    export_diffusers(tmp_path / "export", params, "dit", job.config, dtype=jnp.float32)
    again, report = DiTTransformer2DModel.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = reference.dit_inputs(TINY)
    expected = reference.run_dit(theirs, inputs)
    np.testing.assert_array_equal(reference.run_dit(again, inputs), expected)


def test_embedders_that_differ_between_blocks_are_refused_all_at_once(tmp_path, capsys):
    shapes = diffusers_shapes(TINY)
    changes = {name.format(2): np.ones(shapes[name.format(2)]) for name in (EMBEDDER, TABLE)}
    source = write_source(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError) as caught:
        ported(source)
    assert len(caught.value.problems) == 2
    for name in (EMBEDDER, TABLE):
        assert f"tensor '{name.format(2)}' differs from '{name.format(0)}'" in str(caught.value)
    out = tmp_path / "out"
    assert main([str(source), "--recipe", "w8a8", "--out", str(out)]) == 2
    assert "differs from" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("at", [0, 2])
def test_missing_unknown_and_misshaped_tensors_are_named_together(tmp_path, at):
    source = write_source(
        tmp_path,
        **{
            EMBEDDER.format(at): None,
            "pos_embed.proj.weight": np.zeros((80, 12), np.float32),
            "pos_embed.pos_embed": np.zeros((1, 16, 80), np.float32),
            "proj_out_2.bias": np.zeros(24, np.int32),
        },
    )
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, RECIPES["float"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert f"missing tensor '{EMBEDDER.format(at)}' (80, 80) of dit (diffusers layout)" in text
    assert "'pos_embed.proj.weight' has shape (80, 12), " in text and "(80, 3, 2, 2)" in text
    assert 'unknown tensor "pos_embed.pos_embed"' in text or "'pos_embed.pos_embed'" in text
    assert "tensor 'proj_out_2.bias' is int32" in text


def edit_config(folder, **changes):
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "gone"}, "config.json lacks 'num_attention_heads'"),
        ({"sample_size": 0}, "sample_size is 0, not an integer from 1"),
        ({"sample_size": 7}, "sample_size 7 is not a multiple of patch_size 2"),
        ({"num_layers": True}, "num_layers is .*, not an integer from 1"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm is .*, not an integer"),
        ({"out_channels": 5}, r"out_channels is 5; the network predicts noise \(3\)"),
        ({"activation_fn": "geglu"}, "activation_fn is .*geglu.*; DiT has .*gelu-approximate"),
        ({"attention_bias": False}, "attention_bias is "),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine is "),
        ({"norm_eps": "small"}, "norm_eps is .*, not a number"),
        ({"num_layers": 4}, "missing tensor 'transformer_blocks.3."),
        ({"num_layers": 2}, "unknown tensor .*transformer_blocks.2."),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, message):
    edit_config(write_source(tmp_path), **changes)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        plan(checkpoint, RECIPES["float"])


def test_neither_network_is_taken_for_the_other(tmp_path):
    with open_checkpoint(write_source(tmp_path / "dit")) as checkpoint:
        assert plan(checkpoint, RECIPES["float"], model="dit").model == "dit"
    with open_checkpoint(flux_files.write_source(tmp_path / "flux")) as checkpoint:
        assert plan(checkpoint, RECIPES["float"]).model == "flux"
        with pytest.raises(CheckpointError, match="not a dit checkpoint: its tensors look like"):
            plan(checkpoint, RECIPES["float"], model="dit")


def test_a_file_without_config_is_refused(tmp_path):
    (write_source(tmp_path) / "config.json").unlink()
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, RECIPES["float"])
    assert "add diffusers' config.json" in str(caught.value)


def test_a_config_makes_the_way_to_diffusers_and_back():
    for config in (DIT_XL_2_256, DIT_XL_2_512, TINY):
        document = json.loads(json.dumps(dit.to_diffusers_config(config)))
        assert dit.from_diffusers_config(document) == config
        known = diffusers_config(config)
        assert {key: document[key] for key in known} | {
            "_class_name": known["_class_name"]
        } == known
    fixed = dit.from_diffusers_config(document | {"out_channels": None})
    assert not fixed.learn_sigma
    facebook = dit.DiTConfig(time_shift=0, mlp_norm_eps=1e-6)
    with pytest.raises(ValueError, match="diffusers fixes time_shift 1, not 0"):
        dit.to_diffusers_config(facebook)
