"""Layers shared by every network: `Linear`, norms, embeddings, attention, stacks of blocks.

Shape letters: b batch, t tokens, k in-features, n out-features, h heads, d head dim, l layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32

from lowbit_jax import ops
from lowbit_jax.models.scan import scan_layers
from lowbit_jax.ops import over_tokens
from pallas_kernels import api
from pallas_kernels.rows import QuantizedRows

Dtype = Any


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
        x: Float[Array, "... k"] | tuple[Array, ...] | list[Array],
        *,
        before: ops.Before | None = None,
        gate: Float[Array, "b n"] | None = None,
        residual: Float[Array, "... n"] | None = None,
        parts: tuple[int, ...] | None = None,
    ) -> Any:
        """`residual + gate * (before(x) @ kernel + bias)`; what is None is left out.

        Said here, and not around the layer, so that a quantised product can do it in one kernel.
        An input, and an output, may be in parts: see `ops.linear`.

        Raises:
            ValueError: the stored kernel does not fit, with both shapes.
        """
        k, n = ops.width(x), self.features
        kernel = self._leaf("kernel", nn.initializers.lecun_normal(), (k, n))
        bias = self._leaf("bias", nn.initializers.zeros, (n,)) if self.use_bias else None
        x = jax.tree.map(lambda part: part.astype(self.dtype), x)
        after: dict[str, Any] = {"gate": gate, "residual": residual, "parts": parts}
        return ops.linear(x, kernel, bias, before=before, **after)

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
    x: Float[Array, "b ... t k"],
    shift: Float[Array, "b ... k"],
    scale: Float[Array, "b ... k"],
    eps: float = 1e-6,
) -> Float[Array, "b ... t k"]:
    """AdaLN: `(1 + scale) * layer_norm(x, eps) + shift` (Peebles & Xie 2023, section 3.2).

    `shift` and `scale` are vectors per sample or per frame, see `ops.over_tokens`.
    """
    return layer_norm(x, eps) * (1 + over_tokens(scale, x)) + over_tokens(shift, x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaLN:
    """`modulate` before a product: `Linear(...)(x, before=AdaLN(shift, scale))`.

    Attributes:
        shift: added, one vector per sample or per frame.
        scale: multiplied, as 1 + scale.
        eps: of the norm.
    """

    shift: Float[Array, "b ... k"]
    scale: Float[Array, "b ... k"]
    eps: float = field(default=1e-6, metadata={"static": True})
    elementwise: ClassVar[bool] = False  # a norm is of whole rows

    def __call__(self, x: Float[Array, "b ... t k"]) -> Float[Array, "b ... t k"]:
        """In floating point."""
        return modulate(x, self.shift, self.scale, self.eps)

    def quantize_rows(
        self,
        x: Float[Array, "b ... t k"],
        bits: int,
        mask: Float32[Array, "k"] | None = None,
        rotation: int | None = None,
    ) -> QuantizedRows:
        """In one pass with the quantisation; float32 up to the codes."""
        shift, scale = (vectors.reshape(-1, x.shape[-1]) for vectors in (self.shift, self.scale))
        tokens = x.reshape(len(shift), -1, x.shape[-1])
        rows = api.modulate_quantize_rows(
            tokens, shift, scale, bits, eps=self.eps, mask=mask, rotation=rotation
        )
        return QuantizedRows(*(part.reshape(*x.shape[:-1], -1) for part in rows))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gelu:
    """`gelu_tanh` before a product: `Linear(...)(hidden, before=Gelu())`."""

    elementwise: ClassVar[bool] = True

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """In floating point."""
        return gelu_tanh(x)

    def quantize_rows(
        self,
        x: Float[Array, "... k"],
        bits: int,
        mask: Float32[Array, "k"] | None = None,
        rotation: int | None = None,
    ) -> QuantizedRows:
        """In one pass with the quantisation; float32 up to the codes."""
        return api.gelu_quantize_rows(x, bits, mask, rotation)


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


class MLP(nn.Module):
    """Linear to `hidden`, tanh GELU, Linear to `features`."""

    hidden: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... k"],
        *,
        before: ops.Before | None = None,
        gate: Float[Array, "b ... n"] | None = None,
        residual: Float[Array, "... n"] | None = None,
    ) -> Float[Array, "... n"]:
        """Apply to every token.

        `before` comes before the first product, `gate` and `residual` after the last: see `Linear`.
        """
        hidden = Linear(self.hidden, dtype=self.dtype, name="fc1")(x, before=before)
        out = Linear(self.features, dtype=self.dtype, name="fc2")
        return out(hidden, before=Gelu(), gate=gate, residual=residual)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in its tanh form, in float32 as torch computes it (on a CPU four times as fast)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class BlockStack(nn.Module):
    """`length` blocks whose parameters are stacked along a leading layer axis and scanned.

    The parameters are `{first layer: block parameters [l, ...]}`: one entry per *segment*, a run of
    consecutive layers whose trees have the same structure and static formats. A float model of
    equal blocks is one segment `{"0": ...}`; one of several kinds of blocks, or of mixed precision,
    is a short list of them. Compile time grows with the number of segments, not of layers.

    What modules in the blocks `sow` into "intermediates" comes out where that collection is mutable
    (`apply(..., mutable=["intermediates"])`): under the same names, stacked along the layer axis.

    Attributes:
        make_block: the unbound block (`parent=None`) of a layer; called `block(*carry,
            *constants)`, it returns the next carry (a tuple). Layers whose blocks are equal (Flax
            compares their fields) may share a segment.
        length: number of layers.
        remat: keep only each layer's input for the backward pass and compute the rest again.
    """

    make_block: Callable[[int], nn.Module]
    length: int
    remat: bool = False

    @nn.compact
    def __call__(self, carry: tuple, *constants, layers: Any = None) -> tuple:
        """Run `carry` through all layers; `constants` are the same for each.

        `layers` is a tree of what each has of its own, stacked along a leading layer axis; a block
        gets its entry behind the constants.
        """
        if self.length == 0:
            return carry
        blocks = [self.make_block(layer) for layer in range(self.length)]
        if self.is_initializing():
            self._init_segments(blocks, carry, constants)
        segments = self.variables["params"]
        self._check_segments(segments, blocks)

        sown = ["intermediates"] if self.is_mutable_collection("intermediates") else False

        for first in sorted(segments, key=int):

            def step(carry, layer, block=blocks[int(first)]):
                params, *own = layer
                out = block.apply({"params": params}, *carry, *constants, *own, mutable=sown)
                return out if sown else (out, None)

            scanned = jax.checkpoint(step) if self.remat else step
            stack = (segments[first], *_own_layers(layers, int(first), segments[first]))
            carry, found = scan_layers(scanned, carry, stack)
            if found:
                self.put_variable("intermediates", first, found["intermediates"])
        return carry

    def _init_segments(self, blocks, carry, constants) -> None:
        def init_stack(rng, block, length):
            init = lambda key: block.init(key, *carry, *constants)["params"]  # noqa: E731
            return jax.vmap(init)(jax.random.split(rng, length))

        first = 0
        for block, run in groupby(blocks):
            length = len(list(run))
            self.param(str(first), init_stack, block, length)
            first += length

    def _check_segments(self, segments, blocks) -> None:
        path = "/".join(self.path)
        at = 0
        for first in sorted(segments, key=int):
            if int(first) != at:
                raise ValueError(f"{path}: segment '{first}' stands where layer {at} begins")
            length = jax.tree.leaves(segments[first])[0].shape[0]
            for layer in range(at + 1, min(at + length, self.length)):
                if blocks[layer] != blocks[at]:
                    raise ValueError(
                        f"{path}: segment '{first}' holds layers {at} to {at + length - 1}, but "
                        f"layer {layer} is of another kind; cut the segment there"
                    )
            at += length
        if at != self.length:
            raise ValueError(f"{path}: parameters hold {at} layers, the model has {self.length}")


def _own_layers(layers: Any, first: int, segment: Any) -> tuple:
    """What the layers of a segment have of their own; empty where none has."""
    if layers is None:
        return ()
    length = jax.tree.leaves(segment)[0].shape[0]
    return (jax.tree.map(lambda leaf: leaf[first : first + length], layers),)
