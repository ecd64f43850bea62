"""DiT checkpoints as files: names and shapes of diffusers' layout written out, random numbers.

Shares nothing with the tables of `convert`. Needs no torch.
"""

import json
import re

import ml_dtypes

from convert.safetensors import write_sharded
from lowbit_jax.models.dit import DiTConfig
from tests.references.flux_files import random_tensors

# Small, every layer there more than once, no two sizes equal that could be mistaken. (At a width
# of 48, rows quantised some at a time have other last bits in their scales: XLA sums in another
# order. Widths of 64 to 4608 do not show it.)
TINY = DiTConfig(
    sample_size=8, patch_size=2, in_channels=3, hidden_size=80, depth=3, num_heads=2, num_classes=10
)


def diffusers_shapes(config):
    """Name -> shape of every tensor of a diffusers checkpoint."""
    h, p, c = config.hidden_size, config.patch_size, config.in_channels
    out = p * p * c * (2 if config.learn_sigma else 1)
    shapes = {"pos_embed.proj.weight": (h, c, p, p), "pos_embed.proj.bias": (h,)}
    linears = {"proj_out_1": (2 * h, h), "proj_out_2": (out, h)}
    for i in range(config.depth):
        b = f"transformer_blocks.{i}."
        shapes[f"{b}norm1.emb.class_embedder.embedding_table.weight"] = (config.num_classes + 1, h)
        linears |= {
            f"{b}norm1.emb.timestep_embedder.linear_1": (h, 256),
            f"{b}norm1.emb.timestep_embedder.linear_2": (h, h),
            f"{b}norm1.linear": (6 * h, h),
            f"{b}ff.net.0.proj": (4 * h, h),
            f"{b}ff.net.2": (h, 4 * h),
        }
        linears |= {f"{b}attn1.{name}": (h, h) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    for name, (n, k) in linears.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)
    return shapes


def diffusers_config(config):
    """The `config.json` diffusers writes."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-05,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
    }


def shared(tensors):
    """The same tensors with the embedders of every block equal to those of the first."""
    first = {name: re.sub(r"\.\d+\.norm1\.emb\.", ".0.norm1.emb.", name) for name in tensors}
    return {name: tensors[first[name]] for name in tensors}


def write_source(
    folder, config=TINY, *, max_shard_bytes=10**9, dtype=ml_dtypes.bfloat16, **changes
):
    """Write a random diffusers checkpoint and return its folder.

    `changes` replace tensors ({name: array}); None leaves one out.
    """
    tensors = shared(random_tensors(diffusers_shapes(config), dtype)) | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    write_sharded(folder, tensors, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(diffusers_config(config)))
    return folder
