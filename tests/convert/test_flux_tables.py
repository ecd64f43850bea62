"""FLUX tables against the names and shapes of the published files; the sizes of a checkpoint."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

from convert import flux
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.job import plan
from convert.safetensors import write_safetensors
from convert.table import expand
from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.models.flux import FLUX_DEV, FLUX_SCHNELL, abstract_params
from lowbit_jax.quant.recipe import RECIPES
from tests.references.flux_files import (
    PUBLISHED_HEADS,
    TINY,
    bfl_shapes,
    diffusers_config,
    diffusers_shapes,
    random_tensors,
    write_source,
)


def planned(path):
    with open_checkpoint(path) as checkpoint:
        return plan(checkpoint, RECIPES["float"])


@pytest.mark.parametrize(
    ("config", "layout", "shapes", "count"),
    [
        pytest.param(FLUX_DEV, flux.BFL, bfl_shapes, 780, id="bfl-dev"),
        pytest.param(FLUX_SCHNELL, flux.BFL, bfl_shapes, 776, id="bfl-schnell"),
        pytest.param(FLUX_DEV, flux.DIFFUSERS, diffusers_shapes, 1160, id="diffusers-dev"),
        pytest.param(FLUX_SCHNELL, flux.DIFFUSERS, diffusers_shapes, 1156, id="diffusers-schnell"),
    ],
)
def test_tables_name_the_published_tensors_with_their_shapes(config, layout, shapes, count):
    parts = iter_parts(abstract_params(config))
    paths = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in parts}
    leaves = expand(layout, config, paths)
    found = [item for leaf in leaves for item in leaf.source_shapes().items()]
    assert len(found) == count
    assert dict(found) == shapes(config)


def test_the_lists_are_those_of_the_published_files():
    """diffusers' own module for one layout; for the other, Black Forest Labs' parameter count."""
    bfl = bfl_shapes(FLUX_DEV)
    assert sum(math.prod(shape) for shape in bfl.values()) == 11_901_408_320
    assert bfl["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert bfl["double_blocks.0.txt_mod.lin.bias"] == (18432,)
    assert bfl["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert bfl["single_blocks.37.linear2.weight"] == (3072, 15360)
    assert bfl["final_layer.adaLN_modulation.1.weight"] == (6144, 3072)
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    for config in (FLUX_DEV, FLUX_SCHNELL):
        with torch.device("meta"):
            model = diffusers.FluxTransformer2DModel(guidance_embeds=config.guidance_embed)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert diffusers_shapes(config) == expected


def test_a_config_makes_the_way_to_diffusers_and_back():
    for config in (FLUX_DEV, FLUX_SCHNELL, TINY):
        document = json.loads(json.dumps(flux.to_diffusers_config(config)))
        assert flux.from_diffusers_config(document) == config
        shared = diffusers_config(config)
        assert {key: document[key] for key in shared} == shared


def edit_config(folder, **changes):
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "gone"}, "config.json lacks 'num_attention_heads'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not an integer from 1"),
        ({"attention_head_dim": 32.0}, "attention_head_dim is 32.0, not an integer"),
        ({"num_layers": True}, "num_layers is True, not an integer from 0"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"axes_dims_rope": [8, 12, 14]}, r"axes_dim \(8, 12, 14\) must be even and sum"),
        ({"axes_dims_rope": None}, "not a FLUX configuration"),
        ({"out_channels": 16}, "Fill, Canny and Depth variants are not ported"),
        ({"patch_size": 2}, "patch_size 2"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, message):
    edit_config(write_source(tmp_path), **changes)
    with pytest.raises(CheckpointError, match=message):
        planned(tmp_path)


def test_sizes_that_are_in_no_tensor_are_asked_for(tmp_path):
    write_source(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="head dim 32: .* add diffusers' config.json"):
        planned(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("img_in.weight", (0, 8), "not a FLUX configuration"),
        ("img_in.weight", (64, 8), "not a FLUX configuration"),
        ("txt_in.weight", None, "has no tensor 'txt_in.weight'"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", None, "query_norm.scale"),
        ("double_blocks.1.img_mod.lin.weight", None, "unknown tensor 'double_blocks.1"),
    ],
)
def test_sizes_that_cannot_be_read_off_the_tensors(tmp_path, name, shape, message):
    tensors = random_tensors(bfl_shapes(PUBLISHED_HEADS), ml_dtypes.bfloat16)
    tensors[name] = None if shape is None else np.zeros(shape, np.float32)
    tensors = {key: value for key, value in tensors.items() if value is not None}
    path = write_safetensors(tmp_path / "flux.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        planned(path)
