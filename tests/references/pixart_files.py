"""PixArt checkpoints as files: names and shapes of both layouts written out, random numbers.

Shares nothing with the tables of `convert`. Needs no torch.
"""

import dataclasses

import numpy as np

from lowbit_jax.models.pixart import (
    PIXART_ALPHA_512,
    PIXART_ALPHA_1024_MS,
    PIXART_SIGMA_1024_MS,
    PixArtConfig,
)
from tests.references.conversion import write_checkpoint

# Small, every layer there more than once, no two sizes equal that could be mistaken. (At a width of
# 96, XLA sums rows quantised some at a time in another order: other last bits in their scales.)
TINY = PixArtConfig(
    sample_size=8,
    interpolation=2.0,
    in_channels=3,
    hidden_size=120,
    depth=3,
    num_heads=2,
    caption_channels=20,
    micro_conditions=True,
)
# What the original layout stores and diffusers' does not: a null caption, compressed layers (two
# segments).
TINY_ORIGINAL = dataclasses.replace(
    TINY, micro_conditions=False, null_caption_length=5, compressed_layers=(1, 2)
)
PUBLISHED = {
    "alpha-512": PIXART_ALPHA_512,
    "alpha-1024": PIXART_ALPHA_1024_MS,
    "sigma-1024": PIXART_SIGMA_1024_MS,
}
PUBLISHED_ORIGINALS = {
    name: dataclasses.replace(config, null_caption_length=300 if "sigma" in name else 120)
    for name, config in PUBLISHED.items()
}
PUBLISHED_ORIGINALS["sigma-1024-compressed"] = dataclasses.replace(
    PUBLISHED_ORIGINALS["sigma-1024"], compressed_layers=tuple(range(14, 28))
)


def _with_biases(shapes, linears):
    for name, (n, k) in linears.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)
    return shapes


def _out(config):
    return config.patch_size**2 * config.in_channels * (2 if config.learn_sigma else 1)


def diffusers_shapes(config):
    """Name -> shape of every tensor of a diffusers checkpoint."""
    h, p, c = config.hidden_size, config.patch_size, config.in_channels
    shapes = {
        "pos_embed.proj.weight": (h, c, p, p),
        "pos_embed.proj.bias": (h,),
        "scale_shift_table": (2, h),
    }
    linears = {
        "adaln_single.emb.timestep_embedder.linear_1": (h, 256),
        "adaln_single.emb.timestep_embedder.linear_2": (h, h),
        "adaln_single.linear": (6 * h, h),
        "caption_projection.linear_1": (h, config.caption_channels),
        "caption_projection.linear_2": (h, h),
        "proj_out": (_out(config), h),
    }
    if config.micro_conditions:
        for name in ("resolution", "aspect_ratio"):
            linears[f"adaln_single.emb.{name}_embedder.linear_1"] = (h // 3, 256)
            linears[f"adaln_single.emb.{name}_embedder.linear_2"] = (h // 3, h // 3)
    for i in range(config.depth):
        b = f"transformer_blocks.{i}."
        shapes[f"{b}scale_shift_table"] = (6, h)
        for attn in ("attn1", "attn2"):
            linears |= {f"{b}{attn}.{x}": (h, h) for x in ("to_q", "to_k", "to_v", "to_out.0")}
        linears |= {f"{b}ff.net.0.proj": (4 * h, h), f"{b}ff.net.2": (h, 4 * h)}
    return _with_biases(shapes, linears)


def original_shapes(config):
    """Name -> shape of every parameter of an original checkpoint; without its `pos_embed`."""
    h, p, c = config.hidden_size, config.patch_size, config.in_channels
    shapes = {
        "x_embedder.proj.weight": (h, c, p, p),
        "x_embedder.proj.bias": (h,),
        "final_layer.scale_shift_table": (2, h),
    }
    if config.null_caption_length:
        shapes["y_embedder.y_embedding"] = (config.null_caption_length, config.caption_channels)
    linears = {
        "t_embedder.mlp.0": (h, 256),
        "t_embedder.mlp.2": (h, h),
        "t_block.1": (6 * h, h),
        "y_embedder.y_proj.fc1": (h, config.caption_channels),
        "y_embedder.y_proj.fc2": (h, h),
        "final_layer.linear": (_out(config), h),
    }
    if config.micro_conditions:
        for name in ("csize_embedder", "ar_embedder"):
            linears |= {f"{name}.mlp.0": (h // 3, 256), f"{name}.mlp.2": (h // 3, h // 3)}
    for i in range(config.depth):
        b = f"blocks.{i}."
        shapes[f"{b}scale_shift_table"] = (6, h)
        linears |= {
            f"{b}attn.qkv": (3 * h, h),
            f"{b}attn.proj": (h, h),
            f"{b}cross_attn.q_linear": (h, h),
            f"{b}cross_attn.kv_linear": (2 * h, h),
            f"{b}cross_attn.proj": (h, h),
            f"{b}mlp.fc1": (4 * h, h),
            f"{b}mlp.fc2": (h, 4 * h),
        }
        if i in config.compressed_layers:
            size = config.compression
            shapes[f"{b}attn.sr.weight"] = (h, 1, size, size)
            shapes |= {f"{b}attn.{name}": (h,) for name in ("sr.bias", "norm.weight", "norm.bias")}
    return _with_biases(shapes, linears)


def diffusers_config(config):
    """The `config.json` diffusers writes; as the published ones of PixArt-Sigma have it."""
    return {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "attention_type": "default",
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "in_channels": config.in_channels,
        "interpolation_scale": config.interpolation,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "use_additional_conditions": config.micro_conditions,
    }


def write_diffusers(folder, config=TINY, **changes):
    """Write a random diffusers checkpoint and return its folder; see `write_checkpoint`."""
    return write_checkpoint(folder, diffusers_shapes(config), diffusers_config(config), **changes)


def write_original(folder, config=TINY, stated=None, **changes):
    """Write a random original checkpoint and return its folder; heads are in its `config.json`."""
    stated = {"num_attention_heads": config.num_heads} if stated is None else stated
    table = position_table(config)[None]
    return write_checkpoint(
        folder, original_shapes(config), stated, **({"pos_embed": table} | changes)
    )


def position_table(config):
    """The published table, row by row, one position after the other; float32."""
    n, quarter = config.sample_size // config.patch_size, config.hidden_size // 4
    omega = 1 / 10000 ** (np.arange(quarter) / quarter)
    rows = []
    for y in range(n):
        for x in range(n):
            across, down = x / config.interpolation * omega, y / config.interpolation * omega
            rows.append([np.sin(across), np.cos(across), np.sin(down), np.cos(down)])
    return np.array(rows, np.float32).reshape(n * n, -1)
