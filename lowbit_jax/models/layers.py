"""Layers shared by every network: `Linear`, norms, embeddings, attention, stacks of blocks.

Shape letters: b batch, t tokens, k in-features, n out-features, h heads, d head dim, l layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from lowbit_jax import ops
from pallas_kernels import api
from pallas_kernels.rows import QuantizedRows

Dtype = Any

# One chunk of attention scores (float32) stays below this, whatever the number of tokens.
MAX_SCORE_BYTES = 64 * 2**20


class Linear(nn.Module):
    """`x @ kernel + bias`; `kernel` is a float array (k, n) or a `QTensor` that stands for one.

    The one layer of every quantisable matrix: `ops.linear` dispatches on the type of the kernel, so
    quantising a model means replacing leaves of its parameter tree and nothing else.

    Attributes:
        features: n, the number of output features.
        use_bias: whether a bias (n,) is added.
        dtype: dtype the product is computed and returned in; accumulation is float32.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... k"],
        *,
        before: ops.Before | None = None,
        gate: Float[Array, "b n"] | None = None,
        residual: Float[Array, "... n"] | None = None,
    ) -> Float[Array, "... n"]:
        """`residual + gate * (before(x) @ kernel + bias)`; what is None is left out.

        Said here, and not around the layer, so that a quantised product can do it in one kernel.

        Raises:
            ValueError: the stored kernel does not fit, with both shapes.
        """
        k, n = x.shape[-1], self.features
        kernel = self._leaf("kernel", nn.initializers.lecun_normal(), (k, n))
        bias = self._leaf("bias", nn.initializers.zeros, (n,)) if self.use_bias else None
        x = x.astype(self.dtype)
        return ops.linear(x, kernel, bias, before=before, gate=gate, residual=residual)

    def _leaf(self, name: str, init: Callable, shape: tuple[int, ...]):
        """A parameter that may hold a QTensor (`self.param` alone rejects packed leaves)."""
        if not self.has_variable("params", name):
            return self.param(name, init, shape, jnp.float32)
        value: Any = self.get_variable("params", name)
        found = ops.logical_shape(value)
        if found != shape:
            path = "/".join((*self.path, name))
            raise ValueError(f"{path}: stored shape {found}, the layer needs {shape}")
        return value


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b k"]) -> Float[Array, "b n"]:
        """Embed a vector."""
        hidden = nn.silu(Linear(self.features, dtype=self.dtype, name="in_layer")(x))
        return Linear(self.features, dtype=self.dtype, name="out_layer")(hidden)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (eps 1e-6), learned scale."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (x32 * scale.astype(jnp.float32)).astype(self.dtype)


def layer_norm(x: Float[Array, "... k"], eps: float = 1e-6) -> Float[Array, "... k"]:
    """LayerNorm without affine parameters, statistics in float32, result in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def modulate(
    x: Float[Array, "b t k"],
    shift: Float[Array, "b k"],
    scale: Float[Array, "b k"],
    eps: float = 1e-6,
) -> Float[Array, "b t k"]:
    """AdaLN: `(1 + scale) * layer_norm(x, eps) + shift` (Peebles & Xie 2023, section 3.2)."""
    return layer_norm(x, eps) * (1 + scale[:, None]) + shift[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaLN:
    """`modulate` before a product: `Linear(...)(x, before=AdaLN(shift, scale))`.

    Attributes:
        shift: added, one value per channel of each batch entry.
        scale: multiplied, as 1 + scale.
        eps: of the norm.
    """

    shift: Float[Array, "b k"]
    scale: Float[Array, "b k"]
    eps: float = field(default=1e-6, metadata={"static": True})

    def __call__(self, x: Float[Array, "b t k"]) -> Float[Array, "b t k"]:
        """In floating point."""
        return modulate(x, self.shift, self.scale, self.eps)

    def quantize_rows(self, x: Float[Array, "b t k"], bits: int) -> QuantizedRows:
        """In one pass with the quantisation; float32 up to the codes."""
        return api.modulate_quantize_rows(x, self.shift, self.scale, bits, eps=self.eps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gelu:
    """`gelu_tanh` before a product: `Linear(...)(hidden, before=Gelu())`."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """In floating point."""
        return gelu_tanh(x)

    def quantize_rows(self, x: Float[Array, "... k"], bits: int) -> QuantizedRows:
        """In one pass with the quantisation; float32 up to the codes."""
        return api.gelu_quantize_rows(x, bits)


def timestep_embedding(
    t: Float[Array, "b"], dim: int = 256, *, scale: float = 1000.0, shift: int = 0
) -> Float[Array, "b dim"]:
    """Sinusoids of `scale * t` at frequencies 10000^(-i / (dim/2 - shift)); [cos, sin], float32.

    Equals diffusers' `Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=shift)` fed with
    `scale * t`. The defaults are FLUX's, for `t` in [0, 1].
    """
    half = dim // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - shift)).astype(np.float32)
    angles = scale * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


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
    q: Float[Array, "b t h d"], k: Float[Array, "b s h d"], v: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Softmax attention, scale 1/sqrt(d), no mask; softmax and accumulation in float32.

    In bfloat16 and float16 a program lowered for CUDA takes cuDNN's fused attention, wherever it is
    lowered: see `cudnn_is_known`. Elsewhere queries are taken in chunks, so the scores never take
    more than `MAX_SCORE_BYTES` (or one query's row, if that is larger).
    """
    fused_can = (
        q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    )
    if fused_can and cudnn_is_known():
        return jax.lax.platform_dependent(
            q, k, v, cuda=_fused_attention, default=_chunked_attention
        )
    return _chunked_attention(q, k, v)


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


def _chunked_attention(q, k, v):
    b, t, h, d = q.shape
    row_bytes = 4 * b * h * k.shape[1]
    chunk = max(1, min(t, MAX_SCORE_BYTES // row_bytes))
    if chunk == t:
        return _full_attention(q, k, v)
    chunks = -(-t // chunk)
    chunk = -(-t // chunks)  # even chunks waste the fewest padded rows
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - t), (0, 0), (0, 0)))
    stacked = padded.reshape(b, chunks, chunk, h, d).swapaxes(0, 1)
    out = jax.lax.map(lambda part: _full_attention(part, k, v), stacked)
    return out.swapaxes(0, 1).reshape(b, chunks * chunk, h, d)[:, :t]


def _full_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def split_heads(qkv: Float[Array, "b t k3"], heads: int) -> tuple[Array, Array, Array]:
    """Split fused `[q, k, v]`, each laid out (head, dim), into three (b, t, h, d)."""
    b, t, _ = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, heads, -1), 2, 0)
    return q, k, v


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in its tanh form, in float32 as torch computes it (on a CPU four times as fast)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class BlockStack(nn.Module):
    """`length` equal blocks whose parameters are stacked along a leading layer axis and scanned.

    The parameters are `{first layer: block parameters [l, ...]}`: one entry per *segment*, a run of
    consecutive layers whose trees have the same structure and static formats. A float model is one
    segment `{"0": ...}`; a mixed-precision one is a short list of them. Compile time grows with the
    number of segments, not of layers.

    Attributes:
        make_block: builds one unbound block (`parent=None`); called `block(*carry, *constants)`,
            it returns the next carry (a tuple).
        length: number of layers.
        remat: keep only each layer's input for the backward pass and compute the rest again.
    """

    make_block: Callable[[], nn.Module]
    length: int
    remat: bool = False

    @nn.compact
    def __call__(self, carry: tuple, *constants) -> tuple:
        """Run `carry` through all layers; `constants` are the same for each."""
        if self.length == 0:
            return carry
        block = self.make_block()
        if self.is_initializing():
            self.param("0", self._init_stack, block, carry, constants)
        segments = self.variables["params"]
        self._check_lengths(segments)

        def step(carry, params):
            return block.apply({"params": params}, *carry, *constants), None

        if self.remat:
            step = jax.checkpoint(step)
        for first in sorted(segments, key=int):
            carry, _ = jax.lax.scan(step, carry, segments[first])
        return carry

    def _init_stack(self, rng, block, carry, constants):
        init = lambda key: block.init(key, *carry, *constants)["params"]  # noqa: E731
        return jax.vmap(init)(jax.random.split(rng, self.length))

    def _check_lengths(self, segments) -> None:
        at = 0
        for first in sorted(segments, key=int):
            length = jax.tree.leaves(segments[first])[0].shape[0]
            if int(first) != at:
                raise ValueError(
                    f"{'/'.join(self.path)}: segment '{first}' stands where layer {at} begins"
                )
            at += length
        if at != self.length:
            raise ValueError(
                f"{'/'.join(self.path)}: parameters hold {at} layers, the model has {self.length}"
            )
