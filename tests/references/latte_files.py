"""Latte checkpoints as files: names and shapes of the original layout written out.

Shares nothing with the tables of `convert`. Needs no torch.
"""

from lowbit_jax.models.latte import LatteConfig

# Small, every layer there more than once, no two sizes equal that could be mistaken.
TINY = LatteConfig(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    hidden_size=80,
    depth=4,
    num_heads=2,
    num_classes=10,
    num_frames=5,
)


def original_shapes(config):
    """Name -> shape of every tensor of a checkpoint of the original code."""
    h, p, c = config.hidden_size, config.patch_size, config.in_channels
    shapes = {
        "x_embedder.proj.weight": (h, c, p, p),
        "x_embedder.proj.bias": (h,),
        "pos_embed": (1, (config.sample_size // p) ** 2, h),
        "temp_embed": (1, config.num_frames, h),
    }
    if config.num_classes:
        shapes["y_embedder.embedding_table.weight"] = (config.num_classes + 1, h)
    linears = {
        "t_embedder.mlp.0": (h, 256),
        "t_embedder.mlp.2": (h, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
        "final_layer.linear": (p * p * c * (2 if config.learn_sigma else 1), h),
    }
    for i in range(config.depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * h, h),
            f"blocks.{i}.attn.proj": (h, h),
            f"blocks.{i}.mlp.fc1": (4 * h, h),
            f"blocks.{i}.mlp.fc2": (h, 4 * h),
            f"blocks.{i}.adaLN_modulation.1": (6 * h, h),
        }
    for name, (n, k) in linears.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)
    return shapes
