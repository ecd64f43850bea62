"""Class-conditional Latte checkpoints in the original layout, to `lowbit_jax.models.latte`."""

from __future__ import annotations

from typing import Any

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.table import Constant, Layout, Row
from lowbit_jax.models.dit import SIZES
from lowbit_jax.models.latte import LatteConfig
from lowbit_jax.models.patches import position_table
from lowbit_jax.models.video import frame_positions

PUBLISHED_HEADS = {width: heads for width, _, heads in SIZES.values()}
LABELS = "y_embedder.embedding_table.weight"  # there if and only if the model has classes


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _patch(config: LatteConfig) -> tuple[int, ...]:
    return (config.in_channels, config.patch_size, config.patch_size)


def _positions(config: LatteConfig) -> Any:
    return position_table((config.grid, config.grid), config.hidden_size)[None]


def _in_time(config: LatteConfig) -> Any:
    return frame_positions(config.num_frames, config.hidden_size)[None]


def _block(ours: str, theirs: str) -> tuple[Row, ...]:
    """A DiT block."""
    linears = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    return (
        _row(f"{ours}adaLN_modulation", f"{theirs}adaLN_modulation.1"),
        *(_row(f"{ours}{name}", f"{theirs}{name.replace('/', '.')}") for name in linears),
    )


ORIGINAL = Layout(
    name="original",
    marker="temp_embed",
    stacks={"blocks": "pairs"},
    rows=(
        _row("x_embedder/proj", "x_embedder.proj", kernel_tail=_patch),
        _row("t_embedder/in_layer", "t_embedder.mlp.0"),
        _row("t_embedder/out_layer", "t_embedder.mlp.2"),
        _row("y_embedder/embedding_table", LABELS, vector=True, optional=True),
        *_block("blocks/{i}/spatial/", "blocks.{even}."),
        *_block("blocks/{i}/temporal/", "blocks.{odd}."),
        _row("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1"),
        _row("final_layer/linear", "final_layer.linear"),
    ),
    constants=(
        Constant(source="pos_embed", value=_positions),
        Constant(source="temp_embed", value=_in_time),
    ),
)

LAYOUTS = (ORIGINAL,)


def read_config(checkpoint: Checkpoint, layout: Layout) -> LatteConfig:
    """The model's sizes, from the tensors' shapes.

    The heads are in no tensor: they are the published ones by the width, or `num_attention_heads`
    of a `config.json`.

    Raises:
        CheckpointError: a tensor that sizes are read from is missing or of another kind.
    """
    return fields.read(checkpoint, "Latte", lambda: _from_shapes(checkpoint))


def _from_shapes(checkpoint: Checkpoint) -> LatteConfig:
    width, channels, patch, _ = fields.shape(checkpoint, "x_embedder.proj.weight", 4)
    _, frames, _ = fields.shape(checkpoint, "temp_embed", 3)
    outputs, _ = fields.shape(checkpoint, "final_layer.linear.weight")
    known = LABELS in checkpoint.names
    return LatteConfig(
        sample_size=fields.square(checkpoint, "pos_embed") * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=fields.depth(checkpoint),
        num_heads=fields.heads(checkpoint.config, width, PUBLISHED_HEADS),
        num_classes=fields.shape(checkpoint, LABELS)[0] - 1 if known else 0,
        learn_sigma=fields.learns_sigma(channels, outputs // patch**2),
        num_frames=frames,
    )


def to_config(config: LatteConfig) -> dict[str, Any]:
    """What no tensor tells: a `config.json` that `read_config` reads."""
    return {"num_attention_heads": config.num_heads}
