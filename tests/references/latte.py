"""The class-conditional Latte in plain torch, from the paper and the published code's names."""

import torch
from torch import nn

from tests.references.video_torch import (
    MLP,
    Patches,
    SelfAttention,
    TimeEmbedder,
    joined,
    normalise,
    picture_waves,
    randomise,
    run,
    state_arrays,
    waves,
)

__all__ = ["Latte", "meta_latte", "run", "state_arrays", "torch_latte"]


class Block(nn.Module):
    """A DiT block; tokens (..., n, width), attention among n."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.attn = SelfAttention(width, config.num_heads)
        self.mlp = MLP(width, 4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """`c` is the condition (width,)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6)
        x = x + gate1 * self.attn(normalise(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(normalise(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Shift, scale and projection."""

    def __init__(self, config):
        super().__init__()
        width, outputs = config.hidden_size, config.patch_size**2 * config.out_channels
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        """`c` is the condition (width,)."""
        shift, scale = self.adaLN_modulation(c).chunk(2)
        return self.linear(normalise(x) * (1 + scale) + shift)


class LabelEmbedder(nn.Module):
    """One vector per class and one for none."""

    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)


class Latte(nn.Module):
    """Variant 1 of the paper."""

    def __init__(self, config):
        super().__init__()
        width, grid = config.hidden_size, torch.arange(config.sample_size // config.patch_size)
        self.config = config
        self.x_embedder = Patches(config.in_channels, width, (config.patch_size,) * 2)
        self.t_embedder = TimeEmbedder(width)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(picture_waves(grid, grid, width))
        frames = torch.arange(config.num_frames)
        self.temp_embed = nn.Parameter(waves(frames, width)[None].float())
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x, timestep, labels=None):
        """(b, c, f, y, x) -> (b, out, f, y, x), one video after another."""
        labels = [None] * len(x) if labels is None else labels
        return torch.stack([self.one(*item) for item in zip(x, timestep, labels, strict=True)])

    def one(self, x, step, label):
        """One video."""
        p = self.config.patch_size
        c = self.t_embedder(step)
        if label is not None:
            c = c + self.y_embedder.embedding_table.weight[label]
        tokens = self.x_embedder(x) + self.pos_embed
        for i, block in enumerate(self.blocks):
            if i == 1:
                tokens = tokens + self.temp_embed[0][:, None]
            if i % 2 == 0:
                tokens = block(tokens, c)
            else:
                tokens = block(tokens.transpose(0, 1), c).transpose(0, 1)
        grid = (x.shape[1], x.shape[2] // p, x.shape[3] // p)
        return joined(self.final_layer(tokens, c), grid, (1, p, p), x.shape[1:])


def torch_latte(config):
    """The reference with random weights and its own position tables."""
    return randomise(Latte(config))


def meta_latte(config):
    """Names and shapes without memory."""
    with torch.device("meta"):
        return Latte(config)
