"""DiT as facebook publishes it, in torch: written from the paper's architecture and the names and
shapes of the published files; its parts compute as timm's do (float32, fused qkv, no dropout).

Shares nothing with `lowbit_jax` or `convert`.
"""

import math

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def shifted(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, width))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(shifted(norm(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(shifted(norm(x), shift2, scale2))


class Patches(nn.Module):
    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Times(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Labels(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(shifted(norm(x), shift, scale))


class DiT(nn.Module):
    """The network of a `DiTConfig`; only its sizes are read."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.grid, self.patch = config.sample_size // patch, patch
        self.outputs = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = Patches(patch, config.in_channels, width)
        self.t_embedder, self.y_embedder = Times(width), Labels(config.num_classes, width)
        table = torch.empty(1, self.grid**2, width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, patch * patch * self.outputs)

    def forward(self, x, t, y):
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        out = self.final_layer(tokens, c)
        out = out.reshape(len(x), self.grid, self.grid, self.patch, self.patch, self.outputs)
        side = self.grid * self.patch
        return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.outputs, side, side)


def positions(grid, width):
    """The published table, one number at a time in float64: (1, grid * grid, width) float32."""
    table = np.empty((grid, grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                rate = 1 / 10000 ** (i / quarter)
                table[row, column, i::quarter] = (
                    math.sin(column * rate), math.cos(column * rate),
                    math.sin(row * rate), math.cos(row * rate),
                )  # fmt: skip
    return table.reshape(1, grid * grid, width).astype(np.float32)


def meta_dit(config) -> DiT:
    """The model without memory."""
    with torch.device("meta"):
        return DiT(config)


def original_dit(config, seed: int = 0) -> DiT:
    """The model with random weights: gates open, biases far from zero; the published positions."""
    model = meta_dit(config).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            bound = 0.5 if parameter.ndim == 1 else math.sqrt(3 / parameter[0].numel())
            bound = 1.0 if "embedding_table" in name else bound
            parameter.uniform_(-bound, bound, generator=generator)
        model.pos_embed.copy_(torch.tensor(positions(model.grid, config.hidden_size)))
    return model


def run_original(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The output for the inputs of `tests.references.dit.dit_inputs`."""
    x, time, labels = (torch.tensor(inputs[name]) for name in ("x", "timestep", "labels"))
    with torch.no_grad():
        return model(x, time, labels.long()).numpy()


def original_params(state: dict[str, torch.Tensor], config) -> dict:
    """Our parameter tree from the state dict, name by name; the position table has no place."""
    state = {name: tensor.numpy() for name, tensor in state.items()}
    del state["pos_embed"]

    def linear(name):
        weight = state.pop(f"{name}.weight")
        return {"kernel": weight.reshape(len(weight), -1).T, "bias": state.pop(f"{name}.bias")}

    def block(i):
        return {
            "adaLN_modulation": linear(f"blocks.{i}.adaLN_modulation.1"),
            "attn": {name: linear(f"blocks.{i}.attn.{name}") for name in ("qkv", "proj")},
            "mlp": {name: linear(f"blocks.{i}.mlp.{name}") for name in ("fc1", "fc2")},
        }

    blocks = [block(i) for i in range(config.depth)]
    params = {
        "x_embedder": {"proj": linear("x_embedder.proj")},
        "t_embedder": {
            "in_layer": linear("t_embedder.mlp.0"),
            "out_layer": linear("t_embedder.mlp.2"),
        },
        "y_embedder": {"embedding_table": state.pop("y_embedder.embedding_table.weight")},
        "blocks": {"0": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)},
        "final_layer": {
            "adaLN_modulation": linear("final_layer.adaLN_modulation.1"),
            "linear": linear("final_layer.linear"),
        },
    }
    if state:
        raise ValueError(f"no place for {sorted(state)}")
    return params
