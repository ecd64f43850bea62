"""Latte-1 as diffusers runs it: a model with random weights, its weights under our names, one call.

The mapping is written name by name and shares nothing with `convert`.
"""

import jax
import numpy as np
import torch
from diffusers import LatteTransformer3DModel

from tests.references.latte_t2v_files import diffusers_config
from tests.references.video_torch import randomise


def diffusers_latte(config, device="cpu") -> LatteTransformer3DModel:
    """diffusers' model; with random weights, or without memory on "meta"."""
    fields = {k: v for k, v in diffusers_config(config).items() if not k.startswith("_")}
    with torch.device(device):
        model = LatteTransformer3DModel(**fields)
    return randomise(model) if device == "cpu" else model


def run(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """diffusers' output for our inputs: its mask is a bias, repeated for every frame."""
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    frames = inputs["x"].shape[2]
    bias = torch.where(inputs["caption_mask"], 0.0, -torch.inf)[:, None]
    with torch.no_grad():
        return model(
            inputs["x"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["caption"],
            encoder_attention_mask=bias.repeat_interleave(frames, dim=0),
        ).sample.numpy()


def params_of(model, config) -> dict:
    """Our parameter tree from diffusers' state dict."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}

    def linear(*names):
        weight = np.concatenate([state.pop(f"{name}.weight") for name in names])
        bias = np.concatenate([state.pop(f"{name}.bias") for name in names])
        return {"kernel": weight.reshape(len(weight), -1).T, "bias": bias}

    def block(b, cross):
        parts = {
            "scale_shift_table": state.pop(f"{b}.scale_shift_table"),
            "attn": {
                "qkv": linear(*(f"{b}.attn1.to_{x}" for x in "qkv")),
                "proj": linear(f"{b}.attn1.to_out.0"),
            },
            "mlp": {"fc1": linear(f"{b}.ff.net.0.proj"), "fc2": linear(f"{b}.ff.net.2")},
        }
        if cross:
            parts["cross_attn"] = {
                "q_linear": linear(f"{b}.attn2.to_q"),
                "kv_linear": linear(f"{b}.attn2.to_k", f"{b}.attn2.to_v"),
                "proj": linear(f"{b}.attn2.to_out.0"),
            }
        return parts

    pairs = [
        {
            "spatial": block(f"transformer_blocks.{i}", cross=True),
            "temporal": block(f"temporal_transformer_blocks.{i}", cross=False),
        }
        for i in range(config.pairs)
    ]
    embedder = "adaln_single.emb.timestep_embedder.linear_"
    params = {
        "x_embedder": {"proj": linear("pos_embed.proj")},
        "t_embedder": {"in_layer": linear(f"{embedder}1"), "out_layer": linear(f"{embedder}2")},
        "t_block": linear("adaln_single.linear"),
        "y_embedder": {
            "y_proj": {f"fc{n}": linear(f"caption_projection.linear_{n}") for n in (1, 2)}
        },
        "blocks": {"0": jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)},
        "final_layer": {
            "scale_shift_table": state.pop("scale_shift_table"),
            "linear": linear("proj_out"),
        },
    }
    if state:
        raise ValueError(f"no place for {sorted(state)}")
    return jax.tree.map(jax.numpy.asarray, params)
