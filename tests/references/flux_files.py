"""FLUX checkpoints as files: names and shapes written out from the published ones, random numbers.

Shares nothing with the tables of `convert`. Needs no torch.
"""

import dataclasses
import json

import ml_dtypes
import numpy as np

from convert.safetensors import write_sharded
from lowbit_jax.models.flux import FluxConfig

# Small, but every layer and every matrix is there more than once, and no two sizes are equal.
TINY = FluxConfig(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
)
# Heads of 128 as published, so that files without a config.json say all there is to know.
PUBLISHED_HEADS = dataclasses.replace(
    TINY, hidden_size=256, num_heads=2, depth_single_blocks=2, axes_dim=(16, 56, 56)
)


def _linears(shapes, **sizes):
    for name, (n, k) in sizes.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)


def bfl_shapes(config):
    """Name -> shape of every tensor of a checkpoint of Black Forest Labs."""
    h, d, m = config.hidden_size, config.head_dim, 4 * config.hidden_size
    shapes = {}
    linears = {
        "img_in": (h, config.in_channels),
        "txt_in": (h, config.context_in_dim),
        "time_in.in_layer": (h, 256),
        "time_in.out_layer": (h, h),
        "vector_in.in_layer": (h, config.vec_in_dim),
        "vector_in.out_layer": (h, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
        "final_layer.linear": (config.in_channels, h),
    }
    if config.guidance_embed:
        linears |= {"guidance_in.in_layer": (h, 256), "guidance_in.out_layer": (h, h)}
    for i in range(config.depth):
        for stream in ("img", "txt"):
            p = f"double_blocks.{i}.{stream}"
            linears |= {
                f"{p}_mod.lin": (6 * h, h),
                f"{p}_attn.qkv": (3 * h, h),
                f"{p}_attn.proj": (h, h),
                f"{p}_mlp.0": (m, h),
                f"{p}_mlp.2": (h, m),
            }
            shapes[f"{p}_attn.norm.query_norm.scale"] = (d,)
            shapes[f"{p}_attn.norm.key_norm.scale"] = (d,)
    for j in range(config.depth_single_blocks):
        p = f"single_blocks.{j}"
        linears |= {
            f"{p}.modulation.lin": (3 * h, h),
            f"{p}.linear1": (3 * h + m, h),
            f"{p}.linear2": (h, h + m),
        }
        shapes[f"{p}.norm.query_norm.scale"] = (d,)
        shapes[f"{p}.norm.key_norm.scale"] = (d,)
    _linears(shapes, **linears)
    return shapes


def diffusers_shapes(config):
    """Name -> shape of every tensor of a diffusers checkpoint."""
    h, d, m = config.hidden_size, config.head_dim, 4 * config.hidden_size
    shapes = {}
    t = "time_text_embed."
    linears = {
        "x_embedder": (h, config.in_channels),
        "context_embedder": (h, config.context_in_dim),
        f"{t}timestep_embedder.linear_1": (h, 256),
        f"{t}timestep_embedder.linear_2": (h, h),
        f"{t}text_embedder.linear_1": (h, config.vec_in_dim),
        f"{t}text_embedder.linear_2": (h, h),
        "norm_out.linear": (2 * h, h),
        "proj_out": (config.in_channels, h),
    }
    if config.guidance_embed:
        linears[f"{t}guidance_embedder.linear_1"] = (h, 256)
        linears[f"{t}guidance_embedder.linear_2"] = (h, h)
    for i in range(config.depth):
        p = f"transformer_blocks.{i}."
        linears |= {f"{p}norm1.linear": (6 * h, h), f"{p}norm1_context.linear": (6 * h, h)}
        attention = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
        linears |= {f"{p}attn.{name}": (h, h) for name in attention.split()}
        for mlp in ("ff", "ff_context"):
            linears |= {f"{p}{mlp}.net.0.proj": (m, h), f"{p}{mlp}.net.2": (h, m)}
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{p}attn.{norm}.weight"] = (d,)
    for j in range(config.depth_single_blocks):
        p = f"single_transformer_blocks.{j}."
        linears |= {f"{p}norm.linear": (3 * h, h), f"{p}proj_mlp": (m, h)}
        linears |= {f"{p}attn.{name}": (h, h) for name in ("to_q", "to_k", "to_v")}
        linears[f"{p}proj_out"] = (h, h + m)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{p}attn.{norm}.weight"] = (d,)
    _linears(shapes, **linears)
    return shapes


def diffusers_config(config):
    """The `config.json` diffusers writes."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def to_bfl(state):
    """A diffusers state dict, of arrays or CPU tensors, in Black Forest Labs' layout."""
    out = {}

    def move(new, *old, swap=False):
        for kind in ("weight", "bias"):
            array = np.concatenate([state[f"{name}.{kind}"] for name in old])
            if swap:  # (scale, shift) to (shift, scale)
                array = np.concatenate(np.split(array, 2)[::-1])
            out[f"{new}.{kind}"] = array

    def scale(new, old):
        out[f"{new}.scale"] = np.asarray(state[f"{old}.weight"])

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


def random_tensors(shapes, dtype=np.float32, seed=0):
    """Numbers of the size of weights; none of them zero."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.1 * rng.standard_normal(shape, np.float32)).astype(dtype)
        for name, shape in shapes.items()
    }


def write_source(
    folder, config=TINY, *, max_shard_bytes=10**9, dtype=ml_dtypes.bfloat16, **changes
):
    """Write a random diffusers checkpoint and return its folder.

    `changes` replace tensors ({name: array}); None leaves one out.
    """
    tensors = random_tensors(diffusers_shapes(config), dtype) | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    write_sharded(folder, tensors, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(diffusers_config(config)))
    return folder
