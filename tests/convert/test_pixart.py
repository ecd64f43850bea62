"""PixArt files in diffusers' layout and the original: tree, config, export, and what is refused."""

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
from convert.job import plan
from lowbit_jax.checkpoint import load
from lowbit_jax.models.pixart import (
    PIXART_SIGMA_256,
    PixArtTransformer,
)
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import CAPTION_KEYS_VALUES, RECIPES
from tests.references import dit_files, flux_files
from tests.references.conversion import (
    assert_recipes,
    assert_same,
    assert_same_files,
    ported,
    source_shapes,
)
from tests.references.pixart_files import (
    PUBLISHED,
    PUBLISHED_ORIGINALS,
    TINY,
    diffusers_config,
    diffusers_shapes,
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


def test_what_diffusers_saves_gives_its_tree_and_its_output(tmp_path, reference):
    theirs = reference.random_diffusers(TINY)
    theirs.save_pretrained(tmp_path / "file")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    job, params = ported(tmp_path / "file")
    assert (job.model, job.layout.name, job.config) == ("pixart", "diffusers", TINY)
    assert_same(ported(tmp_path / "shards")[1], params)
    state = reference.original_names(theirs.state_dict(), TINY)  # by a mapping of its own
    assert_same(params, jax.tree.map(jnp.asarray, reference.pixart_params(state, TINY)))
    inputs = reference.pixart_inputs(TINY, grid=(3, 5))
    out = jax.jit(PixArtTransformer(TINY).apply)({"params": params}, **inputs)
    exact = reference.run_diffusers(theirs, inputs)
    assert np.abs(out - exact).max() < TOLERANCE * np.abs(exact).max()


@pytest.mark.parametrize("config", [*PUBLISHED.values(), TINY], ids=[*PUBLISHED, "tiny"])
def test_the_table_names_the_published_tensors_with_their_shapes(config, reference):
    import torch

    with torch.device("meta"):
        theirs = reference.diffusers_model(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(expected) == 15 + 8 * config.micro_conditions + 21 * config.depth
    assert source_shapes("pixart", config, pixart.DIFFUSERS) == expected
    assert diffusers_shapes(config) == expected  # what the files of these tests are made of


BLOCK = {
    "attn/qkv": (3456, 1152),
    "attn/proj": (1152, 1152),
    "cross_attn/q_linear": (1152, 1152),
    "cross_attn/kv_linear": (2304, 1152),
    "cross_attn/proj": (1152, 1152),
    "mlp/fc1": (4608, 1152),
    "mlp/fc2": (1152, 4608),
}
OUTSIDE = {
    "x_embedder/proj": (1152, 16),
    "t_embedder/in_layer": (1152, 256),
    "t_embedder/out_layer": (1152, 1152),
    "t_block": (6912, 1152),
    "y_embedder/y_proj/fc1": (1152, 4096),
    "y_embedder/y_proj/fc2": (1152, 1152),
    "final_layer/linear": (32, 1152),
}
MICRO = {
    f"{name}/{layer}": (384, k)
    for name in ("csize_embedder", "ar_embedder")
    for layer, k in (("in_layer", 256), ("out_layer", 384))
}


@pytest.mark.parametrize(
    ("config", "outside"),
    [
        (PUBLISHED["sigma-1024"], OUTSIDE),
        (PUBLISHED_ORIGINALS["sigma-1024-compressed"], OUTSIDE),
        (PUBLISHED["alpha-1024"], OUTSIDE | MICRO),
    ],
    ids=["sigma", "sigma-compressed", "alpha-micro"],
)
def test_every_linear_and_what_the_recipes_do_to_it(config, outside):
    """ViDiT-Q keeps the embedders, adaLN-single, the caption's projection and the final layer."""
    assert_recipes("pixart", config, BLOCK, outside)


def test_the_captions_keys_and_values_may_be_kept_too(tmp_path):
    """ViDiT-Q's W8A8 of PixArt keeps them; --keep takes the same expression."""
    kept = {f"blocks/{i}/cross_attn/kv_linear" for i in range(3)}
    source = write_diffusers(tmp_path / "source")
    with open_checkpoint(source) as checkpoint:
        plain, keeping = (
            plan(checkpoint, recipe).rules
            for recipe in (RECIPES["w8a8"], RECIPES["w8a8"].keeping(CAPTION_KEYS_VALUES))
        )
    assert keeping == plain | dict.fromkeys(kept)
    assert all(plain[layer] for layer in kept)
    out = tmp_path / "out"
    options = ["--recipe", "w8a8", "--keep", CAPTION_KEYS_VALUES, "--out", str(out)]
    assert main([str(source), *options]) == 0
    blocks = load(out).params["blocks"]["0"]
    assert not isinstance(blocks["cross_attn"]["kv_linear"]["kernel"], QTensor)
    assert isinstance(blocks["cross_attn"]["q_linear"]["kernel"], QTensor)


@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["file", "shards"])
def test_an_export_is_the_source_bit_by_bit(tmp_path, limit):
    source = write_diffusers(tmp_path / "source")
    job, params = ported(source, dtype=jnp.bfloat16)
    export_diffusers(tmp_path / "export", params, "pixart", job.config, max_shard_bytes=limit)
    assert_same_files(source, tmp_path / "export")


def test_diffusers_loads_an_export_and_computes_the_same(tmp_path, reference):
    from diffusers import PixArtTransformer2DModel

    theirs = reference.random_diffusers(TINY)
    theirs.save_pretrained(tmp_path / "source")
    job, params = ported(tmp_path / "source")
    export_diffusers(tmp_path / "export", params, "pixart", job.config, dtype=jnp.float32)
    again, report = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = reference.pixart_inputs(TINY)
    expected = reference.run_diffusers(theirs, inputs)
    np.testing.assert_array_equal(reference.run_diffusers(again, inputs), expected)


def test_missing_unknown_and_misshaped_tensors_are_named_together(tmp_path):
    source = write_diffusers(
        tmp_path,
        **{
            "transformer_blocks.1.attn2.to_k.weight": None,
            "pos_embed.proj.weight": np.zeros((120, 12), np.float32),
            "transformer_blocks.1.attn2.norm_k.weight": np.zeros(48, np.float32),
            "proj_out.bias": np.zeros(24, np.int32),
        },
    )
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, RECIPES["float"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "missing tensor 'transformer_blocks.1.attn2.to_k.weight' (120, 120) of pixart" in text
    assert "'pos_embed.proj.weight' has shape (120, 12), " in text and "(120, 3, 2, 2)" in text
    assert "unknown tensor 'transformer_blocks.1.attn2.norm_k.weight'" in text.replace('"', "'")
    assert "tensor 'proj_out.bias' is int32" in text


def edit_config(folder, **changes):
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "gone"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "gone"}, "config.json lacks 'num_attention_heads'"),
        ({"caption_channels": None}, "caption_channels is .*, not an integer from 1"),
        ({"sample_size": 7}, "sample_size 7 is not a multiple of patch_size 2"),
        ({"num_layers": True}, "num_layers is .*, not an integer from 1"),
        ({"out_channels": 5}, r"out_channels is 5; the network predicts noise \(3\)"),
        ({"interpolation_scale": 0}, "interpolation_scale is 0, not a number from 0 to 100"),
        ({"interpolation_scale": True}, "interpolation_scale is True, not a number"),
        ({"use_additional_conditions": "yes"}, "use_additional_conditions is .*yes.*, not true"),
        ({"cross_attention_dim": 1152}, "cross_attention_dim is 1152; .* has 120"),
        ({"norm_type": "ada_norm_zero"}, "norm_type is .*ada_norm_zero.*; PixArt has "),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05; PixArt has 1e-06"),
        ({"num_layers": 4}, "missing tensor 'transformer_blocks.3."),
        ({"num_layers": 2}, "unknown tensor .*transformer_blocks.2."),
        ({"use_additional_conditions": False}, "unknown tensor .*resolution_embedder"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, message):
    edit_config(write_diffusers(tmp_path), **changes)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        plan(checkpoint, RECIPES["float"])


def test_tensors_say_whether_there_are_micro_conditions_where_the_config_does_not(tmp_path):
    """The first published config of PixArt-Sigma does not; diffusers went by the sample size."""
    sigma = dataclasses.replace(TINY, micro_conditions=False, sample_size=128)
    for config in (sigma, dataclasses.replace(TINY, sample_size=64, interpolation=1.0)):
        folder = write_diffusers(tmp_path / str(config.sample_size), config)
        edit_config(folder, use_additional_conditions="gone", interpolation_scale="gone")
        with open_checkpoint(folder) as checkpoint:
            assert plan(checkpoint, RECIPES["float"]).config == config


def test_a_config_makes_the_way_to_diffusers_and_back():
    for config in (*PUBLISHED.values(), PIXART_SIGMA_256, TINY):
        document = json.loads(json.dumps(pixart.to_diffusers_config(config)))
        for stated in (True, False):  # the document says it all
            assert pixart.from_diffusers_config(document, micro_conditions=stated) == config
        known = diffusers_config(config)
        assert {key: document[key] for key in known} == known


def test_no_network_is_taken_for_another(tmp_path):
    for layout, write in (("diffusers", write_diffusers), ("original", write_original)):
        with open_checkpoint(write(tmp_path / layout)) as checkpoint:
            job = plan(checkpoint, RECIPES["float"], model="pixart")
            assert (job.model, job.layout.name) == ("pixart", layout)
            for other in ("dit", "flux"):
                with pytest.raises(CheckpointError, match=f"not a {other} checkpoint"):
                    plan(checkpoint, RECIPES["float"], model=other)
    for files, name in ((dit_files, "dit"), (flux_files, "flux")):
        with open_checkpoint(files.write_source(tmp_path / name)) as checkpoint:
            with pytest.raises(CheckpointError, match="not a pixart checkpoint"):
                plan(checkpoint, RECIPES["float"], model="pixart")


def test_diffusers_layout_without_config_is_refused(tmp_path):
    (write_diffusers(tmp_path) / "config.json").unlink()
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, RECIPES["float"])
    assert "add diffusers' config.json" in str(caught.value)
