"""STDiT checkpoints as Open-Sora 1.0 wrote them, to `lowbit_jax.models.stdit`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.table import Constant, Layout, Row
from lowbit_jax.models.patches import position_table
from lowbit_jax.models.stdit import STDiTConfig
from lowbit_jax.models.video import Size, frame_positions

PUBLISHED_HEADS = {1152: 16}
HINT = '"input_size": [frames, rows, columns]'


def row(target: str, *sources: str, **options: Any) -> Row:
    """A row of an Open-Sora table."""
    return Row(target=target, sources=sources, **options)


def _patch(config: Any) -> tuple[int, ...]:
    return (config.in_channels, *config.patch_size)


def _positions(config: STDiTConfig) -> Any:
    _, rows, columns = config.grid
    table = position_table((rows, columns), config.hidden_size, interpolation=config.space_scale)
    return table[None]


def _in_time(config: STDiTConfig) -> Any:
    return frame_positions(config.grid[0], config.hidden_size, config.time_scale)[None]


# what STDiT and STDiT3 have in common
OUTSIDE = (
    row("x_embedder/proj", "x_embedder.proj", kernel_tail=_patch),
    row("t_embedder/in_layer", "t_embedder.mlp.0"),
    row("t_embedder/out_layer", "t_embedder.mlp.2"),
    row("t_block", "t_block.1"),
    row("y_embedder/y_embedding", "y_embedder.y_embedding", vector=True),
    row("y_embedder/y_proj/fc1", "y_embedder.y_proj.fc1"),
    row("y_embedder/y_proj/fc2", "y_embedder.y_proj.fc2"),
    row("final_layer/scale_shift_table", "final_layer.scale_shift_table", vector=True),
    row("final_layer/linear", "final_layer.linear"),
)


def block(ours: str, theirs: str, *attentions: str) -> tuple[Row, ...]:
    """A block with these self-attentions."""
    linears = [f"{attention}/{part}" for attention in attentions for part in ("qkv", "proj")]
    linears += ["cross_attn/q_linear", "cross_attn/kv_linear", "cross_attn/proj"]
    linears += ["mlp/fc1", "mlp/fc2"]
    return (
        row(f"{ours}scale_shift_table", f"{theirs}scale_shift_table", vector=True),
        *(row(f"{ours}{name}", f"{theirs}{name.replace('/', '.')}") for name in linears),
    )


ORIGINAL = Layout(
    name="Open-Sora 1.0",
    marker="blocks.0.attn_temp.qkv.weight",
    stacks={"blocks": "depth"},
    rows=(*OUTSIDE, *block("blocks/{i}/", "blocks.{i}.", "attn", "attn_temp")),
    constants=(
        Constant(source="pos_embed", value=_positions),
        Constant(source="pos_embed_temporal", value=_in_time),
    ),
)

LAYOUTS = (ORIGINAL,)


def read_config(checkpoint: Checkpoint, layout: Layout) -> STDiTConfig:
    """The model's sizes, from the tensors' shapes and the position tables.

    The heads and the rows and columns of a size that is not square are in no tensor: heads are the
    published ones by the width, sizes square, unless a `config.json` says `num_heads` and
    `input_size`.

    Raises:
        CheckpointError: a tensor that sizes are read from is missing or of another kind.
    """
    return fields.read(checkpoint, "STDiT", lambda: _from_shapes(checkpoint))


def shared_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of the config that STDiT and STDiT3 have in common, but for the depth."""
    width, channels, *patch = fields.shape(checkpoint, "x_embedder.proj.weight", 5)
    tokens, caption_channels = fields.shape(checkpoint, "y_embedder.y_embedding")
    outputs, _ = fields.shape(checkpoint, "final_layer.linear.weight")
    return {
        "patch_size": tuple(patch),
        "in_channels": channels,
        "hidden_size": width,
        "num_heads": fields.heads(checkpoint.config, width, PUBLISHED_HEADS, "num_heads"),
        "caption_channels": caption_channels,
        "null_caption_length": tokens,
        "learn_sigma": fields.learns_sigma(channels, outputs // math.prod(patch)),
    }


def _from_shapes(checkpoint: Checkpoint) -> STDiTConfig:
    sizes = shared_sizes(checkpoint)
    width = sizes["hidden_size"]
    return STDiTConfig(
        input_size=_input_size(checkpoint, sizes["patch_size"]),
        space_scale=_scale(checkpoint, "pos_embed", width // 2),
        time_scale=_scale(checkpoint, "pos_embed_temporal", width),
        depth=fields.depth(checkpoint),
        **sizes,
    )


def _input_size(checkpoint: Checkpoint, patch: Size) -> Size:
    stated = (checkpoint.config or {}).get("input_size")
    if stated is None:
        side = fields.square(checkpoint, "pos_embed", f"; put {HINT} into a config.json beside it")
        frames = fields.shape(checkpoint, "pos_embed_temporal", 3)[1]
        return frames * patch[0], side * patch[1], side * patch[2]
    if not (isinstance(stated, list) and len(stated) == 3 and all(type(n) is int for n in stated)):
        raise ValueError(f"input_size is {stated}, not [frames, rows, columns]")
    return stated[0], stated[1], stated[2]


def _scale(checkpoint: Checkpoint, name: str, width: int) -> float:
    """What the positions of a table were divided by; 1 for a single position, which is 0.

    The second position is 1 / scale; sines of the lowest frequency, 10000^-(1 - 2 / width), are
    nearly the angle. Scales are ratios of small numbers, so that float16 tables tell them too.
    """
    table = checkpoint.read(name)
    if table.shape[1] < 2:
        return 1.0
    lowest = width // 2 - 1
    sine = float(np.float64(table[0, 1, lowest]))
    angle = math.asin(sine) if 0 < sine < 1 else math.inf
    scale = Fraction(10000.0 ** (-lowest / (width // 2)) / angle).limit_denominator(16)
    if not scale:
        raise ValueError(f"tensor '{name}' has {sine} where the sine of a position is expected")
    return float(scale)


def to_config(config: STDiTConfig) -> dict[str, Any]:
    """What no tensor tells: a `config.json` that `read_config` reads."""
    return {"input_size": list(config.input_size), "num_heads": config.num_heads}
