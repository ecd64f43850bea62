"""T5 and CLIP as transformers runs them: random weights, the same under our names, one call.

The mappings are written name by name and share nothing with `convert`.
"""

import math

import jax
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers import T5Config as TheirT5Config

from lowbit_jax.models.clip_text import ClipTextConfig
from lowbit_jax.models.t5 import T5Config

# Small, every layer there more than once, no two sizes equal that could be mistaken.
TINY_T5 = T5Config(
    vocab_size=61,
    d_model=48,
    d_kv=8,
    d_ff=80,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
TINY_CLIP = ClipTextConfig(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=21,
    eos_token_id=66,
)


def _randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "shared" in name or "attention_bias" in name:
                parameter.normal_(generator=generator)
            elif parameter.ndim == 2:  # outputs as large as inputs
                bound = math.sqrt(3 / parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def t5_config(config):
    """The config of transformers' model."""
    return TheirT5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        relative_attention_max_distance=config.relative_attention_max_distance,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        pad_token_id=0,
        eos_token_id=1,
    )


def transformers_t5(config, seed=0):
    """transformers' encoder of a `T5Config`, all of it random; scores of about unit variance."""
    with torch.device("meta"):
        model = T5EncoderModel(t5_config(config))
    model = model.to_empty(device="cpu")
    model.encoder.embed_tokens = model.shared  # tied, which to_empty undoes
    _randomise(model, seed)
    with torch.no_grad():
        for block in model.encoder.block:  # else softmax picks one token, whatever the positions
            block.layer[0].SelfAttention.q.weight /= math.sqrt(config.d_kv)
    return model


def run_t5(model, ids, mask=None):
    """transformers' last hidden state."""
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(np.asarray(mask).astype(np.int64))
        out = model(input_ids=torch.tensor(np.asarray(ids)), attention_mask=mask)
    return out.last_hidden_state.float().numpy()


def t5_params(model, config):
    """Our parameter tree."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    positions = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

    def block(i):
        attn, mlp = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        out = {x: {"kernel": state[f"{attn}.SelfAttention.{x}.weight"].T} for x in "qkvo"}
        for x in ("wi_0", "wi_1", "wo"):
            out[x] = {"kernel": state[f"{mlp}.DenseReluDense.{x}.weight"].T}
        out["attn_norm"] = {"scale": state[f"{attn}.layer_norm.weight"]}
        return out | {"mlp_norm": {"scale": state[f"{mlp}.layer_norm.weight"]}}

    return {
        "shared": {"embedding": state["shared.weight"]},
        "relative_attention_bias": {"embedding": state[positions]},
        "blocks": {"0": _stack([block(i) for i in range(config.num_layers)])},
        "final_layer_norm": {"scale": state["encoder.final_layer_norm.weight"]},
    }


def clip_config(config):
    """The config of transformers' model."""
    return CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        eos_token_id=config.eos_token_id,
        bos_token_id=0,
        pad_token_id=1,
    )


def transformers_clip(config, seed=0):
    """transformers' encoder of a `ClipTextConfig`, all of it random."""
    return _randomise(CLIPTextModel(clip_config(config)), seed)


def run_clip(model, ids):
    """transformers' last hidden state and pooled output."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor(np.asarray(ids)))
    return out.last_hidden_state.float().numpy(), out.pooler_output.float().numpy()


def clip_params(model, config):
    """Our parameter tree."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def linear(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(i):
        p = f"encoder.layers.{i}"
        out = {x: linear(f"{p}.self_attn.{x}") for x in ("q_proj", "k_proj", "v_proj", "out_proj")}
        out |= {x: linear(f"{p}.mlp.{x}") for x in ("fc1", "fc2")}
        return out | {x: norm(f"{p}.{x}") for x in ("layer_norm1", "layer_norm2")}

    return {
        "token_embedding": {"embedding": state["embeddings.token_embedding.weight"]},
        "position_embedding": {"embedding": state["embeddings.position_embedding.weight"]},
        "blocks": {"0": _stack([block(i) for i in range(config.num_hidden_layers)])},
        "final_layer_norm": norm("final_layer_norm"),
    }


def texts(config, lengths, tokens, end, pad, seed=1):
    """Random ids of texts of these lengths: tokens, then the end-of-text token, then padding."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(lengths), tokens), pad, np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(3, config.vocab_size - 1, length)
        ids[row, length - 1] = end
    return ids


def _stack(layers):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
