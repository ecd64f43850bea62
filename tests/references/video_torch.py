"""Parts of the video networks in plain torch, written from the published architectures.

Modules and parameters have the published names, so that a state dict is a checkpoint. Every video
is computed by itself, captions are cut to their length first, and attention is two einsums, so that
nothing is shared with the way our modules do it.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def waves(position, width, base=10000.0):
    """[sin, cos] of positions (n,) at base^(-2i / width), in float64."""
    powers = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
    angles = position.double()[:, None] / base**powers
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def picture_waves(rows, columns, width):
    """(1, rows * columns, width): half for the column, half for the row."""
    across = waves(columns, width // 2).repeat(len(rows), 1)
    down = waves(rows, width // 2).repeat_interleave(len(columns), 0)
    return torch.cat([across, down], dim=1)[None].float()


def normalise(x, eps=1e-6):
    """LayerNorm without parameters."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


def attend(q, k, v):
    """Softmax attention of (..., n, head, dim) with scale 1/sqrt(dim)."""
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


class TimeEmbedder(nn.Module):
    """[cos, sin] of a step, then Linear, SiLU, Linear."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, step):
        """A vector (width,) for a scalar."""
        sin, cos = waves(step.reshape(1), 256)[0].float().chunk(2)
        return self.mlp(torch.cat([cos, sin]))


class MLP(nn.Module):
    """Linear, tanh GELU, Linear."""

    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        """Every token by itself."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Attention among the n of (..., n, width), with the options of STDiT3."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.qk_norm = qk_norm

    def forward(self, x, rotate=lambda x: x):
        """`rotate` is applied to queries and keys (..., n, head, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(attend(rotate(q), rotate(k), v).reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention of all tokens (..., width) to a caption (m, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, caption):
        """`caption` has only the tokens that count."""
        k, v = self.kv_linear(caption).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        q = self.q_linear(x).reshape(-1, self.heads, k.shape[-1])
        return self.proj(attend(q, k, v).reshape(x.shape))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """Over the last axis."""
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Patches(nn.Module):
    """The published convolution over patches (2-D or 3-D); its tokens frame by frame."""

    def __init__(self, channels, width, size):
        super().__init__()
        kind = nn.Conv3d if len(size) == 3 else nn.Conv2d
        self.proj = kind(channels, width, size, stride=size)
        self.size = size

    def forward(self, x):
        """(c, f, y, x) -> (f, t, width); axes that are no multiple of a patch get zeros."""
        size = (1,) * (3 - len(self.size)) + tuple(self.size)
        pads = [-n % p for n, p in zip(x.shape[1:], size, strict=True)]
        x = functional.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]))
        if len(self.size) == 2:
            return self.proj(x.transpose(0, 1)).flatten(2).transpose(1, 2)
        return self.proj(x[None])[0].flatten(2).permute(1, 2, 0)


def joined(x, grid, size, shape):
    """Tokens (f, t, patch) with patches "frame row column c" as a video (c, f, y, x) of `shape`."""
    x = x.reshape(*grid, *size, -1).permute(6, 0, 3, 1, 4, 2, 5)
    c, f, pf, y, py, columns, px = x.shape
    x = x.reshape(c, f * pf, y * py, columns * px)
    return x[:, : shape[0], : shape[1], : shape[2]]


def randomise(model, seed=0):
    """All parameters and buffers but position tables random; every gate open, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith(("pos_embed", "temp_embed", "rope")):
                continue
            if value.ndim == 1 or "table" in name:
                value.uniform_(-0.5, 0.5, generator=generator)
            else:
                bound = math.sqrt(3 / value[0].numel())
                value.uniform_(-bound, bound, generator=generator)
            if name.endswith("_norm.weight"):
                value.add_(1.0)
    return model.eval()


def state_arrays(model):
    """State dict as numpy arrays."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def run(model, inputs):
    """The reference's output for numpy inputs by name."""
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    with torch.no_grad():
        return model(**tensors).numpy()
