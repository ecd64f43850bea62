"""FLUX.1 checkpoints: Black Forest Labs' layout and diffusers', to `lowbit_jax.models.flux`."""

from __future__ import annotations

import re
from typing import Any

from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.table import Layout, Row
from lowbit_jax.models.flux import FluxConfig

STACKS = {"double_blocks": "depth", "single_blocks": "depth_single_blocks"}


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _qkv(config: FluxConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _qkv_mlp(config: FluxConfig) -> tuple[int, ...]:
    return (*_qkv(config), config.mlp_size)


_D, _S = "double_blocks/{i}/", "single_blocks/{i}/"
_BD, _BS = "double_blocks.{i}.", "single_blocks.{i}."
_P, _Q = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."
_T = "time_text_embed."

BFL = Layout(
    name="Black Forest Labs",
    marker="img_in.weight",
    stacks=STACKS,
    rows=(
        _row("img_in", "img_in"),
        _row("txt_in", "txt_in"),
        *(
            _row(f"{name}/{layer}", f"{name}.{layer}", optional=name == "guidance_in")
            for name in ("time_in", "guidance_in", "vector_in")
            for layer in ("in_layer", "out_layer")
        ),
        *(
            row
            for s in ("img", "txt")
            for row in (
                _row(f"{_D}{s}_mod/lin", f"{_BD}{s}_mod.lin"),
                _row(f"{_D}{s}_attn/qkv", f"{_BD}{s}_attn.qkv"),
                _row(f"{_D}{s}_attn/proj", f"{_BD}{s}_attn.proj"),
                _row(
                    f"{_D}{s}_attn/norm/query_norm/scale",
                    f"{_BD}{s}_attn.norm.query_norm.scale",
                    vector=True,
                ),
                _row(
                    f"{_D}{s}_attn/norm/key_norm/scale",
                    f"{_BD}{s}_attn.norm.key_norm.scale",
                    vector=True,
                ),
                _row(f"{_D}{s}_mlp/in_layer", f"{_BD}{s}_mlp.0"),
                _row(f"{_D}{s}_mlp/out_layer", f"{_BD}{s}_mlp.2"),
            )
        ),
        _row(f"{_S}modulation/lin", f"{_BS}modulation.lin"),
        _row(f"{_S}linear1", f"{_BS}linear1"),
        _row(f"{_S}linear2", f"{_BS}linear2"),
        _row(f"{_S}norm/query_norm/scale", f"{_BS}norm.query_norm.scale", vector=True),
        _row(f"{_S}norm/key_norm/scale", f"{_BS}norm.key_norm.scale", vector=True),
        _row("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1"),
        _row("final_layer/linear", "final_layer.linear"),
    ),
)

DIFFUSERS = Layout(
    name="diffusers",
    marker="x_embedder.weight",
    stacks=STACKS,
    rows=(
        _row("img_in", "x_embedder"),
        _row("txt_in", "context_embedder"),
        *(
            _row(
                f"{ours}/{layer}", f"{_T}{theirs}.{linear}", optional=theirs == "guidance_embedder"
            )
            for ours, theirs in (
                ("time_in", "timestep_embedder"),
                ("guidance_in", "guidance_embedder"),
                ("vector_in", "text_embedder"),
            )
            for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
        ),
        _row(f"{_D}img_mod/lin", f"{_P}norm1.linear"),
        _row(f"{_D}txt_mod/lin", f"{_P}norm1_context.linear"),
        _row(f"{_D}img_attn/qkv", *(f"{_P}attn.to_{x}" for x in "qkv"), sizes=_qkv),
        _row(f"{_D}txt_attn/qkv", *(f"{_P}attn.add_{x}_proj" for x in "qkv"), sizes=_qkv),
        _row(f"{_D}img_attn/proj", f"{_P}attn.to_out.0"),
        _row(f"{_D}txt_attn/proj", f"{_P}attn.to_add_out"),
        _row(f"{_D}img_attn/norm/query_norm/scale", f"{_P}attn.norm_q.weight", vector=True),
        _row(f"{_D}img_attn/norm/key_norm/scale", f"{_P}attn.norm_k.weight", vector=True),
        _row(f"{_D}txt_attn/norm/query_norm/scale", f"{_P}attn.norm_added_q.weight", vector=True),
        _row(f"{_D}txt_attn/norm/key_norm/scale", f"{_P}attn.norm_added_k.weight", vector=True),
        _row(f"{_D}img_mlp/in_layer", f"{_P}ff.net.0.proj"),
        _row(f"{_D}img_mlp/out_layer", f"{_P}ff.net.2"),
        _row(f"{_D}txt_mlp/in_layer", f"{_P}ff_context.net.0.proj"),
        _row(f"{_D}txt_mlp/out_layer", f"{_P}ff_context.net.2"),
        _row(f"{_S}modulation/lin", f"{_Q}norm.linear"),
        _row(f"{_S}linear1", *(f"{_Q}attn.to_{x}" for x in "qkv"), f"{_Q}proj_mlp", sizes=_qkv_mlp),
        _row(f"{_S}linear2", f"{_Q}proj_out"),
        _row(f"{_S}norm/query_norm/scale", f"{_Q}attn.norm_q.weight", vector=True),
        _row(f"{_S}norm/key_norm/scale", f"{_Q}attn.norm_k.weight", vector=True),
        # diffusers' AdaLayerNormContinuous has (scale, shift), Black Forest Labs (shift, scale)
        _row("final_layer/adaLN_modulation", "norm_out.linear", swap_halves=True),
        _row("final_layer/linear", "proj_out"),
    ),
)

LAYOUTS = (BFL, DIFFUSERS)


def read_config(checkpoint: Checkpoint, layout: Layout) -> FluxConfig:
    """The model's sizes: from `config.json` where it is diffusers', else from the tensors' shapes.

    Raises:
        CheckpointError: a tensor the sizes are read from is missing, or the rotary axes cannot be
            known from shapes (a head dim other than 128 without a config.json).
    """
    config = checkpoint.config
    try:
        if config is not None and "num_single_layers" in config:
            return from_diffusers_config(config)
        return _config_from_shapes(checkpoint, layout)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(checkpoint.source, f"not a FLUX configuration: {reason}") from error


def from_diffusers_config(config: dict[str, Any]) -> FluxConfig:
    """`FluxConfig` of a diffusers `FluxTransformer2DModel` config; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """

    def size(field: str, least: int = 1) -> int:
        value = config[field]
        if type(value) is not int or not least <= value < 10**5:
            raise ValueError(f"{field} is {quote(value)}, not an integer from {least}")
        return value

    channels, out = size("in_channels"), config.get("out_channels")
    if config.get("patch_size", 1) != 1 or out not in (None, channels):
        raise ValueError(
            f"patch_size {config.get('patch_size')} and out_channels {out} are not supported; "
            f"FLUX.1 has 1 and {channels} (Fill, Canny and Depth variants are not ported)"
        )
    heads, dim = size("num_attention_heads"), size("attention_head_dim")
    return FluxConfig(
        in_channels=channels,
        vec_in_dim=size("pooled_projection_dim"),
        context_in_dim=size("joint_attention_dim"),
        hidden_size=heads * dim,
        num_heads=heads,
        depth=size("num_layers", 0),
        depth_single_blocks=size("num_single_layers", 0),
        axes_dim=tuple(config.get("axes_dims_rope", (16, 56, 56))),
        guidance_embed=bool(config.get("guidance_embeds", False)),
    )


def to_diffusers_config(config: FluxConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported model."""
    if config.mlp_ratio != 4.0 or config.theta != 10000.0:
        raise ValueError(
            f"diffusers fixes mlp_ratio 4 and theta 10000, not {config.mlp_ratio}, {config.theta}"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.32.0",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.axes_dim),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": config.vec_in_dim,
    }


def _config_from_shapes(checkpoint: Checkpoint, layout: Layout) -> FluxConfig:
    sources = {row.target: row.sources[0] for row in layout.rows}

    def shape(target: str, suffix: str = ".weight") -> tuple[int, ...]:
        found = tuple(checkpoint.info(sources[target].format(i=0) + suffix).shape)
        if len(found) != (2 if suffix else 1):
            raise ValueError(f"'{sources[target]}' has shape {found}")
        return found

    hidden, channels = shape("img_in")
    head_dim = shape("double_blocks/{i}/img_attn/norm/query_norm/scale", "")[0]
    if head_dim != 128:
        raise ValueError(
            f"head dim {head_dim}: its rotary axes are in no tensor; add diffusers' config.json"
        )
    return FluxConfig(
        in_channels=channels,
        vec_in_dim=shape("vector_in/in_layer")[1],
        context_in_dim=shape("txt_in")[1],
        hidden_size=hidden,
        mlp_ratio=shape("double_blocks/{i}/img_mlp/in_layer")[0] / hidden,
        num_heads=hidden // head_dim,
        depth=_count(checkpoint, sources["double_blocks/{i}/img_mod/lin"]),
        depth_single_blocks=_count(checkpoint, sources["single_blocks/{i}/modulation/lin"]),
        guidance_embed=sources["guidance_in/in_layer"] + ".weight" in checkpoint.names,
    )


def _count(checkpoint: Checkpoint, source: str) -> int:
    """1 + the highest layer number in names like `source`; gaps are then reported as missing."""
    pattern = re.compile(re.escape(source + ".weight").replace(re.escape("{i}"), r"(\d{1,4})"))
    found = [int(match[1]) for name in checkpoint.names if (match := pattern.fullmatch(name))]
    return max(found, default=-1) + 1
