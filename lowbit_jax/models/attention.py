"""Attention, with what every network needs around it: heads, rotary positions, projections.

Shape letters: b batch, t tokens, s tokens of a context, k width, h heads, d head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from lowbit_jax import ops
from lowbit_jax.models.layers import Linear, RMSNorm

Dtype = Any

# One chunk of attention scores (float32) stays below this, whatever the number of tokens.
MAX_SCORE_BYTES = 64 * 2**20


def rotary_angles(
    ids: Num[Array, "t axes"], axes_dim: Sequence[int], theta: float = 10000.0
) -> Float[Array, "t d2"]:
    """Rotation angles of every token: `ids[:, a] * theta^(-2i / axes_dim[a])`, axes concatenated.

    Args:
        ids: position of each token on each axis.
        axes_dim: head-dim share of each axis; even, summing to the head dim d; d2 = d / 2.
        theta: base of the frequencies.
    """
    ids = jnp.asarray(ids, jnp.float32)
    if ids.shape[-1] != len(axes_dim):
        raise ValueError(
            f"ids have {ids.shape[-1]} axes, axes_dim {tuple(axes_dim)} names another number"
        )
    parts = []
    for axis, dim in enumerate(axes_dim):
        omega = (theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
        parts.append(ids[:, axis, None] * omega)
    return jnp.concatenate(parts, axis=-1)


def apply_rotary(
    x: Float[Array, "b t h d"], angles: Float[Array, "t d2"]
) -> Float[Array, "b t h d"]:
    """Rotate the interleaved pairs (x[2i], x[2i+1]) by `angles`, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    mask: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b t h d"]:
    """Softmax attention, scale 1/sqrt(d); softmax and accumulation in float32.

    Without a mask, in bfloat16 and float16, a program lowered for CUDA takes cuDNN's fused
    attention, wherever it is lowered: see `cudnn_is_known`. Elsewhere queries are taken in chunks,
    so scores never take more than `MAX_SCORE_BYTES` (or one query's row, if that is larger).

    Args:
        q, k, v: queries, keys, values.
        mask: keys that may be attended to; the others have weight zero exactly, unless none may.
    """
    fused_can = (
        mask is None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] <= 128
        and q.shape[-1] % 8 == 0
    )
    if fused_can and cudnn_is_known():
        return jax.lax.platform_dependent(
            q, k, v, cuda=_fused_attention, default=_chunked_attention
        )
    return _chunked_attention(q, k, v, mask)


@functools.cache
def cudnn_is_known() -> bool:
    """Whether programs for CUDA can hold cuDNN's attention: jax must find cuDNN while tracing.

    So it is with every `jax[cuda12]`, on a machine without a GPU too, where a program can be
    compiled ahead of time. jax looks cuDNN's version up whatever platform it traces for; where it
    finds none (a CPU installation) the fused form cannot even be a branch that is not taken.
    """
    probe = jax.ShapeDtypeStruct((1, 1, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(_fused_attention, probe, probe, probe)
    except RuntimeError:  # "cuDNN is not detected."
        return False
    return True


def _fused_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _chunked_attention(q, k, v, mask=None):
    b, t, h, d = q.shape
    row_bytes = 4 * b * h * k.shape[1]
    chunk = max(1, min(t, MAX_SCORE_BYTES // row_bytes))
    if chunk == t:
        return _full_attention(q, k, v, mask)
    chunks = -(-t // chunk)
    chunk = -(-t // chunks)  # even chunks waste the fewest padded rows
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - t), (0, 0), (0, 0)))
    stacked = padded.reshape(b, chunks, chunk, h, d).swapaxes(0, 1)
    out = jax.lax.map(lambda part: _full_attention(part, k, v, mask), stacked)
    return out.swapaxes(0, 1).reshape(b, chunks * chunk, h, d)[:, :t]


def _full_attention(q, k, v, mask):
    mask = None if mask is None else mask[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def split_heads(
    parts: Sequence[Float[Array, "*b t k"]], heads: int
) -> tuple[Float[Array, "b t h d"], ...]:
    """Each of queries, keys, values, laid out (head, dim), as (b, t, h, d)."""
    b = parts[0].shape[:-2]
    return tuple(x.reshape(math.prod(b), x.shape[-2], heads, -1) for x in parts)


class SelfAttention(nn.Module):
    """Fused qkv, attention of every token to all, output projection.

    Attributes:
        heads: attention heads.
        dtype: of activations and products.
        qk_norm: whether queries and keys are RMS-normalised, per head.
    """

    heads: int
    dtype: Dtype
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*b t k"],
        angles: Float[Array, "t d2"] | None = None,
        *,
        before: ops.Before | None = None,
        gate: Float[Array, "b k"] | None = None,
        residual: Float[Array, "*b t k"] | None = None,
    ) -> Float[Array, "*b t k"]:
        """Attend over the tokens t, at rotary `angles`; all axes before them are batch.

        `before` comes before the first product, `gate` and `residual` after the last: see `Linear`.
        """
        width = x.shape[-1]
        qkv = Linear(3 * width, dtype=self.dtype, name="qkv")
        q, k, v = split_heads(qkv(x, before=before, parts=3 * (width,)), self.heads)
        if self.qk_norm:
            q, k = RMSNorm(self.dtype, name="q_norm")(q), RMSNorm(self.dtype, name="k_norm")(k)
        if angles is not None:
            q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        out = attention(q, k, v).reshape(x.shape)
        return Linear(width, dtype=self.dtype, name="proj")(out, gate=gate, residual=residual)


class CrossAttention(nn.Module):
    """Queries from the tokens, fused keys and values from a context, output projection."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t k"],
        context: Float[Array, "b s c"],
        mask: Bool[Array, "b s"],
        *,
        residual: Float[Array, "b t k"] | None = None,
    ) -> Float[Array, "b t k"]:
        """Attend to the context's tokens that `mask` allows; `residual` is added to the result."""
        b, t, width = x.shape
        q = Linear(width, dtype=self.dtype, name="q_linear")(x).reshape(b, t, self.heads, -1)
        kv = Linear(2 * width, dtype=self.dtype, name="kv_linear")
        k, v = (part.reshape(b, -1, *q.shape[2:]) for part in kv(context, parts=2 * (width,)))
        out = attention(q, k, v, mask).reshape(x.shape)
        return Linear(width, dtype=self.dtype, name="proj")(out, residual=residual)
