"""STDiT of Open-Sora 1.0 in plain torch, from the report and the published code's names."""

import torch
from torch import nn

from tests.references.video_torch import (
    MLP,
    CrossAttention,
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

__all__ = ["STDiT", "meta_stdit", "run", "state_arrays", "torch_stdit"]


class Block(nn.Module):
    """Space, time, caption, MLP; tokens (f, t, width)."""

    def __init__(self, config):
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn, self.attn_temp = SelfAttention(width, heads), SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = MLP(width, 4 * width, width)

    def forward(self, x, mod, caption, in_time):
        """`in_time` is added to what the temporal attention sees, not to the tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.reshape(6, -1) + self.scale_shift_table
        h = normalise(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h)
        h = (x + in_time[:, None]).transpose(0, 1)
        x = x + gate1 * self.attn_temp(h).transpose(0, 1)
        x = x + self.cross_attn(x, caption)
        return x + gate2 * self.mlp(normalise(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Table, shift, scale and projection."""

    def __init__(self, width, outputs):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, time):
        """`time` is the embedding before `t_block`."""
        shift, scale = self.scale_shift_table + time
        return self.linear(normalise(x) * (1 + scale) + shift)


class CaptionEmbedder(nn.Module):
    """Projection, and the caption for no text."""

    def __init__(self, config):
        super().__init__()
        self.y_proj = MLP(config.caption_channels, config.hidden_size, config.hidden_size)
        shape = (config.null_caption_length, config.caption_channels)
        self.register_buffer("y_embedding", torch.zeros(shape))


class STDiT(nn.Module):
    """Built for one size, as the published code."""

    def __init__(self, config, size):
        super().__init__()
        width = config.hidden_size
        self.grid = [n // p for n, p in zip(size, config.patch_size, strict=True)]
        frames, rows, columns = (torch.arange(n).double() for n in self.grid)
        table = picture_waves(rows / config.space_scale, columns / config.space_scale, width)
        self.register_buffer("pos_embed", table)
        table = waves(frames / config.time_scale, width)[None].float()
        self.register_buffer("pos_embed_temporal", table)
        self.patch_size = config.patch_size
        self.x_embedder = Patches(config.in_channels, width, config.patch_size)
        self.t_embedder = TimeEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        p = self.patch_size
        self.final_layer = FinalLayer(width, p[0] * p[1] * p[2] * config.out_channels)

    def forward(self, x, timestep, caption, caption_mask):
        """(b, c, f, y, x) -> (b, out, f, y, x), one video after another."""
        items = zip(x, timestep, caption, caption_mask, strict=True)
        return torch.stack([self.one(x, step, text[mask]) for x, step, text, mask in items])

    def one(self, x, step, caption):
        """One video."""
        time = self.t_embedder(step)
        mod, caption = self.t_block(time), self.y_embedder.y_proj(caption)
        tokens = self.x_embedder(x) + self.pos_embed
        for i, block in enumerate(self.blocks):
            in_time = self.pos_embed_temporal[0] * (i == 0)
            tokens = block(tokens, mod, caption, in_time)
        tokens = self.final_layer(tokens, time)
        return joined(tokens, self.grid, self.patch_size, x.shape[1:])


def torch_stdit(config, size):
    """The reference for latents of a size, with random weights and its own position tables."""
    return randomise(STDiT(config, size))


def meta_stdit(config):
    """Names and shapes without memory."""
    with torch.device("meta"):
        return STDiT(config, config.input_size)
