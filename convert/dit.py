"""DiT checkpoints in diffusers' layout (`DiTTransformer2DModel`), to `lowbit_jax.models.dit`.

diffusers stores the timestep and label embedders in every block, where facebook's model has one of
each. diffusers' conversion of the published weights wrote equal copies; they are required to be
equal here and one is kept, so nothing is lost and an export writes the copies again.
"""

from __future__ import annotations

from typing import Any

from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.table import Layout, Row
from lowbit_jax.models.dit import DiTConfig

# what this port computes, as diffusers' config says it; a config.json may leave each out
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
NORM_EPS = 1e-5  # diffusers' default


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _qkv(config: DiTConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _patch(config: DiTConfig) -> tuple[int, ...]:
    return (config.in_channels, config.patch_size, config.patch_size)


_B, _P = "blocks/{i}/", "transformer_blocks.{i}."
_E = f"{_P}norm1.emb."

DIFFUSERS = Layout(
    name="diffusers",
    marker="proj_out_1.weight",
    stacks={"blocks": "depth"},
    rows=(
        _row("x_embedder/proj", "pos_embed.proj", kernel_tail=_patch),
        _row("t_embedder/in_layer", f"{_E}timestep_embedder.linear_1", repeated="blocks"),
        _row("t_embedder/out_layer", f"{_E}timestep_embedder.linear_2", repeated="blocks"),
        _row(
            "y_embedder/embedding_table",
            f"{_E}class_embedder.embedding_table.weight",
            vector=True,
            repeated="blocks",
        ),
        _row(f"{_B}adaLN_modulation", f"{_P}norm1.linear"),
        _row(f"{_B}attn/qkv", *(f"{_P}attn1.to_{x}" for x in "qkv"), sizes=_qkv),
        _row(f"{_B}attn/proj", f"{_P}attn1.to_out.0"),
        _row(f"{_B}mlp/fc1", f"{_P}ff.net.0.proj"),
        _row(f"{_B}mlp/fc2", f"{_P}ff.net.2"),
        _row("final_layer/adaLN_modulation", "proj_out_1"),
        _row("final_layer/linear", "proj_out_2"),
    ),
)

LAYOUTS = (DIFFUSERS,)


def read_config(checkpoint: Checkpoint, layout: Layout) -> DiTConfig:
    """The model's sizes, from `config.json`: sample size and heads are in no tensor.

    Raises:
        CheckpointError: no config.json, or one this port cannot follow.
    """
    if checkpoint.config is None:
        raise CheckpointError(
            checkpoint.source,
            "the sample size and the heads of a DiT are in no tensor; add diffusers' config.json",
        )
    try:
        return from_diffusers_config(checkpoint.config)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(checkpoint.source, f"not a DiT configuration: {reason}") from error


def from_diffusers_config(config: dict[str, Any]) -> DiTConfig:
    """`DiTConfig` of a diffusers `DiTTransformer2DModel` config; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """

    def size(field: str) -> int:
        value = config[field]
        if type(value) is not int or not 1 <= value < 10**5:
            raise ValueError(f"{field} is {quote(value)}, not an integer from 1")
        return value

    for field, value in FIXED.items():
        if config.get(field, value) != value:
            raise ValueError(f"{field} is {quote(config[field])}; DiT has {quote(value)}")
    eps = config.get("norm_eps", NORM_EPS)
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"norm_eps is {quote(eps)}, not a number between 0 and 1")
    channels, out = size("in_channels"), config.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise ValueError(
            f"out_channels is {quote(out)}; DiT predicts noise ({channels}) "
            f"or noise and variance ({2 * channels})"
        )
    heads, dim = size("num_attention_heads"), size("attention_head_dim")
    return DiTConfig(
        sample_size=size("sample_size"),
        patch_size=size("patch_size"),
        in_channels=channels,
        hidden_size=heads * dim,
        depth=size("num_layers"),
        num_heads=heads,
        num_classes=size("num_embeds_ada_norm"),
        learn_sigma=out == 2 * channels,
        time_shift=1,
        mlp_norm_eps=eps,
    )


def to_diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported model.

    Raises:
        ValueError: a time embedding that diffusers does not have.
    """
    if config.time_shift != 1:
        raise ValueError(f"diffusers fixes time_shift 1, not {config.time_shift}")
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": "0.32.0",
        **FIXED,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "norm_eps": config.mlp_norm_eps,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
    }
