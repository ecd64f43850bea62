"""Latent weights: floating-point numbers behind ternary codes, so that codes can be trained.

    q = s * clip(round(w / s), -1, 1),   s = exp(growth) * base, for each output

Forward and backward differ: the gradient of q goes straight through to w, as if q were w (Bengio et
al. 2013), and to s as that of s * codes with the codes constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lowbit_jax.quant import quantizers
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, is_qtensor
from lowbit_jax.quant.stacks import Tree
from lowbit_jax.quant.weights import transform_weight
from pallas_kernels.formats import pack_codes

MARGIN = 0.02  # of a scale: how far a latent weight starts from where its code would be another
ITERATIONS = 8  # of the fixed point that gives the least-squares scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Latent:
    """A ternary kernel in training; stands where the kernel does, in its orientation.

    Attributes:
        weight: latent weights, balanced and rotated where the kernel is.
        base: scale of each output at the start; None for the least-squares scale of `weight`,
            computed anew in every forward.
        growth: logarithm of how much the scale has grown; exactly where there is a `base`.
        form: the `QTensor` it becomes, but for codes and scales: what happens to its input.
    """

    weight: Float32[Array, "... k n"]
    form: QTensor
    base: Float32[Array, "... 1 n"] | None = None
    growth: Float32[Array, "... 1 n"] | None = None

    def value(self) -> Float32[Array, "... k n"] | TransformedKernel:
        """The kernel it stands for, with gradients as above."""
        weight = self.weight
        scale, codes = self._scale_and_codes()
        kernel = scale * codes + (weight - jax.lax.stop_gradient(weight))
        if self.form.mask is None and self.form.rotation is None:
            return kernel
        return TransformedKernel(kernel, self.form.mask, self.form.rotation)

    def tensor(self) -> QTensor:
        """The `QTensor` it stands for."""
        scale, codes = self._scale_and_codes()
        stored = jnp.swapaxes(codes, -1, -2).astype(jnp.int8)
        return dataclasses.replace(
            self.form, codes=pack_codes(stored, "ternary"), scale=jnp.swapaxes(scale, -1, -2)
        )

    def _scale_and_codes(self):
        weight = jax.lax.stop_gradient(self.weight)
        if self.base is None or self.growth is None:
            scale = _least_squares_scale(weight)
        else:
            scale = self.base * jnp.exp(self.growth)
        codes = jnp.clip(jnp.round(weight / jax.lax.stop_gradient(scale)), -1, 1)
        return scale, codes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """A quantised kernel whose scales are in training and whose codes are not: nothing is unpacked.

    Attributes:
        tensor: as it was; any format.
        growth: logarithm of how much each scale has grown.
    """

    tensor: QTensor
    growth: Float32[Array, "... n g"]

    def value(self) -> QTensor:
        """The kernel it stands for; `ops.linear` has the gradient."""
        return dataclasses.replace(self.tensor, scale=self.tensor.scale * jnp.exp(self.growth))


def _least_squares_scale(weight: Float[Array, "... k n"]) -> Float[Array, "... 1 n"]:
    """Scales for which round(w / s) has s as its least-squares scale: those of the fixed point."""

    def one(kernel):
        fixed = quantizers.least_squares_fixed_point(kernel.T, iterations=ITERATIONS)
        return fixed[1].T

    flat = weight.reshape(-1, *weight.shape[-2:])
    return jax.vmap(one)(flat).reshape(*weight.shape[:-2], 1, weight.shape[-1])


def latents(params: Tree, quantized: Tree, *, exact_scale: bool = False) -> dict[str, Any]:
    """The quantised tree with a `Latent` in place of every ternary kernel with a scale per output.

    Latent weights are the float ones, moved where needed, and as little as needed, to give the
    codes of `quantized`: what error feedback or reconstruction found is where training starts.

    Args:
        params: float parameters.
        quantized: the same tree quantised; its stacks may be cut otherwise.
        exact_scale: latent weights are the float ones, and scales their least-squares ones.

    Raises:
        ValueError: stacks that are cut otherwise than those of `params`.
    """

    def start(tensor, kernel):
        if not is_qtensor(tensor) or tensor.format != "ternary":
            return tensor
        if tensor.scale.shape[-2:] != (tensor.shape[0], 1):
            return tensor
        weight = _transformed(jnp.asarray(kernel, jnp.float32), tensor)
        form = dataclasses.replace(tensor, codes=None, scale=None)
        if exact_scale:
            return Latent(weight=weight, form=form)
        codes = jnp.swapaxes(tensor.unpacked(), -1, -2)
        scale = jnp.swapaxes(tensor.scale, -1, -2)
        inside, outside = 0.5 - MARGIN, 0.5 + MARGIN
        low = jnp.where(codes == 1, outside, jnp.where(codes == 0, -inside, -jnp.inf))
        high = jnp.where(codes == -1, -outside, jnp.where(codes == 0, inside, jnp.inf))
        return Latent(
            weight=jnp.clip(weight, low * scale, high * scale),
            base=scale,
            growth=jnp.zeros_like(scale),
            form=form,
        )

    return jax.tree.map(start, quantized, params, is_leaf=is_qtensor)


def _transformed(kernel: Float[Array, "... k n"], tensor: QTensor) -> Float[Array, "... k n"]:
    """Float weights as the codes of `tensor` are: for inputs that are masked and rotated."""
    weight = jnp.swapaxes(kernel, -1, -2)
    mask = None if tensor.mask is None else tensor.mask[..., None, :]
    return jnp.swapaxes(transform_weight(weight, mask, tensor.rotation), -1, -2)


def rescaled(quantized: Tree) -> dict[str, Any]:
    """The quantised tree with a `Rescaled` in place of every quantised kernel."""

    def start(leaf):
        if not is_qtensor(leaf):
            return leaf
        return Rescaled(tensor=leaf, growth=jnp.zeros_like(leaf.scale))

    return jax.tree.map(start, quantized, is_leaf=is_qtensor)


def values(tree: Tree) -> dict[str, Any]:
    """The tree as the model takes it while it is trained: kernels with gradients."""
    return _map(tree, lambda node: node.value())


def tensors(tree: Tree) -> dict[str, Any]:
    """The tree with the `QTensor`s that its nodes stand for: training is over."""
    return _map(tree, lambda node: node.tensor() if isinstance(node, Latent) else node.value())


def _map(tree: Tree, fn: Callable[[Any], Any]) -> dict[str, Any]:
    def trained(node: Any) -> bool:
        return isinstance(node, Latent | Rescaled)

    return jax.tree.map(lambda node: fn(node) if trained(node) else node, tree, is_leaf=trained)
