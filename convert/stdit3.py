"""STDiT3 checkpoints as Open-Sora 1.2 published them, to `lowbit_jax.models.stdit3`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.stdit import OUTSIDE, block, row, shared_sizes
from convert.table import Constant, Layout, Row
from lowbit_jax.models.attention import rotary_angles
from lowbit_jax.models.stdit3 import STDiT3Config

# what this port computes, as the published config says it; a config.json may leave each out
FIXED = {"mlp_ratio": 4.0, "skip_y_embedder": False}


def _frequencies(config: STDiT3Config) -> Any:
    return rotary_angles(jnp.ones((1, 1)), (config.head_dim,))[0]  # those of position 1


def _block(ours: str, theirs: str) -> tuple[Row, ...]:
    norms = (
        row(
            f"{ours}attn/{x}_norm/scale",
            f"{theirs}attn.{x}_norm.weight",
            vector=True,
            optional=True,
        )
        for x in "qk"
    )
    return (*block(ours, theirs, "attn"), *norms)


ORIGINAL = Layout(
    name="Open-Sora 1.2",
    marker="fps_embedder.mlp.0.weight",
    stacks={"blocks": "pairs"},
    rows=(
        *OUTSIDE,
        row("fps_embedder/in_layer", "fps_embedder.mlp.0"),
        row("fps_embedder/out_layer", "fps_embedder.mlp.2"),
        *_block("blocks/{i}/spatial/", "spatial_blocks.{i}."),
        *_block("blocks/{i}/temporal/", "temporal_blocks.{i}."),
    ),
    # a parameter that rotary-embedding-torch does not train
    constants=(Constant(source="rope.freqs", value=_frequencies, optional=True),),
)

LAYOUTS = (ORIGINAL,)


def read_config(checkpoint: Checkpoint, layout: Layout) -> STDiT3Config:
    """The model's sizes, from the tensors' shapes.

    Heads and base resolution are in no tensor: heads are the published ones by the width, the
    resolution 512, unless a `config.json` says `num_heads` and `input_sq_size`, as the published
    one does.

    Raises:
        CheckpointError: a tensor that sizes are read from is missing or of another kind, or a
            config.json this port cannot follow.
    """
    return fields.read(checkpoint, "STDiT3", lambda: _from_shapes(checkpoint))


def _from_shapes(checkpoint: Checkpoint) -> STDiT3Config:
    stated = checkpoint.config or {}
    fields.check_fixed(stated, FIXED, "STDiT3")
    return STDiT3Config(
        base_resolution=fields.integer({"input_sq_size": 512} | stated, "input_sq_size"),
        pairs=fields.depth(checkpoint, "spatial_blocks"),
        qk_norm="spatial_blocks.0.attn.q_norm.weight" in checkpoint.names,
        **shared_sizes(checkpoint),
    )


def to_config(config: STDiT3Config) -> dict[str, Any]:
    """The `config.json` with which Open-Sora loads an exported model."""
    return {
        "architectures": ["STDiT3"],
        "model_type": "STDiT3",
        **FIXED,
        "caption_channels": config.caption_channels,
        "depth": config.pairs,
        "hidden_size": config.hidden_size,
        "in_channels": config.in_channels,
        "input_size": [None, None, None],
        "input_sq_size": config.base_resolution,
        "model_max_length": config.null_caption_length,
        "num_heads": config.num_heads,
        "patch_size": list(config.patch_size),
        "pred_sigma": config.learn_sigma,
        "qk_norm": config.qk_norm,
    }
