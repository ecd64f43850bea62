"""STDiT3 checkpoints as files: names and shapes of Open-Sora 1.2 written out.

Shares nothing with the tables of `convert`. Needs no torch.
"""

from lowbit_jax.models.stdit3 import STDiT3Config
from tests.references.stdit_files import block_linears, shared_shapes

# Small, every layer there more than once, no two sizes equal that could be mistaken.
TINY = STDiT3Config(
    in_channels=3,
    hidden_size=144,
    pairs=2,
    num_heads=2,
    caption_channels=24,
    null_caption_length=7,
)


def original_shapes(config):
    """Name -> shape of every tensor of a checkpoint."""
    h, d = config.hidden_size, config.hidden_size // config.num_heads
    shapes, linears = shared_shapes(config)
    linears |= {"fps_embedder.mlp.0": (h, 256), "fps_embedder.mlp.2": (h, h)}
    shapes["rope.freqs"] = (d // 2,)
    for stack in ("spatial_blocks", "temporal_blocks"):
        for i in range(config.pairs):
            b = f"{stack}.{i}"
            shapes[f"{b}.scale_shift_table"] = (6, h)
            if config.qk_norm:
                shapes |= {f"{b}.attn.q_norm.weight": (d,), f"{b}.attn.k_norm.weight": (d,)}
            linears |= {f"{b}.{name}": shape for name, shape in block_linears(h, "attn").items()}
    for name, (n, k) in linears.items():
        shapes[f"{name}.weight"] = (n, k)
        shapes[f"{name}.bias"] = (n,)
    return shapes


def published_config(config):
    """The `config.json` of the published checkpoint, for another size."""
    return {
        "architectures": ["STDiT3"],
        "caption_channels": config.caption_channels,
        "class_dropout_prob": 0.1,
        "depth": config.pairs,
        "drop_path": 0.0,
        "enable_flash_attn": True,
        "enable_layernorm_kernel": True,
        "enable_sequence_parallelism": False,
        "freeze_y_embedder": True,
        "hidden_size": config.hidden_size,
        "in_channels": config.in_channels,
        "input_size": [None, None, None],
        "input_sq_size": config.base_resolution,
        "mlp_ratio": 4.0,
        "model_max_length": config.null_caption_length,
        "model_type": "STDiT3",
        "num_heads": config.num_heads,
        "only_train_temporal": False,
        "patch_size": list(config.patch_size),
        "pred_sigma": config.learn_sigma,
        "qk_norm": config.qk_norm,
        "skip_y_embedder": False,
    }
