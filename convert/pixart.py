"""PixArt checkpoints, diffusers' layout and the original, to `lowbit_jax.models.pixart`."""

from __future__ import annotations

from typing import Any

from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.table import Layout, Row
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


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _thirds(config: PixArtConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _halves(config: PixArtConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 2


def _patch(config: PixArtConfig) -> tuple[int, ...]:
    return (config.in_channels, config.patch_size, config.patch_size)


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
    stacks=STACKS,
    rows=(
        _row("x_embedder/proj", "x_embedder.proj", kernel_tail=_patch),
        *_embedders(
            *((name, f"{name}.mlp.") for name in ("t_embedder", "csize_embedder", "ar_embedder")),
            layers=("0", "2"),
        ),
        _row("t_block", "t_block.1"),
        _row("y_embedder/y_embedding", "y_embedder.y_embedding", vector=True, optional=True),
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
)

LAYOUTS = (DIFFUSERS, ORIGINAL)


def read_config(checkpoint: Checkpoint, layout: Layout) -> PixArtConfig:
    """The model's sizes: from diffusers' `config.json`, or from the original's shapes.

    Raises:
        CheckpointError: no config.json beside diffusers' layout, or one this port cannot follow.
    """
    config = checkpoint.config
    if config is None:
        raise CheckpointError(
            checkpoint.source,
            "the sample size and the heads of a PixArt are in no tensor; add diffusers' "
            "config.json",
        )
    try:
        return from_diffusers_config(config, micro_conditions=MICRO in checkpoint.names)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(checkpoint.source, f"not a PixArt config: {reason}") from error


def from_diffusers_config(config: dict[str, Any], *, micro_conditions: bool) -> PixArtConfig:
    """`PixArtConfig` of diffusers' config; KeyError names a missing field.

    Args:
        config: of a `PixArtTransformer2DModel`, or of the `Transformer2DModel` it once was.
        micro_conditions: whether the tensors have them, which decides where the config does not
            say. (diffusers goes by the sample size there, which is wrong for PixArt-Sigma.)

    Raises:
        ValueError: a setting this port does not have.
    """
    for field, value in FIXED.items():
        if config.get(field, value) != value:
            raise ValueError(f"{field} is {quote(config[field])}; PixArt has {quote(value)}")
    channels, out = _size(config, "in_channels"), config.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise ValueError(
            f"out_channels is {quote(out)}; PixArt predicts noise ({channels}) "
            f"or noise and variance ({2 * channels})"
        )
    heads, sample_size = _size(config, "num_attention_heads"), _size(config, "sample_size")
    width = heads * _size(config, "attention_head_dim")
    if config.get("cross_attention_dim", width) != width:
        found = quote(config["cross_attention_dim"])
        raise ValueError(f"cross_attention_dim is {found}; PixArt has its own width, {width}")
    interpolation = config.get("interpolation_scale")
    if interpolation is None:
        interpolation = max(sample_size // 64, 1)  # diffusers' default
    if type(interpolation) not in (int, float) or not 0 < interpolation < 100:
        raise ValueError(f"interpolation_scale is {quote(interpolation)}, not a positive number")
    stated = config.get("use_additional_conditions")
    return PixArtConfig(
        sample_size=sample_size,
        interpolation=float(interpolation),
        patch_size=_size(config, "patch_size"),
        in_channels=channels,
        hidden_size=width,
        depth=_size(config, "num_layers"),
        num_heads=heads,
        caption_channels=_size(config, "caption_channels"),
        learn_sigma=out == 2 * channels,
        micro_conditions=micro_conditions if stated is None else bool(stated),
    )


def _size(config: dict[str, Any], field: str) -> int:
    value = config[field]
    if type(value) is not int or not 1 <= value < 10**5:
        raise ValueError(f"{field} is {quote(value)}, not an integer from 1")
    return value


def to_diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported model.

    Raises:
        ValueError: a model that diffusers does not have.
    """
    return {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": "0.32.0",
        **FIXED,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "in_channels": config.in_channels,
        "interpolation_scale": config.interpolation,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "use_additional_conditions": config.micro_conditions,
    }
