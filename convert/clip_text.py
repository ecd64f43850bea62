"""CLIP text encoders in the layout of transformers, to `lowbit_jax.models.clip_text`."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert import fields
from convert.checkpoint_files import Checkpoint
from convert.table import Constant, Layout, Row
from lowbit_jax.models.clip_text import LEGACY_EOS, ClipTextConfig

HEADS = {768: 12, 1024: 16, 1280: 20}  # of the published widths
DEFAULT_EOS = 49407  # transformers' own, where a config.json says none

_B = "blocks/{i}/"
_NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def _vector(target: str, source: str) -> Row:
    return Row(target=target, sources=(source,), vector=True)


def _norm(target: str, source: str) -> tuple[Row, Row]:
    weight = _vector(f"{target}/scale", f"{source}.weight")
    return weight, _vector(f"{target}/bias", f"{source}.bias")


def _positions(config: ClipTextConfig) -> np.ndarray:
    return np.arange(config.max_position_embeddings)[None]


def _layout(name: str, prefix: str) -> Layout:
    layer = f"{prefix}encoder.layers.{{i}}."
    return Layout(
        name=name,
        marker=f"{prefix}embeddings.token_embedding.weight",
        stacks={"blocks": "num_hidden_layers"},
        rows=(
            *(
                _vector(f"{table}/embedding", f"{prefix}embeddings.{table}.weight")
                for table in ("token_embedding", "position_embedding")
            ),
            *(
                row
                for norm in ("layer_norm1", "layer_norm2")
                for row in _norm(f"{_B}{norm}", f"{layer}{norm}")
            ),
            *(
                Row(target=f"{_B}{ours}", sources=(f"{layer}{theirs}",))
                for ours, theirs in _NAMES.items()
            ),
            *_norm("final_layer_norm", f"{prefix}final_layer_norm"),
        ),
        # a buffer that files older than transformers 4.31 have
        constants=(
            Constant(source=f"{prefix}embeddings.position_ids", value=_positions, optional=True),
        ),
    )


TRANSFORMERS = _layout("transformers", "text_model.")
TRANSFORMERS_5 = _layout("transformers 5", "")  # which lost the prefix

LAYOUTS = (TRANSFORMERS, TRANSFORMERS_5)


def read_config(checkpoint: Checkpoint, layout: Layout) -> ClipTextConfig:
    """The encoder's sizes: from `config.json` where there is one, else from the tensors' shapes.

    Raises:
        CheckpointError: a setting this port does not have, or a tensor that is missing.
    """
    config = checkpoint.config
    if config is not None:
        return fields.read(checkpoint, "CLIP text", lambda: from_transformers_config(config))
    prefix = layout.marker.removesuffix("embeddings.token_embedding.weight")
    return fields.read(checkpoint, "CLIP text", lambda: _config_from_shapes(checkpoint, prefix))


def from_transformers_config(config: dict[str, Any]) -> ClipTextConfig:
    """`ClipTextConfig` of a transformers `config.json`; KeyError names a missing field.

    Raises:
        ValueError: a setting this port does not have.
    """
    fields.check_fixed(config, {"model_type": "clip_text_model"}, "a CLIP text encoder")
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    eps, end = config.get("layer_norm_eps", 1e-5), config.get("eos_token_id", DEFAULT_EOS)
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"layer_norm_eps is {eps!r}, not a number between 0 and 1")
    if type(end) is not int or end < 0:
        raise ValueError(f"eos_token_id is {end!r}, not a token")
    return ClipTextConfig(
        **{name: fields.integer(config, name) for name in names},
        hidden_act=str(config.get("hidden_act", "quick_gelu")),
        layer_norm_eps=eps,
        eos_token_id=end,
    )


def to_transformers_config(config: ClipTextConfig) -> dict[str, Any]:
    """The `config.json` with which transformers loads an exported encoder."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "eos_token_id": config.eos_token_id,
    }


def _config_from_shapes(checkpoint: Checkpoint, prefix: str) -> ClipTextConfig:
    """Of a lone file: OpenAI's settings, and the largest token as the end of a text."""
    tables = (f"{prefix}embeddings.{table}_embedding.weight" for table in ("token", "position"))
    (vocab_size, width), (positions, _) = (fields.shape(checkpoint, name) for name in tables)
    return ClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=fields.shape(checkpoint, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=fields.depth(checkpoint, f"{prefix}encoder.layers"),
        num_attention_heads=fields.heads(None, width, HEADS),
        max_position_embeddings=positions,
        eos_token_id=LEGACY_EOS,
    )
