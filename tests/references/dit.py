"""DiT as diffusers runs it: a model with random weights, its weights under our names, one call.

The mapping is written name by name and shares nothing with `convert`.
"""

import math

import jax
import numpy as np
import torch
from diffusers import DiTTransformer2DModel


def meta_dit(config) -> DiTTransformer2DModel:
    """diffusers' model of a `DiTConfig` without memory, on torch's meta device."""
    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.in_channels * (2 if config.learn_sigma else 1),
            num_layers=config.depth,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=config.mlp_norm_eps,
        )


def diffusers_dit(config, seed: int = 0) -> DiTTransformer2DModel:
    """The model with memory; all of it random, biases far from zero, embedders shared."""
    model = meta_dit(config)
    table = DiTTransformer2DModel(  # the position table is a buffer, which to_empty would lose
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        num_layers=0,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
    ).pos_embed.pos_embed
    model = model.to_empty(device="cpu").eval()
    model.pos_embed.pos_embed = table
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:  # outputs as large as inputs, so that every gate is open
                bound = math.sqrt(3 / parameter[0].numel())
                bound = 1.0 if "embedding_table" in name else bound
                parameter.uniform_(-bound, bound, generator=generator)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model


def run_dit(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """diffusers' output for the inputs of `dit_inputs`, in the dtype of the model."""
    x = torch.tensor(inputs["x"]).to(model.dtype)
    time, labels = (torch.tensor(inputs[name]) for name in ("timestep", "labels"))
    with torch.no_grad():
        return model(x, timestep=time, class_labels=labels.long()).sample.float().numpy()


def dit_inputs(config, batch=3, seed=1) -> dict[str, np.ndarray]:
    """Random inputs of `DiTTransformer.__call__`; the first picture has no class."""
    rng = np.random.default_rng(seed)
    size = (batch, config.in_channels, config.sample_size, config.sample_size)
    labels = rng.integers(0, config.num_classes, batch).astype(np.int32)
    labels[0] = config.num_classes
    return {
        "x": rng.standard_normal(size, np.float32),
        "timestep": np.array([500, 3, 999, 250], np.int32)[:batch],
        "labels": labels,
    }


def dit_params(state: dict[str, torch.Tensor], config) -> dict:
    """Our parameter tree from diffusers' state dict; embedders are taken from the last block."""
    state = dict(state)

    def linear(*names):
        weight = np.concatenate([state.pop(f"{name}.weight").numpy() for name in names])
        bias = np.concatenate([state.pop(f"{name}.bias").numpy() for name in names])
        return {"kernel": weight.reshape(len(weight), -1).T, "bias": bias}

    def block(i):
        b = f"transformer_blocks.{i}"
        return {
            "adaLN_modulation": linear(f"{b}.norm1.linear"),
            "attn": {
                "qkv": linear(*(f"{b}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))),
                "proj": linear(f"{b}.attn1.to_out.0"),
            },
            "mlp": {"fc1": linear(f"{b}.ff.net.0.proj"), "fc2": linear(f"{b}.ff.net.2")},
        }

    def embedders(i):
        e = f"transformer_blocks.{i}.norm1.emb"
        first, second = (linear(f"{e}.timestep_embedder.linear_{n}") for n in (1, 2))
        table = state.pop(f"{e}.class_embedder.embedding_table.weight").numpy()
        return {
            "t_embedder": {"in_layer": first, "out_layer": second},
            "y_embedder": {"embedding_table": table},
        }

    blocks = [block(i) for i in range(config.depth)]
    params = {
        "x_embedder": {"proj": linear("pos_embed.proj")},
        **[embedders(i) for i in range(config.depth)][-1],
        "blocks": {"0": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)},
        "final_layer": {
            "adaLN_modulation": linear("proj_out_1"),
            "linear": linear("proj_out_2"),
        },
    }
    if state:
        raise ValueError(f"no place for {sorted(state)}")
    return params
