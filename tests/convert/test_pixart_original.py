"""PixArt files with the original names: tree, config from shapes, export, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import pixart
from convert.__main__ import main
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.export import main as export_main
from convert.job import plan
from lowbit_jax.checkpoint import load
from lowbit_jax.models.pixart import PixArtTransformer
from lowbit_jax.models.registry import build
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from tests.references.conversion import assert_same, assert_same_files, ported, source_shapes
from tests.references.pixart_files import (
    PUBLISHED_ORIGINALS,
    TINY,
    TINY_ORIGINAL,
    diffusers_shapes,
    original_shapes,
    write_diffusers,
    write_original,
)

TOLERANCE = 5e-5  # see tests/models/test_pixart.py


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side and the original's."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.pixart as reference

    return reference


@pytest.mark.parametrize(
    "config",
    [*PUBLISHED_ORIGINALS.values(), TINY_ORIGINAL],
    ids=[*PUBLISHED_ORIGINALS, "tiny"],
)
def test_the_table_names_the_original_tensors_with_their_shapes(config):
    found = source_shapes("pixart", config, pixart.ORIGINAL)
    assert found == original_shapes(config)
    per_block, compressed = 15, len(config.compressed_layers)
    assert len(found) == (
        16 + 8 * config.micro_conditions + per_block * config.depth + 4 * compressed
    )
    # what diffusers' model of the same network has, and the null caption and compression
    size = sum(np.prod(shape) for shape in found.values())
    theirs = sum(np.prod(shape) for shape in diffusers_shapes(config).values())
    cells = (config.compression**2 + 3) * config.hidden_size
    assert (
        size == theirs + config.null_caption_length * config.caption_channels + compressed * cells
    )


def test_quantising_on_the_way_is_quantising_the_ported_tree(tmp_path):
    source = write_original(tmp_path, TINY_ORIGINAL, dtype=np.float32)
    _, params = ported(source)
    assert_same(ported(source, "w4a8")[1], quantize(params, RECIPES["w4a8"]))


def test_a_converted_folder_loads_and_its_w8a8_is_near_the_float_model(tmp_path, capsys):
    """Random weights of 3 blocks, two of them compressed: 8 bits leave about 1 % of the output."""
    source = write_original(tmp_path / "source", TINY_ORIGINAL, dtype=np.float32)
    out = tmp_path / "out"
    assert main([str(source), "--recipe", "w8a8", "--out", str(out), "--dtype", "f32"]) == 0
    assert "pixart in original layout" in capsys.readouterr().out
    saved = load(out)
    model = build(saved.model, saved.config)
    assert isinstance(model, PixArtTransformer) and model.config == TINY_ORIGINAL
    assert sorted(saved.params["blocks"]) == ["0", "1"]
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((2, 3, 8, 12), np.float32),
        jnp.array([10, 700]),
        rng.standard_normal((2, 7, 20), np.float32),
        jnp.ones((2, 7), bool),
    )
    _, params = ported(source)
    low, exact = (np.asarray(model.apply({"params": p}, *inputs)) for p in (saved.params, params))
    assert 0 < np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_original_files_give_the_published_network(tmp_path, reference):
    """Tree by a mapping of its own, output by the original network in plain torch."""
    import torch

    source = write_original(tmp_path, TINY_ORIGINAL, dtype=np.float32)
    job, params = ported(source)
    assert (job.model, job.layout.name, job.config) == ("pixart", "original", TINY_ORIGINAL)
    with open_checkpoint(source) as checkpoint:
        state = {
            name: torch.tensor(checkpoint.read(name)) for name in original_shapes(TINY_ORIGINAL)
        }
    assert_same(params, jax.tree.map(jnp.asarray, reference.pixart_params(state, TINY_ORIGINAL)))
    inputs = reference.pixart_inputs(TINY_ORIGINAL, grid=(5, 4))
    out = jax.jit(PixArtTransformer(TINY_ORIGINAL).apply)({"params": params}, **inputs)
    exact = reference.run_original(state, TINY_ORIGINAL, inputs)
    assert np.abs(out - exact).max() < TOLERANCE * np.abs(exact).max()


def test_a_file_of_torch_save_gives_the_same_tree(tmp_path):
    """As the publishers save it: a dict with the weights and what training left."""
    torch = pytest.importorskip("torch", reason="writes the file")
    source = write_original(tmp_path / "source", TINY_ORIGINAL, dtype=np.float32)
    with open_checkpoint(source) as checkpoint:
        state = {name: torch.tensor(checkpoint.read(name)) for name in checkpoint.names}
    folder = tmp_path / "pth"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    torch.save({"state_dict": state, "epoch": 3}, folder / "PixArt.pth")
    job, params = ported(folder / "PixArt.pth")
    assert (job.layout.name, job.config) == ("original", TINY_ORIGINAL)
    assert_same(params, ported(source)[1])


def test_an_original_is_exported_under_its_own_names(tmp_path, capsys):
    """Bit by bit, its position table too; and read again. diffusers has no place for all of it."""
    source = write_original(tmp_path / "source", TINY_ORIGINAL, dtype=np.float32)
    out, back = tmp_path / "out", tmp_path / "back"
    assert main([str(source), "--recipe", "float", "--out", str(out), "--dtype", "f32"]) == 0
    assert export_main([str(out), "--out", str(back)]) == 2
    error = capsys.readouterr().err
    assert "no place for a null caption (5 tokens) and for compressed layers (2)" in error
    assert "choose layout 'original'" in error and not back.exists()
    assert export_main([str(out), "--out", str(back), "--layout", "bfl"]) == 2
    assert "layout 'bfl' is none of: diffusers, original" in capsys.readouterr().err
    options = ["--out", str(back), "--layout", "original", "--dtype", "f32"]
    assert export_main([str(out), *options]) == 0
    assert "pixart, recipe 'float', in original layout" in capsys.readouterr().out
    assert_same_files(source, back)
    assert ported(back)[0].config == TINY_ORIGINAL


def test_a_model_goes_from_one_layout_to_the_other(tmp_path):
    """diffusers' names to the original's and back: the same tree, the same config."""
    source = write_diffusers(tmp_path / "source", PIXART_LIKE)
    job, params = ported(source, dtype=jnp.bfloat16)
    export_diffusers(tmp_path / "original", params, "pixart", job.config, layout="original")
    again, tree = ported(tmp_path / "original", dtype=jnp.bfloat16)
    assert (again.layout.name, again.config) == ("original", job.config)
    assert_same(tree, params)
    export_diffusers(tmp_path / "back", tree, "pixart", again.config)
    assert_same_files(source, tmp_path / "back")


PIXART_LIKE = dataclasses.replace(TINY, hidden_size=1152, num_heads=16, depth=1)


def test_the_published_width_tells_the_heads(tmp_path):
    source = write_original(tmp_path, PIXART_LIKE, stated={})
    with open_checkpoint(source) as checkpoint:
        assert plan(checkpoint, RECIPES["float"]).config == PIXART_LIKE


@pytest.mark.parametrize("interpolation", [0.5, 1.0, 2.0, 4.0])
def test_the_position_table_tells_the_size_and_the_interpolation(tmp_path, interpolation):
    config = dataclasses.replace(TINY_ORIGINAL, interpolation=interpolation, sample_size=12)
    with open_checkpoint(write_original(tmp_path, config)) as checkpoint:
        assert plan(checkpoint, RECIPES["float"]).config == config


STATED = {"num_attention_heads": 2, "sample_size": 8, "interpolation_scale": 2}


@pytest.mark.parametrize("without", [None, *STATED])
def test_a_config_says_what_the_tensors_do_not(tmp_path, without):
    stated = {name: value for name, value in STATED.items() if name != without}
    source = write_original(tmp_path, TINY_ORIGINAL, stated, pos_embed=None)
    with open_checkpoint(source) as checkpoint:
        if without is None:
            assert plan(checkpoint, RECIPES["float"]).config == TINY_ORIGINAL
            return
        with pytest.raises(CheckpointError, match=f"config.json.*{without}"):
            plan(checkpoint, RECIPES["float"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": np.zeros((1, 16, 120), np.float32)}, "begins with 0.0 in column 1"),
        (
            {"pos_embed": np.full((1, 16, 120), 0.48, np.float32)},
            "'pos_embed' differs by 0.52 from",
        ),
        ({"pos_embed": np.full((1, 16, 120), np.nan, np.float32)}, "begins with nan in column 1"),
        ({"pos_embed": np.zeros((1, 15, 120), np.float32)}, r"\(1, 15, 120\), not \(1, a square"),
        ({"pos_embed": np.zeros((16, 120), np.float32)}, r"\(16, 120\), not \(1, a square"),
        ({"x_embedder.proj.weight": np.zeros((120, 12))}, r"\(120, 12\), not 4 axes"),
        ({"blocks.1.attn.sr.bias": None}, "missing tensor 'blocks.1.attn.sr.bias'"),
        ({"blocks.1.attn.sr.weight": None}, "unknown tensor .*blocks.1.attn.norm.bias"),
        ({"blocks.0.attn.q_norm.weight": np.zeros(120)}, "unknown tensor .*q_norm.weight"),
        ({"y_embedder.y_embedding": np.zeros((5, 21))}, r"\(5, 21\), .* needs \(5, 20\)"),
        ({"final_layer.linear.weight": np.zeros((20, 120))}, r"out_channels is 5; the network"),
        ({"blocks.7.mlp.fc1.bias": np.zeros(480)}, "missing tensor 'blocks.3.attn.proj.bias'"),
    ],
)
def test_original_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    source = write_original(tmp_path, TINY_ORIGINAL, **changes)
    with pytest.raises(CheckpointError, match=message):
        ported(source)
