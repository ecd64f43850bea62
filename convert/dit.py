"""DiT checkpoints, facebook's layout and diffusers' (`DiTTransformer2DModel`), to
`lowbit_jax.models.dit`.

diffusers stores the timestep and label embedders in every block, where facebook's model has one of
each. diffusers' conversion of the published weights wrote equal copies; they are required to be
equal here and one is kept, so nothing is lost and an export writes the copies again. facebook
stores the fixed position table, which is compared with ours.

The two compute differently with the same weights, see `DiTConfig`, so that a model is exported in
the layout it came from.
"""

from __future__ import annotations

from typing import Any

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.table import Constant, Layout, Row
from lowbit_jax.models.dit import SIZES, DiTConfig
from lowbit_jax.models.patches import position_table

# what this port computes, as diffusers' config says it; a config.json may leave each out
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
NORM_EPS = 1e-5  # diffusers' default
FACEBOOK_SHIFT, FACEBOOK_EPS = 0, 1e-6  # time_shift and mlp_norm_eps
PUBLISHED_HEADS = {width: heads for width, _, heads in SIZES.values()}
POSITIONS = "pos_embed"


def _row(target: str, *sources: str, **options: Any) -> Row:
    return Row(target=target, sources=sources, **options)


def _qkv(config: DiTConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _patch(config: DiTConfig) -> tuple[int, ...]:
    return (config.in_channels, config.patch_size, config.patch_size)


def _positions(config: DiTConfig) -> Any:
    return position_table((config.grid, config.grid), config.hidden_size)[None]


_B, _O, _P = "blocks/{i}/", "blocks.{i}.", "transformer_blocks.{i}."
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

ORIGINAL = Layout(
    name="original",
    marker="y_embedder.embedding_table.weight",
    without="temp_embed",  # Latte, which has all of these names
    stacks={"blocks": "depth"},
    rows=(
        _row("x_embedder/proj", "x_embedder.proj", kernel_tail=_patch),
        _row("t_embedder/in_layer", "t_embedder.mlp.0"),
        _row("t_embedder/out_layer", "t_embedder.mlp.2"),
        _row("y_embedder/embedding_table", "y_embedder.embedding_table.weight", vector=True),
        _row(f"{_B}adaLN_modulation", f"{_O}adaLN_modulation.1"),
        *(
            _row(f"{_B}{layer}", f"{_O}{layer.replace('/', '.')}")
            for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
        ),
        _row("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1"),
        _row("final_layer/linear", "final_layer.linear"),
    ),
    constants=(Constant(source=POSITIONS, value=_positions),),
)

LAYOUTS = (DIFFUSERS, ORIGINAL)


def read_config(checkpoint: Checkpoint, layout: Layout) -> DiTConfig:
    """The model's sizes: from diffusers' `config.json`, or from the original's shapes.

    Of diffusers' layout, sample size and heads are in no tensor. Of the original, heads alone: they
    are the published ones by the width, or as a `config.json` beside the file says
    (`num_attention_heads`).

    Raises:
        CheckpointError: no config.json beside diffusers' layout, one this port cannot follow, or
            heads that neither it nor the width tells.
    """
    if layout.name == ORIGINAL.name:
        return fields.read(checkpoint, "DiT", lambda: _from_original(checkpoint))
    config = checkpoint.config
    if config is None:
        raise CheckpointError(
            checkpoint.source,
            "the sample size and the heads of a DiT are in no tensor; add diffusers' config.json",
        )
    return fields.read(checkpoint, "DiT", lambda: from_diffusers_config(config))


def from_diffusers_config(config: dict[str, Any]) -> DiTConfig:
    """`DiTConfig` of a diffusers `DiTTransformer2DModel` config; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """
    fields.check_fixed(config, FIXED, "DiT")
    eps = config.get("norm_eps", NORM_EPS)
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"norm_eps is {quote(eps)}, not a number between 0 and 1")
    channels, heads = (
        fields.integer(config, name) for name in ("in_channels", "num_attention_heads")
    )
    return DiTConfig(
        sample_size=fields.integer(config, "sample_size"),
        patch_size=fields.integer(config, "patch_size"),
        in_channels=channels,
        hidden_size=heads * fields.integer(config, "attention_head_dim"),
        depth=fields.integer(config, "num_layers"),
        num_heads=heads,
        num_classes=fields.integer(config, "num_embeds_ada_norm"),
        learn_sigma=fields.learns_sigma(channels, config.get("out_channels")),
        time_shift=1,
        mlp_norm_eps=eps,
    )


def _from_original(checkpoint: Checkpoint) -> DiTConfig:
    """Sizes from shapes; `check` compares every shape with them afterwards."""
    width, channels, patch, _ = fields.shape(checkpoint, "x_embedder.proj.weight", 4)
    grid = fields.square(checkpoint, POSITIONS)
    outputs = fields.shape(checkpoint, "final_layer.linear.weight")[0]
    return DiTConfig(
        sample_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=fields.depth(checkpoint),
        num_heads=fields.heads(checkpoint.config, width, PUBLISHED_HEADS),
        num_classes=fields.shape(checkpoint, ORIGINAL.marker)[0] - 1,
        learn_sigma=fields.learns_sigma(channels, outputs // patch**2),
        time_shift=FACEBOOK_SHIFT,
        mlp_norm_eps=FACEBOOK_EPS,
    )


def to_original_config(config: DiTConfig) -> dict[str, Any]:
    """What no tensor of the original layout tells: a `config.json` that `read_config` reads.

    Raises:
        ValueError: arithmetic that is not facebook's.
    """
    if (config.time_shift, config.mlp_norm_eps) != (FACEBOOK_SHIFT, FACEBOOK_EPS):
        raise ValueError(
            f"facebook's code fixes time_shift {FACEBOOK_SHIFT} and mlp_norm_eps {FACEBOOK_EPS}, "
            f"not {config.time_shift} and {config.mlp_norm_eps}: choose layout 'diffusers'"
        )
    return {"num_attention_heads": config.num_heads}


def to_diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers loads an exported model.

    Raises:
        ValueError: a time embedding that diffusers does not have.
    """
    if config.time_shift != 1:
        raise ValueError(
            f"diffusers fixes time_shift 1, not {config.time_shift}: choose layout 'original'"
        )
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
