"""Latte-1 files in diffusers' layout: the tree, the config, the recipes, and the way back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import latte_t2v
from convert.__main__ import main
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.job import plan
from lowbit_jax.checkpoint import load
from lowbit_jax.models.latte_t2v import LATTE_1, LatteT2VTransformer
from lowbit_jax.models.registry import build
from lowbit_jax.quant.recipe import RECIPES
from tests.references.conversion import (
    assert_recipes,
    assert_same,
    assert_same_files,
    ported,
    source_shapes,
    write_checkpoint,
)
from tests.references.latte_t2v_files import TINY, diffusers_config, diffusers_shapes


def write_source(folder, **changes):
    return write_checkpoint(folder, diffusers_shapes(TINY), diffusers_config(TINY), **changes)


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side of Latte."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.latte_t2v as reference

    return reference


def test_what_diffusers_saves_gives_its_tree_and_comes_back(tmp_path, reference):
    """Its tree by a mapping of its own; diffusers loads the export and computes the same bits."""
    from diffusers import LatteTransformer3DModel

    theirs = reference.diffusers_latte(TINY)
    theirs.save_pretrained(tmp_path / "source")
    job, params = ported(tmp_path / "source")
    assert (job.model, job.layout.name, job.config) == ("latte-t2v", "diffusers", TINY)
    assert_same(params, reference.params_of(theirs, TINY))
    export_diffusers(tmp_path / "export", params, "latte-t2v", job.config, dtype=jnp.float32)
    again, report = LatteTransformer3DModel.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.standard_normal((2, 3, 5, 8, 8), np.float32),
        "timestep": np.array([10, 700]),
        "caption": rng.standard_normal((2, 7, 24), np.float32),
        "caption_mask": np.arange(7) < np.array([[4], [7]]),
    }
    expected = reference.run(theirs, inputs)
    np.testing.assert_array_equal(reference.run(again, inputs), expected)
    out = jax.jit(LatteT2VTransformer(TINY).apply)({"params": params}, **inputs)
    assert np.abs(out - expected).max() < 5e-5 * np.abs(expected).max()


@pytest.mark.parametrize("config", [LATTE_1, TINY], ids=["published", "tiny"])
def test_the_table_names_the_published_tensors_with_their_shapes(config):
    """The expected ones are compared with diffusers' module in tests/models/test_latte_t2v.py."""
    found = source_shapes("latte-t2v", config, latte_t2v.DIFFUSERS)
    assert found == diffusers_shapes(config)
    assert len(found) == 15 + 34 * config.pairs


def test_every_linear_and_what_the_recipes_do_to_it():
    k = 1152
    block = {"attn/qkv": (3 * k, k), "attn/proj": (k, k)}
    block |= {"mlp/fc1": (4 * k, k), "mlp/fc2": (k, 4 * k)}
    cross = {"q_linear": (k, k), "kv_linear": (2 * k, k), "proj": (k, k)}
    in_blocks = {f"{kind}/{n}": s for kind in ("spatial", "temporal") for n, s in block.items()}
    in_blocks |= {f"spatial/cross_attn/{name}": shape for name, shape in cross.items()}
    outside = {
        "x_embedder/proj": (k, 16),
        "t_embedder/in_layer": (k, 256),
        "t_embedder/out_layer": (k, k),
        "t_block": (6 * k, k),
        "y_embedder/y_proj/fc1": (k, 4096),
        "y_embedder/y_proj/fc2": (k, k),
        "final_layer/linear": (32, k),
    }
    assert_recipes("latte-t2v", LATTE_1, in_blocks, outside)


def test_a_converted_folder_loads_and_its_w8a8_is_near_the_float_model(tmp_path, capsys):
    """Random weights of 3 pairs of blocks: 8 bits leave about 1 % of the output."""
    source, out = write_source(tmp_path / "source", dtype=np.float32), tmp_path / "out"
    assert main([str(source), "--recipe", "w8a8", "--out", str(out), "--dtype", "f32"]) == 0
    assert "latte-t2v in diffusers layout" in capsys.readouterr().out
    saved = load(out)
    model = build(saved.model, saved.config)
    assert isinstance(model, LatteT2VTransformer) and model.config == TINY
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((2, 3, 5, 8, 8), np.float32),
        jnp.array([10, 700]),
        rng.standard_normal((2, 7, 24), np.float32),
        jnp.ones((2, 7), bool),
    )
    _, params = ported(source)
    low, exact = (np.asarray(model.apply({"params": p}, *inputs)) for p in (saved.params, params))
    assert 0 < np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_an_export_is_the_source_bit_by_bit(tmp_path):
    source = write_source(tmp_path / "source", max_shard_bytes=100_000)
    job, params = ported(source, dtype=jnp.bfloat16)
    export_diffusers(tmp_path / "export", params, "latte-t2v", job.config)
    assert_same_files(source, tmp_path / "export")


def test_what_does_not_fit_is_named_together(tmp_path):
    temporal = "temporal_transformer_blocks.2.attn1.to_q.weight"
    changes = {
        temporal: None,
        "pos_embed.proj.weight": np.zeros((80, 12), np.float32),
        "temporal_transformer_blocks.0.attn2.to_q.weight": np.zeros((80, 80), np.float32),
    }
    with open_checkpoint(write_source(tmp_path, **changes)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            plan(checkpoint, RECIPES["float"])
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert f"missing tensor '{temporal}' (80, 80) of latte-t2v (diffusers layout)" in text
    assert "unknown tensor 'temporal_transformer_blocks.0.attn2.to_q.weight'" in text
    assert "'pos_embed.proj.weight' has shape (80, 12)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads is .*, not an integer from 1"),
        ({"sample_size": 7}, "sample_size 7 is not a multiple of patch_size 2"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05; Latte-1 has 1e-06"),
        ({"norm_type": "ada_norm"}, "norm_type is .*; Latte-1 has .*ada_norm_single"),
        ({"cross_attention_dim": 64}, "cross_attention_dim is 64; Latte-1 of this width has 80"),
        ({"out_channels": 5}, r"out_channels is 5; the network predicts noise \(3\)"),
        ({"num_layers": 4}, "missing tensor 'temporal_transformer_blocks.3."),
        ({"num_layers": 2}, "unknown tensor .*transformer_blocks.2."),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, message):
    write_checkpoint(tmp_path, diffusers_shapes(TINY), diffusers_config(TINY) | changes)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        plan(checkpoint, RECIPES["float"])


def test_a_config_that_is_missing_or_lacks_a_field_is_named(tmp_path):
    config = diffusers_config(TINY)
    del config["video_length"]
    write_checkpoint(tmp_path, diffusers_shapes(TINY), config)
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match="config.json lacks 'video_length'"):
            plan(checkpoint, RECIPES["float"])
    (tmp_path / "config.json").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match="add diffusers' config.json"):
            plan(checkpoint, RECIPES["float"])


def test_a_config_makes_the_way_to_diffusers_and_back():
    for config in (LATTE_1, TINY):
        document = json.loads(json.dumps(latte_t2v.to_diffusers_config(config)))
        assert latte_t2v.from_diffusers_config(document) == config
        known = diffusers_config(config)
        known.pop("dropout")
        assert {key: document[key] for key in known} == known
    noise_only = latte_t2v.from_diffusers_config(document | {"out_channels": None})
    assert not noise_only.learn_sigma
