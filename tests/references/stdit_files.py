"""STDiT checkpoints as files: names and shapes of Open-Sora 1.0 written out.

Shares nothing with the tables of `convert`. Needs no torch.
"""

from lowbit_jax.models.stdit import STDiTConfig

# Small, every layer there more than once, no two sizes equal that could be mistaken.
TINY = STDiTConfig(
    input_size=(5, 8, 8),
    space_scale=0.5,
    time_scale=2 / 3,
    in_channels=3,
    hidden_size=144,
    depth=3,
    num_heads=2,
    caption_channels=24,
    null_caption_length=7,
)


def shared_shapes(config):
    """(vectors, linears) outside the blocks that STDiT and STDiT3 have in common."""
    h, p, c = config.hidden_size, config.patch_size, config.in_channels
    vectors = {
        "x_embedder.proj.weight": (h, c, *p),
        "x_embedder.proj.bias": (h,),
        "y_embedder.y_embedding": (config.null_caption_length, config.caption_channels),
        "final_layer.scale_shift_table": (2, h),
    }
    linears = {
        "t_embedder.mlp.0": (h, 256),
        "t_embedder.mlp.2": (h, h),
        "t_block.1": (6 * h, h),
        "y_embedder.y_proj.fc1": (h, config.caption_channels),
        "y_embedder.y_proj.fc2": (h, h),
        "final_layer.linear": (p[0] * p[1] * p[2] * c * (2 if config.learn_sigma else 1), h),
    }
    return vectors, linears


def block_linears(h, *attentions):
    """Linears of a block with these self-attentions."""
    linears = {
        "cross_attn.q_linear": (h, h),
        "cross_attn.kv_linear": (2 * h, h),
        "cross_attn.proj": (h, h),
        "mlp.fc1": (4 * h, h),
        "mlp.fc2": (h, 4 * h),
    }
    for name in attentions:
        linears |= {f"{name}.qkv": (3 * h, h), f"{name}.proj": (h, h)}
    return linears


def original_shapes(config):
    """Name -> shape of every tensor of a checkpoint."""
    h = config.hidden_size
    frames, rows, columns = (
        n // p for n, p in zip(config.input_size, config.patch_size, strict=True)
    )
    shapes, linears = shared_shapes(config)
    shapes |= {"pos_embed": (1, rows * columns, h), "pos_embed_temporal": (1, frames, h)}
    for i in range(config.depth):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, h)
        block = block_linears(h, "attn", "attn_temp")
        linears |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    for name, (n, k) in linears.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)
    return shapes
