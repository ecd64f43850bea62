"""Latte-1 checkpoints in diffusers' layout, to `lowbit_jax.models.latte_t2v`."""

from __future__ import annotations

from typing import Any

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.table import Layout, Row
from lowbit_jax.models.latte_t2v import LatteT2VConfig

# what this port computes, as diffusers' config says it; a config.json may leave each out
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
}


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _thirds(config: LatteT2VConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _halves(config: LatteT2VConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 2


def _patch(config: LatteT2VConfig) -> tuple[int, ...]:
    return (config.in_channels, config.patch_size, config.patch_size)


def _block(ours: str, theirs: str) -> tuple[Row, ...]:
    """Self-attention and MLP of a spatial or temporal block."""
    return (
        _row(f"{ours}scale_shift_table", f"{theirs}scale_shift_table", vector=True),
        _row(f"{ours}attn/qkv", *(f"{theirs}attn1.to_{x}" for x in "qkv"), sizes=_thirds),
        _row(f"{ours}attn/proj", f"{theirs}attn1.to_out.0"),
        _row(f"{ours}mlp/fc1", f"{theirs}ff.net.0.proj"),
        _row(f"{ours}mlp/fc2", f"{theirs}ff.net.2"),
    )


_E = "adaln_single.emb.timestep_embedder."
_SPATIAL, _TEMPORAL = "blocks/{i}/spatial/", "blocks/{i}/temporal/"
_P = "transformer_blocks.{i}."

DIFFUSERS = Layout(
    name="diffusers",
    marker="temporal_transformer_blocks.0.scale_shift_table",
    stacks={"blocks": "pairs"},
    rows=(
        _row("x_embedder/proj", "pos_embed.proj", kernel_tail=_patch),
        _row("t_embedder/in_layer", f"{_E}linear_1"),
        _row("t_embedder/out_layer", f"{_E}linear_2"),
        _row("t_block", "adaln_single.linear"),
        _row("y_embedder/y_proj/fc1", "caption_projection.linear_1"),
        _row("y_embedder/y_proj/fc2", "caption_projection.linear_2"),
        *_block(_SPATIAL, _P),
        _row(f"{_SPATIAL}cross_attn/q_linear", f"{_P}attn2.to_q"),
        _row(
            f"{_SPATIAL}cross_attn/kv_linear", f"{_P}attn2.to_k", f"{_P}attn2.to_v", sizes=_halves
        ),
        _row(f"{_SPATIAL}cross_attn/proj", f"{_P}attn2.to_out.0"),
        *_block(_TEMPORAL, f"temporal_{_P}"),
        _row("final_layer/scale_shift_table", "scale_shift_table", vector=True),
        _row("final_layer/linear", "proj_out"),
    ),
)

LAYOUTS = (DIFFUSERS,)


def read_config(checkpoint: Checkpoint, layout: Layout) -> LatteT2VConfig:
    """The model's sizes, from `config.json`: sample size and heads are in no tensor.

    Raises:
        CheckpointError: no config.json, or one this port cannot follow.
    """
    config = checkpoint.config
    if config is None:
        raise CheckpointError(
            checkpoint.source,
            "the sample size and the heads of Latte-1 are in no tensor; add diffusers' config.json",
        )
    return fields.read(checkpoint, "Latte-1", lambda: from_diffusers_config(config))


def from_diffusers_config(config: dict[str, Any]) -> LatteT2VConfig:
    """`LatteT2VConfig` of a `LatteTransformer3DModel` config; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """
    fields.check_fixed(config, FIXED, "Latte-1")
    heads, channels = (
        fields.integer(config, name) for name in ("num_attention_heads", "in_channels")
    )
    width = heads * fields.integer(config, "attention_head_dim")
    fields.check_fixed(config, {"cross_attention_dim": width}, "Latte-1 of this width")
    return LatteT2VConfig(
        sample_size=fields.integer(config, "sample_size"),
        num_frames=fields.integer(config, "video_length"),
        patch_size=fields.integer(config, "patch_size"),
        in_channels=channels,
        hidden_size=width,
        pairs=fields.integer(config, "num_layers"),
        num_heads=heads,
        caption_channels=fields.integer(config, "caption_channels"),
        learn_sigma=fields.learns_sigma(channels, config.get("out_channels")),
    )


def to_diffusers_config(config: LatteT2VConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported model."""
    return {
        "_class_name": "LatteTransformer3DModel",
        "_diffusers_version": "0.32.0",
        **FIXED,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.pairs,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "video_length": config.num_frames,
    }
