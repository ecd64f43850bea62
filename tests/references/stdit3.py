"""STDiT3 of Open-Sora 1.2 in plain torch, from the report and the published code's names."""

import torch
from torch import nn

from tests.references.stdit import CaptionEmbedder, FinalLayer
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
)

__all__ = ["STDiT3", "meta_stdit3", "run", "state_arrays", "torch_stdit3"]


class Rotary(nn.Module):
    """Complex rotation of neighbouring channels by position x frequency."""

    def __init__(self, dim):
        super().__init__()
        powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        self.freqs = nn.Parameter((10000.0**-powers).float(), requires_grad=False)

    def forward(self, x):
        """(..., n, head, dim); number i of n turns by i."""
        turns = torch.arange(x.shape[-3]).double()[:, None] * self.freqs.double()
        unit = torch.polar(torch.ones_like(turns), turns)[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * unit).flatten(-2).float()


class Block(nn.Module):
    """Self-attention, caption, MLP; tokens (n, m, width), attention over m."""

    def __init__(self, config):
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn = SelfAttention(width, heads, config.qk_norm)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = MLP(width, 4 * width, width)

    def forward(self, x, mod, caption, rotate=lambda x: x):
        """`mod` broadcasts to (n, m, 6, width): every token its own."""
        mod = mod + self.scale_shift_table
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(-2)
        h = normalise(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, rotate)
        x = x + self.cross_attn(x, caption)
        return x + gate2 * self.mlp(normalise(x) * (1 + scale2) + shift2)


class STDiT3(nn.Module):
    """One model for all sizes."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.rope = Rotary(width // config.num_heads)
        self.x_embedder = Patches(config.in_channels, width, config.patch_size)
        self.t_embedder, self.fps_embedder = TimeEmbedder(width), TimeEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.spatial_blocks = nn.ModuleList(Block(config) for _ in range(config.pairs))
        self.temporal_blocks = nn.ModuleList(Block(config) for _ in range(config.pairs))
        p = config.patch_size
        self.final_layer = FinalLayer(width, p[0] * p[1] * p[2] * config.out_channels)

    def forward(self, x, timestep, caption, caption_mask, fps, height, width, frame_mask=None):
        """(b, c, f, y, x) -> (b, out, f, y, x), one video after another."""
        if frame_mask is None:
            frames = -(-x.shape[2] // self.config.patch_size[0])
            frame_mask = torch.ones(len(x), frames, dtype=torch.bool)
        caption = [text[mask] for text, mask in zip(caption, caption_mask, strict=True)]
        items = zip(x, timestep, caption, fps, height, width, frame_mask, strict=True)
        return torch.stack([self.one(*item) for item in items])

    def one(self, x, step, caption, fps, height, width, frame_mask):
        """One video."""
        patch = self.config.patch_size
        grid = [-(-n // p) for n, p in zip(x.shape[1:], patch, strict=True)]
        side = round((grid[1] * grid[2]) ** 0.5)
        scale = (height * width).double().sqrt() / self.config.base_resolution
        rows, columns = (torch.arange(n).double() / scale * side / n for n in grid[1:])
        tokens = self.x_embedder(x) + picture_waves(rows, columns, self.config.hidden_size)

        # per frame, even where all are the same
        times = [self.t_embedder(step if new else step * 0) for new in frame_mask]
        times = [time + self.fps_embedder(fps) for time in times]
        mod = torch.stack([self.t_block(time).reshape(6, -1) for time in times])
        caption = self.y_embedder.y_proj(caption)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, mod[:, None], caption)
            tokens = temporal(tokens.transpose(0, 1), mod, caption, self.rope).transpose(0, 1)
        frames = [self.final_layer(frame, time) for frame, time in zip(tokens, times, strict=True)]
        return joined(torch.stack(frames), grid, patch, x.shape[1:])


def torch_stdit3(config):
    """The reference with random weights."""
    return randomise(STDiT3(config))


def meta_stdit3(config):
    """Names and shapes without memory."""
    with torch.device("meta"):
        return STDiT3(config)
