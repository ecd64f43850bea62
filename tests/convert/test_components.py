"""Text encoders and autoencoders as files: layouts, aliases, refusals, recipes, the way back."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import autoencoder_kl, clip_text, t5
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.job import plan
from convert.safetensors import write_safetensors
from lowbit_jax.checkpoint import load
from lowbit_jax.models.autoencoder_kl import FLUX_VAE, AutoencoderKL
from lowbit_jax.models.clip_text import CLIP_L, LEGACY_EOS
from lowbit_jax.models.t5 import T5_XXL
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.stacks import iter_layers
from tests.references.conversion import assert_same, ported, source_shapes

transformers = pytest.importorskip("transformers", reason="the owner of the files")
from tests.references import autoencoder_kl as vae_reference  # noqa: E402
from tests.references import text_encoders as reference  # noqa: E402

TINY_T5, TINY_CLIP, TINY_VAE = reference.TINY_T5, reference.TINY_CLIP, vae_reference.TINY_FLUX


@pytest.fixture(scope="module")
def t5_model():
    return reference.transformers_t5(TINY_T5)


@pytest.fixture(scope="module")
def clip_model():
    return reference.transformers_clip(TINY_CLIP)


@pytest.fixture(scope="module")
def vae_model():
    return vae_reference.diffusers_vae(TINY_VAE)


def tensors(model, prefix=""):
    """A model's tensors as its owner names them in a file."""
    return {prefix + name: t.detach().numpy() for name, t in model.state_dict().items()}


def refused(folder):
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError) as caught:
        plan(checkpoint, RECIPES["float"])
    return str(caught.value)


def write(folder, arrays, config=None):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", arrays)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_transformers_saves_of_a_t5_gives_its_tree(tmp_path, t5_model):
    """In shards with an index, as the published one."""
    t5_model.save_pretrained(tmp_path, max_shard_size="20KB")
    job, params = ported(tmp_path)
    assert len(job.checkpoint.files) > 2
    assert (job.model, job.layout.name, job.config) == ("t5", "transformers", TINY_T5)
    assert_same(params, reference.t5_params(t5_model, TINY_T5))


def test_the_shared_table_of_a_t5_has_two_names(tmp_path, t5_model):
    """Either may be in the file; both must be equal."""
    both = tensors(t5_model)
    assert {"shared.weight", "encoder.embed_tokens.weight"} < set(both)
    config = t5.to_transformers_config(TINY_T5)
    expected = reference.t5_params(t5_model, TINY_T5)
    for name in ("shared.weight", "encoder.embed_tokens.weight", None):
        kept = {key: value for key, value in both.items() if key != name}
        assert_same(ported(write(tmp_path / str(name), kept, config))[1], expected)
    both["encoder.embed_tokens.weight"] = both["shared.weight"] + 1
    with pytest.raises(CheckpointError, match="'encoder.embed_tokens.weight' differs from 'shared"):
        ported(write(tmp_path / "odd", both, config))
    neither = {key: v for key, v in both.items() if v.shape != both["shared.weight"].shape}
    assert "missing tensor 'shared.weight' (61, 48)" in refused(write(tmp_path, neither, config))


def test_a_lone_t5_file_says_its_sizes(tmp_path, t5_model):
    """All but how far its buckets reach, 128 where it was published."""
    config = ported(write(tmp_path, tensors(t5_model)))[0].config
    assert config == replace(TINY_T5, relative_attention_max_distance=128)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_files_of_old_and_new_transformers_give_the_same_tree(tmp_path, clip_model, prefix):
    arrays = tensors(clip_model, prefix)
    positions = f"{prefix}embeddings.position_ids"
    arrays.pop(positions, None)
    config = clip_text.to_transformers_config(TINY_CLIP)
    expected = reference.clip_params(clip_model, TINY_CLIP)
    job, params = ported(write(tmp_path / "new", arrays, config))
    assert (job.model, job.config) == ("clip-text", TINY_CLIP)
    assert_same(params, expected)
    ids = np.arange(TINY_CLIP.max_position_embeddings)[None]
    for number, stored in enumerate((ids, ids.astype(np.float32))):
        folder = write(tmp_path / f"old{number}", arrays | {positions: stored}, config)
        assert_same(ported(folder)[1], expected)
    odd = write(tmp_path / "odd", arrays | {positions: ids[:, ::-1].copy()}, config)
    with pytest.raises(CheckpointError, match="position_ids' differs by 20"):
        ported(odd)


def test_what_transformers_saves_of_a_clip_gives_its_tree(tmp_path, clip_model):
    clip_model.save_pretrained(tmp_path)
    job, params = ported(tmp_path)
    assert (job.layout.name, job.config) == ("transformers 5", TINY_CLIP)
    assert_same(params, reference.clip_params(clip_model, TINY_CLIP))


def test_a_lone_clip_file_says_its_sizes_where_they_were_published(tmp_path):
    config = replace(CLIP_L, num_hidden_layers=1, vocab_size=70)
    arrays = tensors(reference.transformers_clip(config), "text_model.")
    arrays.pop("text_model.embeddings.position_ids", None)
    assert ported(write(tmp_path, arrays))[0].config == config
    assert config.eos_token_id == LEGACY_EOS
    tiny = tensors(reference.transformers_clip(TINY_CLIP))
    tiny.pop("embeddings.position_ids", None)
    assert "the heads of a width of 48 are in no tensor" in refused(write(tmp_path / "tiny", tiny))


def test_both_layouts_of_an_autoencoder_give_one_tree(tmp_path, vae_model):
    """diffusers' folder, the names it had before 0.15, and ae.safetensors' layout."""
    vae_model.save_pretrained(tmp_path / "new")
    job, params = ported(tmp_path / "new")
    assert (job.layout.name, job.config) == ("diffusers", TINY_VAE)
    arrays = tensors(vae_model)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in arrays.items():
        for now, before in old.items():
            name = name.replace(f".{now}.", f".{before}.")
        renamed[name] = array
    assert len(set(renamed) - set(arrays)) == 16
    config = autoencoder_kl.to_diffusers_config(TINY_VAE)
    assert_same(ported(write(tmp_path / "old", renamed, config))[1], params)
    original = vae_reference.to_original(arrays)
    assert len(original) == len(arrays)
    job, found = ported(write(tmp_path / "original", original, config))
    assert job.layout.name == "original"
    assert_same(found, params)


def test_a_lone_ae_file_is_flux_s(tmp_path):
    """Sizes from shapes, scale and shift from what was published with 16 channels."""
    config = replace(FLUX_VAE, block_out_channels=(32, 64), layers_per_block=1)
    model = vae_reference.diffusers_vae(config)
    path = tmp_path / "ae.safetensors"
    write_safetensors(path, vae_reference.to_original(tensors(model)))
    job, params = ported(path)
    assert (job.model, job.layout.name, job.config) == ("autoencoder-kl", "original", config)
    latents = np.random.default_rng(0).standard_normal((1, 3, 2, 16), np.float32)
    apply = jax.jit(AutoencoderKL(config).apply, static_argnames="method")
    found = apply({"params": params}, latents, method="decode")
    expected = vae_reference.decode(model, latents)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    odd = vae_reference.diffusers_vae(replace(config, latent_channels=8))
    folder = write(tmp_path / "odd", vae_reference.to_original(tensors(odd)))
    assert "the scale of 8 latent channels is in no tensor" in refused(folder)


def test_names_and_shapes_that_do_not_fit_are_told_together(tmp_path, t5_model, clip_model):
    arrays = tensors(t5_model)
    arrays["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"] = np.zeros((80, 47), np.float32)
    arrays["decoder.final_layer_norm.weight"] = np.zeros(48, np.float32)
    del arrays["encoder.final_layer_norm.weight"]
    text = refused(write(tmp_path / "t5", arrays, t5.to_transformers_config(TINY_T5)))
    assert "3 problems" in text
    assert "missing tensor 'encoder.final_layer_norm.weight' (48,) of t5" in text
    assert "unknown tensor 'decoder.final_layer_norm.weight'" in text
    assert "wi_1.weight' has shape (80, 47)" in text
    arrays = tensors(clip_model) | {"text_projection.weight": np.zeros((48, 48), np.float32)}
    arrays.pop("embeddings.position_ids", None)
    text = refused(write(tmp_path / "clip", arrays, clip_text.to_transformers_config(TINY_CLIP)))
    assert "unknown tensor 'text_projection.weight'" in text


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; a T5 v1.1 encoder has"),
        ("t5", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ("t5", {"num_layers": 4}, "missing tensor 'encoder.block.3."),
        ("t5", {"num_heads": 0}, "num_heads is 0, not an integer from 1"),
        ("clip", {"hidden_act": "relu"}, "hidden_act 'relu' is none of"),
        ("clip", {"eos_token_id": None}, "eos_token_id is None, not a token"),
        ("clip", {"max_position_embeddings": 20}, "position_embedding.weight' has shape (21, 48)"),
        ("vae", {"act_fn": "gelu"}, "act_fn is 'gelu'; the ported AutoencoderKL has"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean is"),
        ("vae", {"scaling_factor": None}, "scaling_factor None"),
        ("vae", {"block_out_channels": [8, 16]}, "down_block_types is"),
        ("vae", {"use_quant_conv": True}, "missing tensor 'quant_conv.weight' (32, 32, 1, 1)"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    tmp_path, t5_model, clip_model, vae_model, make, changes, message
):
    models = {
        "t5": (t5_model, t5.to_transformers_config(TINY_T5)),
        "clip": (clip_model, clip_text.to_transformers_config(TINY_CLIP)),
        "vae": (vae_model, autoencoder_kl.to_diffusers_config(TINY_VAE)),
    }
    model, config = models[make]
    arrays = tensors(model)
    arrays.pop("embeddings.position_ids", None)
    assert message in refused(write(tmp_path, arrays, config | changes))


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
def test_a_converted_t5_has_no_float_linear(tmp_path, convert, t5_model, recipe):
    """By the program, from shards; and what it prints says what was kept."""
    t5_model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    code, said, _ = convert(tmp_path / "source", recipe=recipe)
    assert code == 0 and "t5 in transformers layout" in said
    saved = load(tmp_path / "out")
    kernels = [kernel for _, kernel, _ in iter_layers(saved.params)]
    assert len(kernels) == 7 * TINY_T5.num_layers
    assert all(isinstance(kernel, QTensor) for kernel in kernels)
    assert "norms and tables" in said


@pytest.mark.parametrize("name", ["t5", "clip-text"])
def test_transformers_loads_an_export(tmp_path, t5_model, clip_model, name):
    model, config = {"t5": (t5_model, TINY_T5), "clip-text": (clip_model, TINY_CLIP)}[name]
    model.save_pretrained(tmp_path / "source")
    _, params = ported(tmp_path / "source")
    export_diffusers(tmp_path / "export", params, name, config, dtype=jnp.float32)
    again, report = type(model).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = np.arange(3, 15)[None]
    run = reference.run_t5 if name == "t5" else reference.run_clip
    for found, expected in zip(run(again.eval(), ids), run(model, ids), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_diffusers_loads_an_export_of_an_autoencoder(tmp_path, vae_model):
    vae_model.save_pretrained(tmp_path / "source")
    _, params = ported(tmp_path / "source")
    folder = export_diffusers(
        tmp_path / "export", params, "autoencoder-kl", TINY_VAE, dtype=jnp.float32
    )
    again, report = type(vae_model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    latents = np.random.default_rng(0).standard_normal((1, 3, 2, 16), np.float32)
    expected = vae_reference.decode(vae_model, latents)
    np.testing.assert_array_equal(vae_reference.decode(again, latents), expected)


def test_full_size_tables_name_what_the_owners_have():
    """Of T5-XXL, CLIP-L and FLUX.1's autoencoder, from classes without memory."""
    import torch
    from diffusers import AutoencoderKL as Vae

    with torch.device("meta"):
        t5_model = transformers.T5EncoderModel(reference.t5_config(T5_XXL))
        clip_model = transformers.CLIPTextModel(reference.clip_config(CLIP_L))
        described = autoencoder_kl.to_diffusers_config(FLUX_VAE)
        vae_model = Vae.from_config(described)
    cases = (
        ("t5", T5_XXL, t5.TRANSFORMERS, t5_model),
        ("clip-text", CLIP_L, clip_text.TRANSFORMERS_5, clip_model),
        ("autoencoder-kl", FLUX_VAE, autoencoder_kl.DIFFUSERS, vae_model),
    )
    for name, config, layout, model in cases:
        expected = {key: tuple(p.shape) for key, p in model.named_parameters()}
        assert source_shapes(name, config, layout) == expected


def test_shards_of_another_text_encoder_are_refused(tmp_path, t5_model):
    """A shard that the index does not list is named, as for networks."""
    t5_model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    del document["weight_map"][name]
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="but not in the index"):
        open_checkpoint(tmp_path)
