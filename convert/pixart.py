"""PixArt checkpoints, diffusers' layout and the original, to `lowbit_jax.models.pixart`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.table import Constant, Layout, Row
from lowbit_jax.models.patches import position_table
from lowbit_jax.models.pixart import PixArtConfig

# what this port computes, as diffusers' config says it; a config.json may leave each out
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
}
STACKS = {"blocks": "depth"}
# of the original layout
PUBLISHED_HEADS = {1152: 16}  # by width
POSITIONS = "pos_embed"
NULL_CAPTION = "y_embedder.y_embedding"
SAMPLER = "blocks.{i}.attn.sr.weight"  # there if and only if the layer is compressed
INTERPOLATIONS = (0.5, 1.0, 2.0, 4.0)  # of 256, 512, 1024 and 2048 pixels


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _thirds(config: PixArtConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _halves(config: PixArtConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 2


def _patch(config: PixArtConfig) -> tuple[int, ...]:
    return (config.in_channels, config.patch_size, config.patch_size)


def _position_table(config: PixArtConfig) -> Any:
    side = config.sample_size // config.patch_size
    return position_table(
        (side, side), config.hidden_size, base=side, interpolation=config.interpolation
    )[None]


def _embedders(*pairs: tuple[str, str], layers: tuple[str, str]) -> tuple[Row, ...]:
    """Rows of the MLPs that embed numbers; only the time's is in every model."""
    return tuple(
        _row(f"{ours}/{layer}", f"{theirs}{linear}", optional=ours != "t_embedder")
        for ours, theirs in pairs
        for layer, linear in zip(("in_layer", "out_layer"), layers, strict=True)
    )


_B, _O, _P = "blocks/{i}/", "blocks.{i}.", "transformer_blocks.{i}."
_E = "adaln_single.emb."
_SELF, _CROSS = f"{_P}attn1.", f"{_P}attn2."
MICRO = f"{_E}resolution_embedder.linear_1.weight"  # there if and only if micro-conditions are

DIFFUSERS = Layout(
    name="diffusers",
    marker="adaln_single.linear.weight",
    without="temporal_transformer_blocks.0.scale_shift_table",  # Latte-1
    stacks=STACKS,
    rows=(
        _row("x_embedder/proj", "pos_embed.proj", kernel_tail=_patch),
        *_embedders(
            ("t_embedder", f"{_E}timestep_embedder."),
            ("csize_embedder", f"{_E}resolution_embedder."),
            ("ar_embedder", f"{_E}aspect_ratio_embedder."),
            layers=("linear_1", "linear_2"),
        ),
        _row("t_block", "adaln_single.linear"),
        _row("y_embedder/y_proj/fc1", "caption_projection.linear_1"),
        _row("y_embedder/y_proj/fc2", "caption_projection.linear_2"),
        _row(f"{_B}scale_shift_table", f"{_P}scale_shift_table", vector=True),
        _row(f"{_B}attn/qkv", *(f"{_SELF}to_{x}" for x in "qkv"), sizes=_thirds),
        _row(f"{_B}attn/proj", f"{_SELF}to_out.0"),
        _row(f"{_B}cross_attn/q_linear", f"{_CROSS}to_q"),
        _row(f"{_B}cross_attn/kv_linear", *(f"{_CROSS}to_{x}" for x in "kv"), sizes=_halves),
        _row(f"{_B}cross_attn/proj", f"{_CROSS}to_out.0"),
        _row(f"{_B}mlp/fc1", f"{_P}ff.net.0.proj"),
        _row(f"{_B}mlp/fc2", f"{_P}ff.net.2"),
        _row("final_layer/scale_shift_table", "scale_shift_table", vector=True),
        _row("final_layer/linear", "proj_out"),
    ),
)

ORIGINAL = Layout(
    name="original",
    marker="blocks.0.cross_attn.q_linear.weight",
    without="blocks.0.attn_temp.qkv.weight",  # STDiT
    stacks=STACKS,
    rows=(
        _row("x_embedder/proj", "x_embedder.proj", kernel_tail=_patch),
        *_embedders(
            *((name, f"{name}.mlp.") for name in ("t_embedder", "csize_embedder", "ar_embedder")),
            layers=("0", "2"),
        ),
        _row("t_block", "t_block.1"),
        _row("y_embedder/y_embedding", NULL_CAPTION, vector=True, optional=True),
        _row("y_embedder/y_proj/fc1", "y_embedder.y_proj.fc1"),
        _row("y_embedder/y_proj/fc2", "y_embedder.y_proj.fc2"),
        _row(f"{_B}scale_shift_table", f"{_O}scale_shift_table", vector=True),
        _row(f"{_B}attn/qkv", f"{_O}attn.qkv"),
        _row(f"{_B}attn/sr/weight", f"{_O}attn.sr.weight", vector=True, optional=True),
        _row(f"{_B}attn/sr/bias", f"{_O}attn.sr.bias", vector=True, optional=True),
        _row(f"{_B}attn/norm/scale", f"{_O}attn.norm.weight", vector=True, optional=True),
        _row(f"{_B}attn/norm/bias", f"{_O}attn.norm.bias", vector=True, optional=True),
        *(
            _row(f"{_B}{layer}", f"{_O}{layer.replace('/', '.')}")
            for layer in (
                "attn/proj",
                "cross_attn/q_linear",
                "cross_attn/kv_linear",
                "cross_attn/proj",
                "mlp/fc1",
                "mlp/fc2",
            )
        ),
        _row("final_layer/scale_shift_table", "final_layer.scale_shift_table", vector=True),
        _row("final_layer/linear", "final_layer.linear"),
    ),
    # of the trained size; the published samplers drop it and compute one for the picture's
    constants=(Constant(source=POSITIONS, value=_position_table, optional=True),),
)

LAYOUTS = (DIFFUSERS, ORIGINAL)


def read_config(checkpoint: Checkpoint, layout: Layout) -> PixArtConfig:
    """The model's sizes: from diffusers' `config.json`, or from the original's shapes.

    Of the original, no tensor tells the number of heads; they are the published ones by the width.
    A `config.json` beside the file may say `num_attention_heads`, and `sample_size` and
    `interpolation_scale` of a file without its position table.

    Raises:
        CheckpointError: no config.json beside diffusers' layout, one this port cannot follow, or
            sizes that neither it nor the tensors tell.
    """
    if layout.name == ORIGINAL.name:
        return fields.read(checkpoint, "PixArt", lambda: _from_original(checkpoint))
    config = checkpoint.config
    if config is None:
        raise CheckpointError(
            checkpoint.source,
            "the sample size and the heads of a PixArt are in no tensor; add diffusers' "
            "config.json",
        )
    micro = MICRO in checkpoint.names
    return fields.read(
        checkpoint, "PixArt", lambda: from_diffusers_config(config, micro_conditions=micro)
    )


def from_diffusers_config(config: dict[str, Any], *, micro_conditions: bool) -> PixArtConfig:
    """`PixArtConfig` of diffusers' config; KeyError names a missing field.

    Args:
        config: of a `PixArtTransformer2DModel`, or of the `Transformer2DModel` it once was.
        micro_conditions: whether the tensors have them, which decides where the config does not
            say. (diffusers goes by the sample size there, which is wrong for PixArt-Sigma.)

    Raises:
        ValueError: a setting this port does not have.
    """
    fields.check_fixed(config, FIXED, "PixArt")
    heads, sample_size, channels = (
        fields.integer(config, name)
        for name in ("num_attention_heads", "sample_size", "in_channels")
    )
    width = heads * fields.integer(config, "attention_head_dim")
    fields.check_fixed(config, {"cross_attention_dim": width}, "PixArt of this width")
    stated = config.get("use_additional_conditions")
    if stated not in (None, True, False):
        raise ValueError(f"use_additional_conditions is {quote(stated)}, not true or false")
    return PixArtConfig(
        sample_size=sample_size,
        interpolation=_interpolation(config, default=max(sample_size // 64, 1)),  # as diffusers
        patch_size=fields.integer(config, "patch_size"),
        in_channels=channels,
        hidden_size=width,
        depth=fields.integer(config, "num_layers"),
        num_heads=heads,
        caption_channels=fields.integer(config, "caption_channels"),
        learn_sigma=fields.learns_sigma(channels, config.get("out_channels")),
        micro_conditions=micro_conditions if stated is None else stated,
    )


def _interpolation(config: dict[str, Any], default: float) -> float:
    value = config.get("interpolation_scale")
    if value is None:
        return float(default)
    if type(value) not in (int, float) or not 0 < value < 100:
        raise ValueError(f"interpolation_scale is {quote(value)}, not a number from 0 to 100")
    return float(value)


def to_diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported model.

    Raises:
        ValueError: parts that diffusers has no place for.
    """
    if config.compressed_layers or config.null_caption_length:
        raise ValueError(
            f"diffusers has no place for a null caption ({config.null_caption_length} tokens) and "
            f"for compressed layers ({len(config.compressed_layers)}): choose layout 'original'"
        )
    return {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": "0.32.0",
        **FIXED,
        **to_original_config(config),
        "attention_head_dim": config.hidden_size // config.num_heads,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "in_channels": config.in_channels,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "use_additional_conditions": config.micro_conditions,
    }


def to_original_config(config: PixArtConfig) -> dict[str, Any]:
    """What no tensor of the original layout tells: a `config.json` that `read_config` reads."""
    return {
        "interpolation_scale": config.interpolation,
        "num_attention_heads": config.num_heads,
        "sample_size": config.sample_size,
    }


def _from_original(checkpoint: Checkpoint) -> PixArtConfig:
    """Sizes from shapes; `check` compares every shape with them afterwards."""
    stated = checkpoint.config or {}
    names = set(checkpoint.names)
    shape = partial(fields.shape, checkpoint)
    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    depth = fields.depth(checkpoint)
    compressed = [i for i in range(depth) if SAMPLER.format(i=i) in names]
    side, interpolation = _positions(checkpoint, stated, patch)
    outputs = shape("final_layer.linear.weight")[0]
    return PixArtConfig(
        sample_size=side,
        interpolation=interpolation,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=fields.heads(stated, width, PUBLISHED_HEADS),
        caption_channels=shape("y_embedder.y_proj.fc1.weight")[1],
        learn_sigma=fields.learns_sigma(channels, outputs // patch**2),
        micro_conditions="csize_embedder.mlp.0.weight" in names,
        null_caption_length=shape(NULL_CAPTION)[0] if NULL_CAPTION in names else 0,
        compressed_layers=tuple(compressed),
        compression=shape(SAMPLER.format(i=compressed[0]), 4)[-1] if compressed else 2,
    )


def _positions(checkpoint: Checkpoint, stated: dict[str, Any], patch: int) -> tuple[int, float]:
    """Sample size and interpolation: of the table `pos_embed`, or as the config.json says."""
    if POSITIONS not in checkpoint.names:
        missing = [name for name in ("sample_size", "interpolation_scale") if name not in stated]
        if missing:
            raise ValueError(
                f"without '{POSITIONS}' no tensor tells the size that positions are scaled to; add "
                f"a config.json with {' and '.join(missing)}"
            )
        return fields.integer(stated, "sample_size"), _interpolation(stated, default=1)
    table = checkpoint.read(POSITIONS)
    grid = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if grid < 2 or table.shape != (1, grid * grid, *table.shape[2:]):
        raise ValueError(f"tensor '{POSITIONS}' has shape {table.shape}, not (1, a square, width)")
    first = float(table[0, 1, 0])  # of column 1: sin(1 / interpolation)
    for scale in INTERPOLATIONS:
        if abs(first - math.sin(1 / scale)) < 1e-2:
            return grid * patch, scale
    raise ValueError(
        f"'{POSITIONS}' begins with {first} in column 1, which is no position divided by "
        f"{', '.join(map(str, INTERPOLATIONS))}"
    )
