"""LoRA files in every key layout, against W + scale * up @ down and diffusers' mapping."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.job import plan, run
from convert.lora import Lora, read_lora
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import assemble, load
from lowbit_jax.models.flux import FLUX_DEV
from lowbit_jax.quant.recipe import RECIPES
from tests.references.conversion import ported, write_checkpoint
from tests.references.flux_files import (
    TINY,
    bfl_shapes,
    diffusers_config,
    diffusers_shapes,
    random_tensors,
    to_bfl,
    write_source,
)

AB = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


def pairs(shapes, rank=3):
    """{linear: (down (r, k), up (n, r))} for every matrix of a checkpoint."""
    rng = np.random.default_rng(0)
    return {
        name.removesuffix(".weight"): (
            rng.standard_normal((rank, shape[1])).astype(np.float32),
            (0.05 * rng.standard_normal((shape[0], rank))).astype(np.float32),
        )
        for name, shape in shapes.items()
        if len(shape) == 2
    }


def as_file(path, named, prefix="", ends=AB, alpha=None, metadata=None, **extra):
    """Write a LoRA file. A prefix "lora_..._" stands for trainers that write dots as underscores;
    `extra` replaces tensors, None leaves one out."""
    tensors = {}
    for name, (down, up) in named.items():
        module = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors |= {f"{module}.{ends[0]}": down, f"{module}.{ends[1]}": up}
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.array(alpha, np.float32)
    tensors = {name: x for name, x in (tensors | extra).items() if x is not None}
    return write_safetensors(path, tensors, metadata)


def merged(tensors, named, scale):
    """float32 of W + scale * up @ down, summed in float64."""
    out = {name: x.astype(np.float32) for name, x in tensors.items()}
    for name, (down, up) in named.items():
        product = scale * np.float64(up) @ np.float64(down)
        out[f"{name}.weight"] = (np.float64(tensors[f"{name}.weight"]) + product).astype(np.float32)
    return out


def converted(source, *loras, recipe="float"):
    parts = []
    with open_checkpoint(source) as checkpoint:
        job = plan(checkpoint, RECIPES[recipe], dtype=jnp.float32, loras=loras)
        run(job, lambda name, part, bad: parts.append((name, part)))
    return job, assemble(parts)


def assert_close(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in leaves:
        np.testing.assert_allclose(a, b, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "layout, prefix, ends",
    [
        ("diffusers", "transformer.", AB),
        ("diffusers", "base_model.model.", ("lora_A.default.weight", "lora_B.default.weight")),
        ("diffusers", "", ("lora.down.weight", "lora.up.weight")),
        ("diffusers", "lora_transformer_", KOHYA),
        ("bfl", "", AB),
        ("bfl", "diffusion_model.", AB),
        ("bfl", "lora_unet_", KOHYA),
    ],
)
def test_merging_is_converting_the_merged_weights(tmp_path, layout, prefix, ends):
    """Every linear of FLUX, fused and half-swapped ones too; alpha 2 of rank 3, strength 0.5."""
    tensors = random_tensors(diffusers_shapes(TINY), ml_dtypes.bfloat16)
    shapes = diffusers_shapes(TINY)
    if layout == "bfl":
        tensors, shapes = to_bfl(tensors), bfl_shapes(TINY)
    named = pairs(shapes)
    file = as_file(tmp_path / "a.safetensors", named, prefix, ends, alpha=2.0)
    job, found = converted(write_source(tmp_path / "source"), Lora.parse(f"{file}=0.5"))
    assert len(job.updates) == sum(leaf.is_kernel for leaf in job.leaves)
    config = diffusers_config(TINY)
    whole = merged(tensors, named, 0.5 * 2 / 3)
    folder = write_checkpoint(tmp_path / "merged", shapes, config, dtype=np.float32, **whole)
    assert_close(found, ported(folder)[1], 1e-6)


def test_an_update_of_one_of_three_fused_linears_leaves_the_others(tmp_path):
    named = pairs(diffusers_shapes(TINY))
    named = {"transformer_blocks.1.attn.to_k": named["transformer_blocks.1.attn.to_k"]}
    file = as_file(tmp_path / "a.safetensors", named, "transformer.")
    updates = read_lora(file, "flux", TINY)
    assert list(updates) == ["double_blocks/1/img_attn/qkv"]
    h = TINY.hidden_size
    update = updates["double_blocks/1/img_attn/qkv"]
    product = update.down @ update.up
    assert not product[:, :h].any() and not product[:, 2 * h :].any()
    down, up = named["transformer_blocks.1.attn.to_k"]
    np.testing.assert_allclose(product[:, h : 2 * h], (up @ down).T, atol=1e-6)


def test_kohya_keys_of_flux_dev_mean_what_diffusers_reads(tmp_path):
    """Full widths. diffusers drops the alpha of the final layer, so that one is its rank here."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch = pytest.importorskip("torch")
    every = ("double_blocks.18.txt_attn.qkv", "double_blocks.0.img_mod.lin", "vector_in.in_layer")
    every += ("single_blocks.37.linear1", "single_blocks.3.modulation.lin", "final_layer.linear")
    every += ("final_layer.adaLN_modulation.1", "double_blocks.5.img_mlp.2", "img_in")
    shapes = {name: bfl_shapes(FLUX_DEV)[f"{name}.weight"] for name in every}
    named = pairs({f"{name}.weight": shape for name, shape in shapes.items()}, rank=2)
    final = {
        f"lora_unet_final_layer_{end}.alpha": np.array(2, np.float32)
        for end in ("linear", "adaLN_modulation_1")
    }
    file = as_file(tmp_path / "b.safetensors", named, "lora_unet_", KOHYA, alpha=0.5, **final)

    from safetensors.torch import load_file

    theirs = conversion._convert_kohya_flux_lora_to_diffusers(load_file(file))
    as_theirs = {name: tensor.to(torch.float32).numpy() for name, tensor in theirs.items()}
    other = write_safetensors(tmp_path / "theirs.safetensors", as_theirs)
    found, expected = read_lora(file, "flux", FLUX_DEV), read_lora(other, "flux", FLUX_DEV)
    assert found.keys() == expected.keys() and len(found) == len(every)
    for path, update in found.items():
        x = np.random.default_rng(1).standard_normal((2, update.down.shape[0]), np.float32)
        a, b = ((x @ low.down) @ low.up for low in (update, expected[path]))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=path)


@pytest.mark.parametrize(
    "config, scale",
    [
        ({"r": 3, "lora_alpha": 12}, 4),
        ({"r": 3, "lora_alpha": 12, "use_rslora": True}, 12 / 3**0.5),
        ({"r": 3, "lora_alpha": 12, "alpha_pattern": {"attn.to_out.0": 6}}, 2),
        ({"r": 3, "lora_alpha": 12, "alpha_pattern": {"out.0": 6}}, 4),
    ],
)
def test_the_alpha_of_the_metadata_counts(tmp_path, config, scale):
    """PEFT's rules: alpha / r, over sqrt(r) with rsLoRA, patterns match whole trailing names."""
    name = "transformer_blocks.0.attn.to_out.0"
    down, up = pairs(diffusers_shapes(TINY))[name]
    packed = {f"transformer.{key}": value for key, value in config.items()}
    file = as_file(
        tmp_path / "a.safetensors",
        {name: (down, up)},
        "transformer.",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(packed)},
    )
    update = read_lora(file, "flux", TINY)["double_blocks/0/img_attn/proj"]
    np.testing.assert_allclose(update.up.T, scale * up, rtol=1e-6)


def test_everything_that_would_be_lost_is_refused_by_name(tmp_path):
    named = pairs(diffusers_shapes(TINY))
    module = "transformer.transformer_blocks.0.attn.to_q"
    q = {f"{module}.{end}": x for end, x in zip(AB, named[module[12:]], strict=True)}
    nan = np.full_like(q[f"{module}.{AB[0]}"], np.nan)
    cases = {
        "of no linear of the model": {"transformer.blocks.0.to_q.lora_A.weight": nan},
        "is of a text encoder; skip": {"lora_te1_text_model_fc1.lora_down.weight": nan},
        "DoRA's magnitudes": {f"{module}.dora_scale": nan},
        "a trained bias": {f"{module}.lora_B.bias": nan},
        "no 'up' matrix": {f"{module}.{AB[1]}": None},
        "is no update of a weight": {f"{module}.{AB[1]}": nan},
        "holds NaN or inf": {f"{module}.{AB[0]}": nan},
        "a second 'down'": {f"{module[12:]}.{AB[0]}": q[f"{module}.{AB[0]}"]},
        "alpha has shape": {f"{module}.alpha": np.ones(3, np.float32)},
        "is int32, not a float": {f"{module}.alpha": np.ones((), np.int32)},
        "holds no update": dict.fromkeys(q),
    }
    for number, (message, extra) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        as_file(path, {module[12:]: named[module[12:]]}, "transformer.", **extra)
        with pytest.raises(CheckpointError, match=message):
            read_lora(path, "flux", TINY)


def test_skipping_is_said_and_must_skip_something(tmp_path):
    name = "transformer_blocks.0.attn.to_q"
    named = {name: pairs(diffusers_shapes(TINY))[name]}
    other = {"lora_te1_x.lora_down.weight": np.ones((2, 2), np.float32)}
    file = as_file(tmp_path / "a.safetensors", named, "transformer.", **other)
    assert len(read_lora(file, "flux", TINY, skip="lora_te.*")) == 1
    with pytest.raises(CheckpointError, match="no key is skipped by 'lora_te2"):
        read_lora(file, "flux", TINY, skip="lora_te2.*")
    with pytest.raises(ValueError, match="not a regular expression"):
        read_lora(file, "flux", TINY, skip="(")


def test_the_program_merges_before_it_quantises(tmp_path, source, convert):
    """Ternary codes of the merged weights; two files add up; the manifest says which."""
    shapes = {n: s for n, s in diffusers_shapes(TINY).items() if n.startswith("single")}
    shapes = {n: s for n, s in shapes.items() if ".2." not in n}
    named = pairs(shapes)
    file = as_file(tmp_path / "a.safetensors", named, "transformer.")
    options = ("--dtype", "f32", "--lora", f"{file}=0.5", f"{file}=1.5")
    code, out, _ = convert(source, *options, recipe="flux-1.58bit", out="twice")
    assert code == 0 and "merging a.safetensors x 0.5, a.safetensors x 1.5: 6 linears" in out
    doubled = {name: (down, 2 * up) for name, (down, up) in named.items()}
    whole = as_file(tmp_path / "b.safetensors", doubled, "transformer.")
    assert convert(source, *options[:3], str(whole), recipe="flux-1.58bit", out="once")[0] == 0
    twice, once = load(tmp_path / "twice"), load(tmp_path / "once")
    assert_close(twice.params, once.params, 1e-6)
    entries = twice.manifest["source"]["loras"]
    assert [entry["strength"] for entry in entries] == [0.5, 1.5]
    assert {entry["file"] for entry in entries} == {"a.safetensors"}
    assert len({entry["sha256"] for entry in entries}) == 1


def test_the_program_refuses_what_it_cannot_merge(tmp_path, source, refused):
    named = pairs({"transformer_blocks.0.attn.to_q.weight": (64, 64)})
    file = as_file(tmp_path / "a.safetensors", named, "transformer.")
    assert "of no linear of the model" in refused(source, "--lora", str(file), lines=None)
    assert "strength 'x' is not a number" in refused(source, "--lora", f"{file}=x")
    assert "does not exist" in refused(source, "--lora", str(tmp_path / "none"))
    assert "none is given" in refused(source, "--lora-skip", "lora_te.*")
