"""The autoencoder against diffusers', in float32 and bfloat16, by way of its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models import autoencoder_kl as vae
from lowbit_jax.models.autoencoder_kl import FLUX_VAE, SD_VAE, AutoencoderConfig, AutoencoderKL
from lowbit_jax.quant import quantize
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import Recipe, Rule, WeightSpec
from lowbit_jax.quant.stacks import iter_layers

pytest.importorskip("diffusers", reason="the reference is diffusers")
from tests.references import autoencoder_kl as reference  # noqa: E402
from tests.references.conversion import ported  # noqa: E402

CONFIGS = {"flux": reference.TINY_FLUX, "sd": reference.TINY_SD}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(config, diffusers' model, our parameters)."""
    config = CONFIGS[request.param]
    model = reference.diffusers_vae(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    job, params = ported(folder)
    assert (job.model, job.config) == ("autoencoder-kl", config)
    return config, model, params


def run(config, params, x, method, dtype=jnp.float32):
    apply = jax.jit(AutoencoderKL(config, dtype).apply, static_argnames="method")
    return apply({"params": params}, x, method=method)


def relative(found, expected):
    return np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max()


def inputs(config, rows=3, columns=5, batch=2):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, rows, columns, config.latent_channels), np.float32)
    size = (batch, rows * config.pixels, columns * config.pixels, config.in_channels)
    return latents, rng.uniform(-1, 1, size).astype(np.float32)


def test_equals_diffusers_both_ways(pair):
    """At 3 x 5 latents; the decoder needs no more than its own parameters."""
    config, model, params = pair
    latents, pixels = inputs(config)
    half = {name: params[name] for name in params if name in ("decoder", "post_quant_conv")}
    assert relative(run(config, half, latents, "decode"), reference.decode(model, latents)) < 1e-5
    found, expected = run(config, params, pixels, "encode"), reference.encode(model, pixels)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == latents.shape
        assert relative(ours, theirs) < 1e-5


def test_the_variance_is_clipped():
    """As in diffusers; a last convolution of zeros but for its bias says what comes out."""
    config = reference.TINY_FLUX
    ask = jnp.linspace(-100, 100, 2 * config.latent_channels)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), vae.abstract_params(config))
    params["encoder"]["conv_out"]["bias"] = ask
    mean, logvar = run(config, params, inputs(config)[1], "encode")
    np.testing.assert_array_equal(mean[0, 0, 0], ask[: config.latent_channels])
    np.testing.assert_array_equal(logvar[0, 0, 0], jnp.clip(ask[config.latent_channels :], -30, 20))


def test_a_picture_that_is_no_whole_latents_is_refused(pair):
    config, _, params = pair
    with pytest.raises(ValueError, match="7 x 8 pixels is not whole latents"):
        AutoencoderKL(config).apply({"params": params}, jnp.zeros((1, 7, 8, 3)), method="encode")


def test_bfloat16_is_no_coarser_than_diffusers(pair):
    import torch

    config, model, params = pair
    latents, _ = inputs(config)
    exact = reference.decode(model, latents)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    found = run(config, half, latents, "decode", jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    with torch.no_grad():
        z = torch.tensor(latents, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        theirs = reference.diffusers_vae(config).to(torch.bfloat16).decode(z).sample
    theirs = theirs.permute(0, 2, 3, 1).float().numpy()
    rms = lambda x: float(np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)))  # noqa: E731
    assert 0 < rms(found) < 1.2 * rms(theirs)


@pytest.mark.parametrize("pair", ["sd"], indirect=True)
def test_a_quantised_autoencoder_is_near_the_float_one(pair):
    """Every matrix of the decoder, with and without int8 activations.

    By a recipe of its own: the named ones speak of transformer blocks.
    """
    config, model, params = pair
    spec = WeightSpec(format="int8", quantizer="absmax")
    rules = (
        Rule(match="decoder/(mid|up_0)/.*", weights=spec, act_bits=8),
        Rule(match="decoder/.*|post_quant_conv", weights=spec),
    )
    half = {name: params[name] for name in ("decoder", "post_quant_conv")}
    low = jax.jit(lambda p: quantize(p, Recipe(name="vae", rules=rules)))(half)
    assert not [layer for layer, kernel, _ in iter_layers(low) if not isinstance(kernel, QTensor)]
    latents, _ = inputs(config)
    found = run(config, low, latents, "decode")
    assert 0 < relative(found, reference.decode(model, latents)) < 0.1


def test_the_published_numbers_of_parameters():
    """FLUX.1's as published, Stable Diffusion's counted by diffusers' class of its sizes."""
    import torch
    from diffusers import AutoencoderKL as Theirs

    def count(config):
        return sum(leaf.size for leaf in jax.tree.leaves(vae.abstract_params(config)))

    with torch.device("meta"):
        levels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        levels |= {"down_block_types": ("DownEncoderBlock2D",) * 4}
        levels |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
        flux = Theirs(**levels, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
        sd = Theirs(**levels, latent_channels=4)
    assert count(FLUX_VAE) == 83_819_683 == sum(p.numel() for p in flux.parameters())
    assert count(SD_VAE) == sum(p.numel() for p in sd.parameters())


@pytest.mark.slow
def test_flux_at_full_size_equals_diffusers(tmp_path):
    """The published sizes, 64 x 64 pixels."""
    model = reference.diffusers_vae(FLUX_VAE)
    model.save_pretrained(tmp_path)
    job, params = ported(tmp_path)
    assert job.config == FLUX_VAE
    latents, pixels = inputs(FLUX_VAE, 8, 8, 1)
    assert relative(run(FLUX_VAE, params, latents, "decode"), reference.decode(model, latents)) < (
        1e-4
    )
    found, expected = run(FLUX_VAE, params, pixels, "encode"), reference.encode(model, pixels)
    assert max(relative(*both) for both in zip(found, expected, strict=True)) < 1e-4


def test_scale_and_shift_are_those_of_the_pipelines():
    """FLUX.1: (z - 0.1159) * 0.3611 on the way in, z / 0.3611 + 0.1159 on the way out."""
    z = jnp.array([[[[0.1159, 1.1159]]]])
    np.testing.assert_allclose(vae.standardise(FLUX_VAE, z).ravel(), [0, 0.3611], atol=1e-7)
    np.testing.assert_allclose(vae.restore(FLUX_VAE, vae.standardise(FLUX_VAE, z)), z, rtol=1e-6)


def test_channels_that_are_not_whole_groups_are_refused():
    with pytest.raises(ValueError, match="must be multiples of norm_num_groups 32"):
        AutoencoderConfig(block_out_channels=(128, 48))
