"""FLUX files in both layouts: the tree, the tables, the config, and the way back.

The other side is diffusers: its model writes the files, reads our exports and says what the
output is. The tables are compared with the names and shapes of the published checkpoints.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.checkpoint_files import open_checkpoint
from convert.export import export_diffusers
from convert.job import plan, run
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import OutputError, assemble
from lowbit_jax.models.flux import FluxTransformer, abstract_params
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from tests.references.flux_files import (
    PUBLISHED_HEADS,
    TINY,
    bfl_shapes,
    diffusers_shapes,
    random_tensors,
    to_bfl,
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


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side of FLUX."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.flux as reference

    return reference


@pytest.mark.parametrize("config", [TINY, SCHNELL], ids=["dev", "schnell"])
def test_what_diffusers_saves_gives_its_tree_and_its_output(tmp_path, reference, config):
    theirs = reference.diffusers_flux(config)
    theirs.save_pretrained(tmp_path / "file")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert [len(list(path.glob("*.safetensors"))) for path in sorted(tmp_path.iterdir())] == [1, 12]
    job, params = ported(tmp_path / "file")
    assert (job.model, job.layout.name, job.config) == ("flux", "diffusers", config)
    assert_same(ported(tmp_path / "shards")[1], params)
    # by a mapping of its own: swapped halves, fused qkv and linear1, every name
    expected = reference.flux_params(dict(theirs.state_dict()), config)
    assert_same(params, jax.tree.map(jnp.asarray, expected))
    usual = reference.flux_inputs(config)
    zero = usual | {name: 0 * usual[name] for name in ("timestep", "guidance") if name in usual}
    apply = jax.jit(FluxTransformer(config).apply)
    for inputs, limit in ((usual, AT_USUAL), (zero, AT_ZERO)):
        out = apply({"params": params}, **inputs)
        assert relative_error(out, reference.run_flux(theirs, inputs)) < limit


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


SINGLE = dataclasses.replace(TINY, depth=0)  # its k: 64, less than a group, and 320, 2.5 groups


# those that need statistics: tests/convert/test_transforms.py
WITHOUT_STATISTICS = [name for name, recipe in RECIPES.items() if not recipe.needs_statistics]


@pytest.mark.parametrize(
    ("recipe", "dtype", "config"),
    [pytest.param(name, np.float32, SINGLE, id=name) for name in WITHOUT_STATISTICS]
    + [pytest.param("w4a16", ml_dtypes.bfloat16, TINY, id="both-blocks-bf16")],
)
def test_quantising_on_the_way_is_quantising_the_ported_tree(tmp_path, recipe, dtype, config):
    source = write_source(tmp_path, config, dtype=dtype)
    _, params = ported(source, "float", dtype)
    _, found = ported(source, recipe, dtype)
    assert_same(found, quantize(params, RECIPES[recipe]))


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=["f16", "f64", "bf16"]
)
def test_every_float_dtype_is_rounded_once_to_the_one_asked_for(tmp_path, dtype):
    shapes = diffusers_shapes(SINGLE)
    tensors = {name: x.astype(dtype) for name, x in random_tensors(shapes, np.float64).items()}
    source = write_source(tmp_path, SINGLE, **tensors)
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
    """Scales are applied after the sum here and before it there: a rounding more or less."""
    from diffusers import FluxTransformer2DModel

    reference.diffusers_flux(SINGLE).save_pretrained(tmp_path / "source")
    job, params = ported(tmp_path / "source", recipe)
    export_diffusers(tmp_path / "export", params, "flux", job.config, dtype=jnp.float32)
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "export")
    inputs = reference.flux_inputs(job.config)
    inputs |= {name: 0 * inputs[name] for name in ("timestep", "guidance")}
    expected = reference.run_flux(theirs, inputs)
    model = FluxTransformer(job.config)
    assert relative_error(jax.jit(model.apply)({"params": params}, **inputs), expected) < AT_ZERO
    unquantised = model.apply({"params": ported(tmp_path / "source")[1]}, **inputs)
    assert relative_error(unquantised, expected) > 1e4 * AT_ZERO


def test_an_export_does_not_write_among_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(TINY))
    with pytest.raises(OutputError, match="is not empty"):
        export_diffusers(tmp_path, params, "flux", TINY)
    odd = dataclasses.replace(TINY, mlp_ratio=2.0)
    with pytest.raises(ValueError, match="diffusers fixes mlp_ratio 4"):
        export_diffusers(tmp_path / "new", params, "flux", odd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]
