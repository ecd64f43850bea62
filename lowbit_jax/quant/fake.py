"""FAKE quantisation: floating-point arithmetic with the numbers that integer codes stand for.

It is neither smaller nor faster than floating point. What it is for: how every kernel is treated is
*data* here, so one compiled program tries any number of treatments. Codes are those of the real
path: weights are quantised by `quantize_kernel` itself, rows by the formula of
`pallas_kernels.reference_rows`; sums are those of a float32 product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from lowbit_jax.quant.qtensor import TransformedKernel
from lowbit_jax.quant.recipe import Rule, WeightSpec
from lowbit_jax.quant.stacks import (
    Tree,
    iter_layers,
    kernels,
    map_kernels,
    map_stacks,
    segments,
)
from lowbit_jax.quant.weights import quantize_kernel

# 1 / qmax by bits, rounded to float32 on the host: a GPU's own division may be off in the last bit
_STEPS = np.array([0, 0, *(1 / (2 ** (bits - 1) - 1) for bits in range(2, 9))], np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuantKernel:
    """A floating kernel whose inputs are fake-quantised per row, to bits that are an array.

    Attributes:
        kernel: (k, n), balanced and rotated or not; layer axes lead, as everywhere. The input is
            masked and rotated before it is quantised.
        act_bits: 2 to 8; 0 leaves the input in floating point. Traced: no bits cost a compilation.
    """

    kernel: Float[Array, "*l k n"] | TransformedKernel
    act_bits: Int32[Array, "*l"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel, layer axes too."""
        return self.kernel.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What one candidate does to a kernel, or to every layer of a stacked one.

    Attributes:
        weights: 0 leaves the kernel as it is, i takes entry i - 1 of the menu.
        act_bits: see `FakeQuantKernel`.
    """

    weights: Int32[Array, "*l"]
    act_bits: Int32[Array, "*l"]


def fake_quantize_rows(x: Float[Array, "... k"], bits: Int32[Array, ""]) -> Float32[Array, "... k"]:
    """Rows rounded to `bits` and scaled back, with the codes of `reference_rows.quantize_rows`.

    Args:
        x: rows.
        bits: 2 to 8, or 0: x itself. May be traced.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    peak = jnp.where(jnp.isnan(x).any(axis=-1, keepdims=True), jnp.nan, peak)
    scale = peak * jnp.asarray(_STEPS)[bits]
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    # no clip: |x| / scale is at most qmax (1 + 2^-22), which rounds to qmax
    return jnp.where(bits > 0, jnp.round(x * (1 / scale)) * scale, x)


def fake_quantize_kernel(
    kernel: Float[Array, "k n"], choice: Int32[Array, ""], menu: Sequence[WeightSpec]
) -> Float32[Array, "k n"]:
    """The kernel that the codes of `menu[choice - 1]` stand for; for 0 the kernel itself.

    A switch, so that what is not chosen is not computed, and the chosen quantiser is the very
    program that makes codes: no second formula has to agree with it.
    """

    def rounded(spec: WeightSpec):
        rule = Rule(match="", weights=spec)
        return lambda w: quantize_kernel(w, rule).dequantize().T

    branches = [lambda w: w.astype(jnp.float32), *(rounded(spec) for spec in menu)]
    return jax.lax.switch(choice, branches, kernel)


def choose(params: Tree, treatments: Mapping[str, tuple[int, int]]) -> dict[str, Choice]:
    """Treatments by layer path as arrays by the kernel's path in the tree.

    Every kernel in whose stack segment a layer is named gets an entry: which keys there are depends
    on the names alone, so candidates over the same names share a compiled program.

    Args:
        params: parameters, or their shapes.
        treatments: (weights, act_bits) of layers, see `Choice`; layers that are not named: (0, 0).

    Raises:
        ValueError: a name that is no linear of the model.
    """
    named = {path for path, _, _ in iter_layers(params)}
    unknown = sorted(set(treatments) - named)
    if unknown:
        raise ValueError(f"{unknown[0]} and {len(unknown) - 1} more are no linears of this model")
    out: dict[str, Choice] = {}

    def note(path: str, layers: list[str], stacked: bool) -> None:
        if any(layer in treatments for layer in layers):
            pairs = [treatments.get(layer, (0, 0)) for layer in layers]
            weights, bits = np.array(pairs, np.int32).T
            out[path] = Choice(weights, bits) if stacked else Choice(weights[0], bits[0])

    def stack(path: tuple[str, ...], node: Tree) -> Tree:
        for first, length, tree in segments(node):
            for linear, _ in kernels(tree):
                names = ["/".join((*path, str(first + i), *linear)) for i in range(length)]
                note("/".join((*path, str(first), *linear)), names, True)
        return node

    def single(path: tuple[str, ...], kernel: Any) -> Any:
        note("/".join(path), ["/".join(path)], False)
        return kernel

    map_stacks(params, stack, single)
    return out


def fake_quantize(
    params: Tree, choices: Mapping[str, Choice], menu: Sequence[WeightSpec]
) -> dict[str, Any]:
    """The tree with a `FakeQuantKernel` for each kernel of `choices`; the rest as it is.

    Pure; jit it with `params` and `choices` as arguments and nothing is compiled again whatever
    the choices are.

    Args:
        params: floating parameters, balanced and rotated or not.
        choices: of `choose`.
        menu: what the weights may be quantised to.
    """

    def fake(path: tuple[str, ...], kernel: Any) -> Any:
        choice = choices.get("/".join(path))
        if choice is None:
            return kernel
        weight = kernel.kernel if isinstance(kernel, TransformedKernel) else kernel
        weight = _fake_layers(weight, jnp.asarray(choice.weights), menu)
        if isinstance(kernel, TransformedKernel):
            weight = replace(kernel, kernel=weight)
        return FakeQuantKernel(weight, jnp.asarray(choice.act_bits))

    return map_kernels(params, fake)


def _fake_layers(kernel, choice: Int32[Array, "*l"], menu: Sequence[WeightSpec]) -> Array:
    """Stacked or not; of a stack one layer at a time, and only what is chosen."""
    if choice.ndim == 0:
        return fake_quantize_kernel(kernel, choice, menu)
    return jax.lax.map(lambda pair: fake_quantize_kernel(pair[0], pair[1], menu), (kernel, choice))
