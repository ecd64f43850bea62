"""Autoencoders in diffusers' layout and the original one, to `lowbit_jax.models.autoencoder_kl`.

The original layout is that of Black Forest Labs' `ae.safetensors` and of CompVis' `kl-f8`. It
numbers the levels of the decoder from the finest, and has convolutions where diffusers has linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.table import Layout, Row
from lowbit_jax.models.autoencoder_kl import FLUX_VAE, SD_VAE, AutoencoderConfig

# what this port computes, as diffusers' config says it; a config.json may leave each out
FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
GROUPS = 32  # of every norm that was published

Name = Callable[..., str]


def _conv(target: str, source: str, channels: int, window: int = 3) -> Row:
    tail = (channels, window, window)
    return Row(target=target, sources=(source,), kernel_tail=lambda config: tail)


def _norm(target: str, source: str) -> tuple[Row, Row]:
    return (
        Row(target=f"{target}/scale", sources=(f"{source}.weight",), vector=True),
        Row(target=f"{target}/bias", sources=(f"{source}.bias",), vector=True),
    )


def _residual(ours: str, theirs: str, k: int, n: int, shortcut: str) -> Iterator[Row]:
    yield from _norm(f"{ours}/norm1", f"{theirs}.norm1")
    yield _conv(f"{ours}/conv1", f"{theirs}.conv1", k)
    yield from _norm(f"{ours}/norm2", f"{theirs}.norm2")
    yield _conv(f"{ours}/conv2", f"{theirs}.conv2", n)
    if k != n:
        yield _conv(f"{ours}/shortcut", f"{theirs}.{shortcut}", k, 1)


def _halves(config: AutoencoderConfig) -> Iterator[tuple[str, str, list[int], int, str]]:
    """(half, kind of level, channels into and out of its levels, blocks, resampling) of each."""
    up = config.block_out_channels[::-1]
    down = config.block_out_channels
    yield "encoder", "down", [down[0], *down], config.layers_per_block, "downsample"
    yield "decoder", "up", [up[0], *up], config.layers_per_block + 1, "upsample"


def _levels(config: AutoencoderConfig, block: Name, resample: Name, shortcut: str) -> Iterator[Row]:
    """Rows of all levels; `block` and `resample` name what the source calls them."""
    for half, kind, channels, blocks, sampler in _halves(config):
        levels = len(config.block_out_channels)
        for level in range(levels):
            ours = f"{half}/{kind}_{level}"
            for index in range(blocks):
                k = channels[level + (index > 0)]
                theirs = block(half, kind, level, index, levels)
                name = f"{ours}/block_{index}"
                yield from _residual(name, theirs, k, channels[level + 1], shortcut)
            if level < levels - 1:
                theirs = resample(half, kind, level, sampler, levels)
                yield _conv(f"{ours}/{sampler}", theirs, channels[level + 1])


def _ends(config: AutoencoderConfig, norm_out: str) -> Iterator[Row]:
    """Rows of what both layouts have outside the levels, but for the middle."""
    first, last = config.block_out_channels[0], config.block_out_channels[-1]
    z = config.latent_channels
    for half, k, n in (("encoder", config.in_channels, last), ("decoder", z, first)):
        yield _conv(f"{half}/conv_in", f"{half}.conv_in", k)
        yield from _norm(f"{half}/norm_out", f"{half}.{norm_out}")
        yield _conv(f"{half}/conv_out", f"{half}.conv_out", n)
    if config.use_quant_conv:
        yield _conv("quant_conv", "quant_conv", 2 * z, 1)
    if config.use_post_quant_conv:
        yield _conv("post_quant_conv", "post_quant_conv", z, 1)


def _diffusers_rows(config: AutoencoderConfig) -> tuple[Row, ...]:
    def block(half: str, kind: str, level: int, index: int, levels: int) -> str:
        return f"{half}.{kind}_blocks.{level}.resnets.{index}"

    def resample(half: str, kind: str, level: int, sampler: str, levels: int) -> str:
        return f"{half}.{kind}_blocks.{level}.{sampler}rs.0.conv"

    def middle(half: str) -> Iterator[Row]:
        ours, theirs = f"{half}/mid", f"{half}.mid_block"
        width = config.block_out_channels[-1]
        for index in range(2):
            name = f"{theirs}.resnets.{index}"
            yield from _residual(f"{ours}/block_{index}", name, width, width, "conv_shortcut")
        attention = f"{theirs}.attentions.0"
        yield from _norm(f"{ours}/attn/norm", f"{attention}.group_norm")
        # the second names are those of files older than diffusers 0.15
        for name, new, old in (
            *(("q", "to_q", "query"), ("k", "to_k", "key"), ("v", "to_v", "value")),
            ("proj_out", "to_out.0", "proj_attn"),
        ):
            target, aliases = f"{ours}/attn/{name}", (f"{attention}.{old}",)
            yield Row(target=target, sources=(f"{attention}.{new}",), aliases=aliases)

    return (
        *_ends(config, "conv_norm_out"),
        *middle("encoder"),
        *middle("decoder"),
        *_levels(config, block, resample, "conv_shortcut"),
    )


def _original_rows(config: AutoencoderConfig) -> tuple[Row, ...]:
    def numbered(kind: str, level: int, levels: int) -> int:
        return level if kind == "down" else levels - 1 - level

    def block(half: str, kind: str, level: int, index: int, levels: int) -> str:
        return f"{half}.{kind}.{numbered(kind, level, levels)}.block.{index}"

    def resample(half: str, kind: str, level: int, sampler: str, levels: int) -> str:
        return f"{half}.{kind}.{numbered(kind, level, levels)}.{sampler}.conv"

    def middle(half: str) -> Iterator[Row]:
        ours, theirs = f"{half}/mid", f"{half}.mid"
        width = config.block_out_channels[-1]
        for index in range(2):
            name = f"{theirs}.block_{index + 1}"
            yield from _residual(f"{ours}/block_{index}", name, width, width, "nin_shortcut")
        yield from _norm(f"{ours}/attn/norm", f"{theirs}.attn_1.norm")
        for name in ("q", "k", "v", "proj_out"):
            yield _conv(f"{ours}/attn/{name}", f"{theirs}.attn_1.{name}", width, 1)

    return (
        *_ends(config, "norm_out"),
        *middle("encoder"),
        *middle("decoder"),
        *_levels(config, block, resample, "nin_shortcut"),
    )


DIFFUSERS = Layout(
    name="diffusers",
    marker="encoder.down_blocks.0.resnets.0.conv1.weight",
    stacks={},
    rows=(),
    more=_diffusers_rows,
)
ORIGINAL = Layout(
    name="original",
    marker="encoder.down.0.block.0.conv1.weight",
    stacks={},
    rows=(),
    more=_original_rows,
)

LAYOUTS = (DIFFUSERS, ORIGINAL)


def read_config(checkpoint: Checkpoint, layout: Layout) -> AutoencoderConfig:
    """The sizes: from diffusers' `config.json` where there is one, else from the tensors' shapes.

    Raises:
        CheckpointError: a setting this port does not have, a tensor that is missing, or latents
            of which no scale was published, without a config.json.
    """
    config = checkpoint.config
    if config is not None and "block_out_channels" in config:
        return fields.read(checkpoint, "AutoencoderKL", lambda: from_diffusers_config(config))
    make = partial(_config_from_shapes, checkpoint, layout)
    return fields.read(checkpoint, "AutoencoderKL", make)


def from_diffusers_config(config: dict[str, Any]) -> AutoencoderConfig:
    """`AutoencoderConfig` of diffusers' `config.json`; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """
    fields.check_fixed(config, FIXED, "the ported AutoencoderKL")
    channels = config["block_out_channels"]
    if not isinstance(channels, list) or not all(type(n) is int and n > 0 for n in channels):
        raise ValueError(f"block_out_channels is {channels!r}, not a list of sizes")
    levels, colours = len(channels), fields.integer(config, "in_channels")
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "out_channels": colours,
    }
    fields.check_fixed(config, kinds, "the ported AutoencoderKL")
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    if not isinstance(scale, int | float) or not isinstance(shift, int | float | None):
        raise ValueError(f"scaling_factor {scale!r} and shift_factor {shift!r} must be numbers")
    return AutoencoderConfig(
        in_channels=colours,
        latent_channels=fields.integer(config, "latent_channels"),
        block_out_channels=tuple(channels),
        layers_per_block=fields.integer(config, "layers_per_block"),
        norm_num_groups=fields.integer({"norm_num_groups": GROUPS} | config, "norm_num_groups"),
        scaling_factor=float(scale),
        shift_factor=float(shift or 0.0),
        use_quant_conv=bool(config.get("use_quant_conv", True)),
        use_post_quant_conv=bool(config.get("use_post_quant_conv", True)),
    )


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported autoencoder."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.32.0",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.in_channels,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.use_post_quant_conv,
        "use_quant_conv": config.use_quant_conv,
    }


def _config_from_shapes(checkpoint: Checkpoint, layout: Layout) -> AutoencoderConfig:
    """Of a lone file. Scale and shift are in no tensor: those published for so many channels."""

    def conv(name: str) -> tuple[int, ...]:
        return fields.shape(checkpoint, f"{name}.weight", 4)

    stack, blocks = {"diffusers": ("encoder.down_blocks", "resnets")}.get(
        layout.name, ("encoder.down", "block")
    )
    levels = range(fields.depth(checkpoint, stack))
    z = conv("decoder.conv_in")[1]
    known = {vae.latent_channels: vae for vae in (FLUX_VAE, SD_VAE)}
    if z not in known:
        raise ValueError(
            f"the scale of {z} latent channels is in no tensor; add diffusers' config.json"
        )
    return AutoencoderConfig(
        in_channels=conv("encoder.conv_in")[1],
        latent_channels=z,
        block_out_channels=tuple(conv(f"{stack}.{i}.{blocks}.0.conv1")[0] for i in levels),
        layers_per_block=fields.depth(checkpoint, f"{stack}.0.{blocks}"),
        norm_num_groups=GROUPS,
        scaling_factor=known[z].scaling_factor,
        shift_factor=known[z].shift_factor,
        use_quant_conv="quant_conv.weight" in checkpoint.names,
        use_post_quant_conv="post_quant_conv.weight" in checkpoint.names,
    )
