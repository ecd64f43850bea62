"""FLUX files in both layouts: the tree, the tables, the config, and the way back.

The other side is diffusers: its model writes the files, reads our exports and says what the
output is. The tables are compared with the names and shapes of the published checkpoints.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import flux
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.job import plan, run
from convert.safetensors import TensorFile, write_safetensors
from convert.table import expand
from lowbit_jax.checkpoint import OutputError, assemble, iter_parts
from lowbit_jax.models.flux import FLUX_DEV, FLUX_SCHNELL, FluxTransformer, abstract_params
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from tests.references.flux_files import (
    PUBLISHED_HEADS,
    TINY,
    bfl_shapes,
    diffusers_config,
    diffusers_shapes,
    random_tensors,
    write_source,
)

SCHNELL = dataclasses.replace(TINY, guidance_embed=False)
# see tests/models/test_flux.py: the float32 noise of the network, and of the time embedding
AT_ZERO, AT_USUAL = 4e-6, 5e-5


def ported(path, recipe="float", dtype=jnp.float32):
    """(job, tree) of a checkpoint, converted leaf by leaf."""
    parts = []
    with open_checkpoint(path) as checkpoint:
        job = plan(checkpoint, RECIPES[recipe], dtype=dtype)
        run(job, lambda name, part: parts.append((name, part)))
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


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side of FLUX."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.flux as reference

    return reference


@pytest.mark.parametrize("config", [PUBLISHED_HEADS, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("shards", [None, "200KB"], ids=["file", "shards"])
def test_what_diffusers_saves_gives_its_tree_and_its_output(tmp_path, reference, config, shards):
    theirs = reference.diffusers_flux(config)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 5 if shards else 1
    job, params = ported(tmp_path)
    assert (job.model, job.layout.name, job.config) == ("flux", "diffusers", config)
    # by a mapping of its own: swapped halves, fused qkv and linear1, every name
    expected = reference.flux_params(dict(theirs.state_dict()), config)
    assert_same(params, jax.tree.map(jnp.asarray, expected))
    usual = reference.flux_inputs(config)
    zero = usual | {name: 0 * usual[name] for name in ("timestep", "guidance") if name in usual}
    apply = jax.jit(FluxTransformer(config).apply)
    for inputs, limit in ((usual, AT_USUAL), (zero, AT_ZERO)):
        out = apply({"params": params}, **inputs)
        assert relative_error(out, reference.run_flux(theirs, inputs)) < limit


def to_bfl(state):
    """A diffusers state dict in Black Forest Labs' layout."""
    out = {}

    def move(new, *old, swap=False):
        for kind in ("weight", "bias"):
            array = np.concatenate([state[f"{name}.{kind}"] for name in old])
            if swap:  # (scale, shift) to (shift, scale)
                array = np.concatenate(np.split(array, 2)[::-1])
            out[f"{new}.{kind}"] = array

    def scale(new, old):
        out[f"{new}.scale"] = state[f"{old}.weight"]

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    embedders = {"time": "timestep", "guidance": "guidance", "vector": "text"}
    for new, old in embedders.items():
        if f"time_text_embed.{old}_embedder.linear_1.weight" in state:
            move(f"{new}_in.in_layer", f"time_text_embed.{old}_embedder.linear_1")
            move(f"{new}_in.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    i = 0
    while f"transformer_blocks.{i}.norm1.linear.weight" in state:
        p, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        move(f"{b}.img_mod.lin", f"{p}.norm1.linear")
        move(f"{b}.txt_mod.lin", f"{p}.norm1_context.linear")
        move(f"{b}.img_attn.qkv", *(f"{p}.attn.to_{x}" for x in "qkv"))
        move(f"{b}.txt_attn.qkv", *(f"{p}.attn.add_{x}_proj" for x in "qkv"))
        move(f"{b}.img_attn.proj", f"{p}.attn.to_out.0")
        move(f"{b}.txt_attn.proj", f"{p}.attn.to_add_out")
        for stream, old in (("img", "norm_"), ("txt", "norm_added_")):
            scale(f"{b}.{stream}_attn.norm.query_norm", f"{p}.attn.{old}q")
            scale(f"{b}.{stream}_attn.norm.key_norm", f"{p}.attn.{old}k")
        for stream, old in (("img", "ff"), ("txt", "ff_context")):
            move(f"{b}.{stream}_mlp.0", f"{p}.{old}.net.0.proj")
            move(f"{b}.{stream}_mlp.2", f"{p}.{old}.net.2")
        i += 1
    j = 0
    while f"single_transformer_blocks.{j}.norm.linear.weight" in state:
        p, b = f"single_transformer_blocks.{j}", f"single_blocks.{j}"
        move(f"{b}.modulation.lin", f"{p}.norm.linear")
        move(f"{b}.linear1", *(f"{p}.attn.to_{x}" for x in "qkv"), f"{p}.proj_mlp")
        move(f"{b}.linear2", f"{p}.proj_out")
        scale(f"{b}.norm.query_norm", f"{p}.attn.norm_q")
        scale(f"{b}.norm.key_norm", f"{p}.attn.norm_k")
        j += 1
    move("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    move("final_layer.linear", "proj_out")
    return out


@pytest.mark.parametrize("guidance", [True, False])
def test_both_layouts_without_config_give_the_same_tree(tmp_path, guidance):
    config = dataclasses.replace(PUBLISHED_HEADS, guidance_embed=guidance)
    state = random_tensors(diffusers_shapes(config))
    fused = to_bfl(state)
    assert {name: array.shape for name, array in fused.items()} == bfl_shapes(config)
    trees = []
    for name, tensors, layout in (("d", state, "diffusers"), ("b", fused, "Black Forest Labs")):
        path = write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        job, params = ported(path)
        assert (job.layout.name, job.config) == (layout, config)
        trees.append(params)
    assert_same(*trees)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_quantising_on_the_way_is_quantising_the_ported_tree(tmp_path, recipe, dtype):
    source = write_source(tmp_path, PUBLISHED_HEADS, dtype=np.dtype(dtype))
    _, params = ported(source, "float", dtype)
    _, found = ported(source, recipe, dtype)
    assert_same(found, quantize(params, RECIPES[recipe]))


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=["f16", "f64", "bf16"]
)
def test_every_float_dtype_is_rounded_once_to_the_one_asked_for(tmp_path, dtype):
    tensors = random_tensors(diffusers_shapes(TINY), np.float64)
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    source = write_source(tmp_path, TINY, **tensors)
    _, params = ported(source, "float", jnp.float32)
    found = np.asarray(params["img_in"]["kernel"])
    np.testing.assert_array_equal(found, tensors["x_embedder.weight"].T.astype(np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("limit", [10**9, 200_000], ids=["file", "shards"])
def test_an_export_is_the_source_bit_by_bit_and_diffusers_loads_it(tmp_path, reference, limit):
    import torch
    from diffusers import FluxTransformer2DModel

    theirs = reference.diffusers_flux(TINY).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "source")
    job, params = ported(tmp_path / "source", dtype=jnp.bfloat16)
    export_diffusers(tmp_path / "export", params, "flux", job.config, max_shard_bytes=limit)
    with open_checkpoint(tmp_path / "source") as a, open_checkpoint(tmp_path / "export") as b:
        assert a.names == b.names and len(b.files) == 1 if limit > 10**6 else len(b.files) > 5
        for name in a.names:
            assert a.info(name).dtype == b.info(name).dtype == ml_dtypes.bfloat16
            assert a.read(name).tobytes() == b.read(name).tobytes(), name
    again, report = FluxTransformer2DModel.from_pretrained(
        tmp_path / "export", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = reference.flux_inputs(TINY)
    expected = reference.run_flux(theirs, inputs)
    np.testing.assert_array_equal(reference.run_flux(again, inputs), expected)


@pytest.mark.parametrize("recipe", ["flux-1.58bit", "w4a16"])
def test_an_export_of_quantised_weights_has_their_output(tmp_path, reference, recipe):
    """The same float32 numbers multiplied in both: the noise of two orders of summation."""
    from diffusers import FluxTransformer2DModel

    source = write_source(tmp_path / "source", PUBLISHED_HEADS, dtype=np.float32)
    job, params = ported(source, recipe)
    export_diffusers(tmp_path / "export", params, "flux", job.config, dtype=jnp.float32)
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "export")
    inputs = reference.flux_inputs(job.config)
    expected = reference.run_flux(theirs, inputs)
    apply = jax.jit(FluxTransformer(job.config).apply)
    assert relative_error(apply({"params": params}, **inputs), expected) < AT_USUAL
    _, unquantised = ported(source)
    assert relative_error(apply({"params": unquantised}, **inputs), expected) > 100 * AT_USUAL


def test_an_export_does_not_write_among_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(TINY))
    with pytest.raises(OutputError, match="is not empty"):
        export_diffusers(tmp_path, params, "flux", TINY)
    odd = dataclasses.replace(TINY, mlp_ratio=2.0)
    with pytest.raises(ValueError, match="diffusers fixes mlp_ratio 4"):
        export_diffusers(tmp_path / "new", params, "flux", odd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


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


# Two rows of the published files, as they stand there, against the two lists above.
def test_the_lists_of_names_are_those_of_the_published_files():
    bfl, diffusers = bfl_shapes(FLUX_DEV), diffusers_shapes(FLUX_DEV)
    assert bfl["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert bfl["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert bfl["single_blocks.37.linear2.weight"] == (3072, 15360)
    assert bfl["double_blocks.0.txt_mod.lin.bias"] == (18432,)
    assert bfl["final_layer.adaLN_modulation.1.weight"] == (6144, 3072)
    assert bfl["guidance_in.in_layer.weight"] == (3072, 256)
    assert diffusers["single_transformer_blocks.37.proj_mlp.weight"] == (12288, 3072)
    assert diffusers["single_transformer_blocks.37.proj_out.weight"] == (3072, 15360)
    assert diffusers["transformer_blocks.18.ff_context.net.0.proj.weight"] == (12288, 3072)
    assert diffusers["transformer_blocks.18.attn.norm_added_k.weight"] == (128,)
    assert diffusers["proj_out.weight"] == (64, 3072)
    assert diffusers["context_embedder.weight"] == (3072, 4096)


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
        ported(tmp_path)


def test_sizes_that_are_in_no_tensor_are_asked_for(tmp_path):
    write_source(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="head dim 32: .* add diffusers' config.json"):
        ported(tmp_path)


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
    with pytest.raises(CheckpointError, match=message), TensorFile(path):
        ported(path)
