"""The autoencoder as diffusers runs it: random weights, its files in both layouts, one call.

The renaming to the original layout is written from the published names and shares nothing with
`convert`.
"""

import math
import re
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL

from lowbit_jax.models.autoencoder_kl import FLUX_VAE, SD_VAE

# Small: three levels, one with a change of channels and one without, groups of several channels.
TINY_FLUX = replace(
    FLUX_VAE,
    latent_channels=16,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
)
TINY_SD = replace(
    SD_VAE, latent_channels=4, block_out_channels=(8, 12), layers_per_block=2, norm_num_groups=2
)


def diffusers_vae(config, seed=0):
    """diffusers' model of an `AutoencoderConfig`; all of it random."""
    levels = len(config.block_out_channels)
    with torch.device("meta"):
        model = AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor,
            use_quant_conv=config.use_quant_conv,
            use_post_quant_conv=config.use_post_quant_conv,
        )
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # outputs as large as inputs
                bound = math.sqrt(3 / parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def encode(model, pixels):
    """Means and log variances, channels last."""
    with torch.no_grad():
        dist = model.encode(torch.tensor(pixels).permute(0, 3, 1, 2)).latent_dist
    return tuple(x.permute(0, 2, 3, 1).numpy() for x in (dist.mean, dist.logvar))


def decode(model, latents):
    """Pictures, channels last."""
    with torch.no_grad():
        out = model.decode(torch.tensor(latents).permute(0, 3, 1, 2)).sample
    return out.permute(0, 2, 3, 1).numpy()


def to_original(state):
    """A diffusers state dict under the names of `ae.safetensors`, 1x1 convolutions and all."""
    levels = 1 + max(int(m[1]) for n in state if (m := re.search(r"up_blocks\.(\d)", n)))
    rules = [
        (r"(\w+)\.down_blocks\.(\d)\.resnets\.(\d)\.", r"\1.down.\2.block.\3."),
        (r"(\w+)\.down_blocks\.(\d)\.downsamplers\.0\.", r"\1.down.\2.downsample."),
        (
            r"(\w+)\.up_blocks\.(\d)\.resnets\.(\d)\.",
            lambda m: f"{m[1]}.up.{levels - 1 - int(m[2])}.block.{m[3]}.",
        ),
        (
            r"(\w+)\.up_blocks\.(\d)\.upsamplers\.0\.",
            lambda m: f"{m[1]}.up.{levels - 1 - int(m[2])}.upsample.",
        ),
        (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    out = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        array = np.asarray(tensor)
        out[name] = array[..., None, None] if "attn_1" in name and array.ndim == 2 else array
    return out
