"""T5 v1.1 encoders in the layout of transformers, to `lowbit_jax.models.t5`."""

from __future__ import annotations

from typing import Any

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.table import Layout, Row
from lowbit_jax.models.t5 import T5Config

# what this port computes, as transformers' config says it; a config.json may leave each out
FIXED = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "layer_norm_epsilon": 1e-6,
}

_B = "blocks/{i}/"
_ATTN, _MLP = "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."
_POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_SHARED = ("shared.weight", "encoder.embed_tokens.weight")


def _row(target: str, source: str, **options: Any) -> Row:
    return Row(target=target, sources=(source,), **options)


TRANSFORMERS = Layout(
    name="transformers",
    marker=_POSITIONS,
    stacks={"blocks": "num_layers"},
    rows=(
        _row("shared/embedding", _SHARED[0], aliases=_SHARED[1:], vector=True),
        _row("relative_attention_bias/embedding", _POSITIONS, vector=True),
        _row(f"{_B}attn_norm/scale", f"{_ATTN}layer_norm.weight", vector=True),
        *(_row(f"{_B}{x}", f"{_ATTN}SelfAttention.{x}", bias=False) for x in "qkvo"),
        _row(f"{_B}mlp_norm/scale", f"{_MLP}layer_norm.weight", vector=True),
        *(
            _row(f"{_B}{name}", f"{_MLP}DenseReluDense.{name}", bias=False)
            for name in ("wi_0", "wi_1", "wo")
        ),
        _row("final_layer_norm/scale", "encoder.final_layer_norm.weight", vector=True),
    ),
)

LAYOUTS = (TRANSFORMERS,)


def read_config(checkpoint: Checkpoint, layout: Layout) -> T5Config:
    """The encoder's sizes: from `config.json` where there is one, else from the tensors' shapes.

    Raises:
        CheckpointError: a setting this port does not have, or a tensor that is missing.
    """
    config = checkpoint.config
    if config is not None:
        return fields.read(checkpoint, "T5 v1.1", lambda: from_transformers_config(config))
    return fields.read(checkpoint, "T5 v1.1", lambda: _config_from_shapes(checkpoint))


def from_transformers_config(config: dict[str, Any]) -> T5Config:
    """`T5Config` of a transformers `config.json`; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """
    fields.check_fixed(config, FIXED, "a T5 v1.1 encoder")
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    sizes = {name: fields.integer(config, name) for name in names}
    positions = ("relative_attention_num_buckets", "relative_attention_max_distance")
    sizes |= {name: fields.integer(config, name) for name in positions if name in config}
    return T5Config(**sizes)


def to_transformers_config(config: T5Config) -> dict[str, Any]:
    """The `config.json` with which transformers loads an exported encoder."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
    }


def _config_from_shapes(checkpoint: Checkpoint) -> T5Config:
    """Of a lone file: all but the reach of the buckets, 128 in all that was published."""
    table = next((name for name in _SHARED if name in checkpoint.names), _SHARED[0])
    vocab_size, width = fields.shape(checkpoint, table)
    buckets, heads = fields.shape(checkpoint, _POSITIONS)
    inner = fields.shape(checkpoint, f"{_ATTN}SelfAttention.q.weight".format(i=0))[0]
    if inner % heads:
        raise ValueError(f"the width of the queries, {inner}, is not a multiple of {heads} heads")
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=inner // heads,
        d_ff=fields.shape(checkpoint, f"{_MLP}DenseReluDense.wi_0.weight".format(i=0))[0],
        num_layers=fields.depth(checkpoint, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
