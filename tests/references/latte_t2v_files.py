"""Latte-1 checkpoints as files: names and shapes of diffusers' layout written out.

Shares nothing with the tables of `convert`. Needs no torch.
"""

from lowbit_jax.models.latte_t2v import LatteT2VConfig

# Small, every layer there more than once, no two sizes equal that could be mistaken.
TINY = LatteT2VConfig(
    sample_size=8,
    num_frames=5,
    patch_size=2,
    in_channels=3,
    hidden_size=80,
    pairs=3,
    num_heads=2,
    caption_channels=24,
)


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
        "proj_out": (p * p * c * (2 if config.learn_sigma else 1), h),
    }
    blocks = {"transformer_blocks": ("attn1", "attn2"), "temporal_transformer_blocks": ("attn1",)}
    for stack, attentions in blocks.items():
        for i in range(config.pairs):
            b = f"{stack}.{i}."
            shapes[f"{b}scale_shift_table"] = (6, h)
            linears |= {f"{b}ff.net.0.proj": (4 * h, h), f"{b}ff.net.2": (h, 4 * h)}
            linears |= {
                f"{b}{attention}.{name}": (h, h)
                for attention in attentions
                for name in ("to_q", "to_k", "to_v", "to_out.0")
            }
    for name, (n, k) in linears.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)
    return shapes


def diffusers_config(config):
    """The `config.json` of the published checkpoint, for another size."""
    return {
        "_class_name": "LatteTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.pairs,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "video_length": config.num_frames,
    }
