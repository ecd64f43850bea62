"""What more levels would give, labelled for what they are: no format of the library stores them.

Floating weights that lie on the grid of each neighbour, a scale per output, found as the feedback
rung finds ternary codes: error feedback with the same X^T X, the scale re-fitted as often. FAKE
quantisation: bits and bytes are what such a format would store, codes packed without a gap.

* four levels, -2 to 1: all patterns of the two bits that ternary codes are stored in, of which
  those leave one unused. The sign of a row's scale says which side has the extra level.
* nine levels, -4 to 4: two planes of trits, a + 3 b, 3.17 bits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.evidence import Outcome
from benchmarks.ternary_rungs import CALIBRATION_SEED, FEEDBACK, Workshop
from lowbit_jax.quant import feedback
from lowbit_jax.quant.quantizers import Codes
from lowbit_jax.quant.recipe import BLOCK_LINEARS
from lowbit_jax.quant.stacks import iter_layers, map_kernels, map_stacks, segments

FRACTIONS = 40  # of a row's absmax that are tried as its largest level
SCALE_BITS = 32  # of an output, as ternary ones are stored


@dataclass(frozen=True)
class Neighbour:
    """A uniform grid.

    Attributes:
        low: smallest code.
        high: largest code.
        bits: of a code, as stored.
    """

    low: int
    high: int
    bits: float


NEIGHBOURS = {
    "four levels (fake)": Neighbour(-2, 1, 2.0),
    "two trit planes (fake)": Neighbour(-4, 4, 2 * math.log2(3)),
}


def on_grid(shop: Workshop, grid: Neighbour) -> Any:
    """The float model with the weights of all block linears on a grid."""
    grams = shop.grams(shop.sizes.gram_prompts, CALIBRATION_SEED, held_out=False)

    def stack(path: tuple[str, ...], stack: Any) -> dict[str, Any]:
        out = {}
        for first, length, tree in segments(stack):

            def fit(linear: tuple[str, ...], kernel: Any, first=first, length=length) -> Any:
                names = ["/".join((*path, str(first + i), *linear)) for i in range(length)]
                return jnp.stack([_fit(kernel[i], grams[n], grid) for i, n in enumerate(names)])

            out[str(first)] = map_kernels(tree, fit)
        return out

    return map_stacks(shop.params, stack, lambda _, kernel: kernel)


@partial(jax.jit, static_argnames="grid")
def _fit(kernel: Float[Array, "k n"], gram: Float[Array, "k k"], grid: Neighbour) -> Array:
    w = kernel.T
    factor = feedback.factorize(gram / jnp.mean(jnp.diagonal(gram)), act_order=FEEDBACK.act_order)
    levels = grid.low, grid.high
    start = least_error(w, *levels)
    codes, scale, _ = feedback.fit(w, factor, start, refits=FEEDBACK.refits, levels=levels)
    return (scale * codes).T


def least_error(w: Float[Array, "n k"], low: int, high: int) -> Codes:
    """Codes low to high and a scale per row, the one of many with the least squared error.

    Negative scales too where the grid is not symmetric.
    """
    signs = (1.0,) if low == -high else (1.0, -1.0)
    tried = jnp.array([s * (i + 1) / FRACTIONS for i in range(FRACTIONS) for s in signs])
    most = jnp.max(jnp.abs(w), axis=1, keepdims=True) / max(-low, high)

    def codes(scale: Array) -> Array:
        return jnp.clip(jnp.round(w / scale), low, high)

    def error(fraction: Array) -> Array:
        scale = fraction * jnp.where(most == 0, 1, most)
        return jnp.sum(jnp.square(w - scale * codes(scale)), axis=1)

    best = tried[jnp.argmin(jax.lax.map(error, tried), axis=0)][:, None]
    scale = best * jnp.where(most == 0, 1, most)
    return codes(scale).astype(jnp.int8), scale, None


def as_if_stored(outcome: Outcome, params: Any, grid: Neighbour) -> Outcome:
    """The outcome with the bits that the grid's codes and scales would take."""
    total, block = 0, 0
    for path, kernel, _ in iter_layers(params):
        k, n = kernel.shape[-2:]
        if re.fullmatch(BLOCK_LINEARS, path):
            block += k * n
            total += grid.bits * k * n + SCALE_BITS * n
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    total += 16 * (count - block)
    return dataclasses.replace(outcome, bits=total / count, bytes=round(total / 8))
