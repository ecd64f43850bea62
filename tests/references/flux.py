"""FLUX as diffusers runs it: a model with random weights, its weights under our names, one call.

The mapping is written name by name and shares nothing with `convert`.
"""

import math

import jax
import numpy as np
import torch
from diffusers import FluxTransformer2DModel


def diffusers_flux(config, seed: int = 0) -> FluxTransformer2DModel:
    """diffusers' model of a `FluxConfig`; all of it random, biases and norms far from trivial."""
    with torch.device("meta"):  # its own initialisation would be overwritten
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # outputs as large as inputs, so that every gate is open
                bound = math.sqrt(3 / parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def run_flux(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """diffusers' velocity for the inputs of `flux_inputs`, in the dtype of the model."""
    names = {
        "img": "hidden_states",
        "txt": "encoder_hidden_states",
        "timestep": "timestep",
        "pooled": "pooled_projections",
        "img_ids": "img_ids",
        "txt_ids": "txt_ids",
        "guidance": "guidance",
    }
    tensors = {names[name]: torch.tensor(value) for name, value in inputs.items()}
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        tensors[name] = tensors[name].to(model.dtype)
    with torch.no_grad():
        return model(**tensors).sample.float().numpy()


def flux_inputs(config, batch=2, height=3, width=5, text=7, seed=1) -> dict[str, np.ndarray]:
    """Random inputs of `FluxTransformer.__call__`; image ids written out position by position.

    Times and guidance differ within the batch and are exact in bfloat16, 1000 times them too
    (diffusers multiplies in the dtype of the model).
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    inputs = {
        "img": normal(batch, height * width, config.in_channels),
        "txt": normal(batch, text, config.context_in_dim),
        "timestep": np.array([0.5, 0.25, 1.0, 0.125], np.float32)[:batch],
        "pooled": normal(batch, config.vec_in_dim),
        "img_ids": np.array([(0, y, x) for y in range(height) for x in range(width)], np.float32),
        "txt_ids": np.zeros((text, 3), np.float32),
    }
    if config.guidance_embed:
        inputs["guidance"] = np.array([4.0, 2.0, 1.0, 0.5], np.float32)[:batch]
    return inputs


def flux_params(state: dict[str, torch.Tensor], config) -> dict:
    """Our parameter tree from diffusers' state dict, which it empties (to hold the weights once).

    diffusers keeps q, k, v and the parallel MLP apart, where ours are fused in Black Forest Labs'
    order, and has the halves (scale, shift) of its last AdaLN the other way round.
    """

    def linear(*names):
        weight = np.concatenate([state.pop(f"{name}.weight").numpy() for name in names])
        bias = np.concatenate([state.pop(f"{name}.bias").numpy() for name in names])
        return {"kernel": weight.T, "bias": bias}

    def norms(prefix, query, key):
        scale = lambda name: {"scale": state.pop(f"{prefix}.{name}.weight").numpy()}  # noqa: E731
        return {"query_norm": scale(query), "key_norm": scale(key)}

    def two_layers(first, second):
        return {"in_layer": linear(first), "out_layer": linear(second)}

    def double(i):
        p = f"transformer_blocks.{i}"
        a = f"{p}.attn"
        return {
            "img_mod": {"lin": linear(f"{p}.norm1.linear")},
            "txt_mod": {"lin": linear(f"{p}.norm1_context.linear")},
            "img_attn": {
                "qkv": linear(f"{a}.to_q", f"{a}.to_k", f"{a}.to_v"),
                "proj": linear(f"{a}.to_out.0"),
                "norm": norms(a, "norm_q", "norm_k"),
            },
            "txt_attn": {
                "qkv": linear(f"{a}.add_q_proj", f"{a}.add_k_proj", f"{a}.add_v_proj"),
                "proj": linear(f"{a}.to_add_out"),
                "norm": norms(a, "norm_added_q", "norm_added_k"),
            },
            "img_mlp": two_layers(f"{p}.ff.net.0.proj", f"{p}.ff.net.2"),
            "txt_mlp": two_layers(f"{p}.ff_context.net.0.proj", f"{p}.ff_context.net.2"),
        }

    def single(i):
        p = f"single_transformer_blocks.{i}"
        a = f"{p}.attn"
        return {
            "modulation": {"lin": linear(f"{p}.norm.linear")},
            "linear1": linear(f"{a}.to_q", f"{a}.to_k", f"{a}.to_v", f"{p}.proj_mlp"),
            "linear2": linear(f"{p}.proj_out"),
            "norm": norms(a, "norm_q", "norm_k"),
        }

    def embedder(name):
        prefix = f"time_text_embed.{name}_embedder"
        return two_layers(f"{prefix}.linear_1", f"{prefix}.linear_2")

    ada = linear("norm_out.linear")
    width = config.hidden_size
    swapped = np.r_[width : 2 * width, 0:width]
    params = {
        "img_in": linear("x_embedder"),
        "txt_in": linear("context_embedder"),
        "time_in": embedder("timestep"),
        "vector_in": embedder("text"),
        "final_layer": {
            "adaLN_modulation": {"kernel": ada["kernel"][:, swapped], "bias": ada["bias"][swapped]},
            "linear": linear("proj_out"),
        },
    }
    if config.guidance_embed:
        params["guidance_in"] = embedder("guidance")
    stacks = (
        ("double_blocks", double, config.depth),
        ("single_blocks", single, config.depth_single_blocks),
    )
    for name, block, depth in stacks:
        if depth:
            params[name] = {"0": _stack([block(i) for i in range(depth)])}
    if state:
        raise ValueError(f"no place for {sorted(state)}")
    return params


def _stack(layers):
    if len(layers) == 1:
        return jax.tree.map(lambda leaf: leaf[None], layers[0])
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
