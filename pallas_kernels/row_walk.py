"""One program's rows, walked in blocks of columns, and what becomes of them before quantising."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import row_math, tiles

Read = Callable[[Any], Float32[Array, "r c"]]
"""A block of the rows, by its number; 0 behind the rows' ends."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """The rows of one program; a row is one block or several.

    Attributes:
        size: (t, k) of the whole array.
        block: (rows, block_k), what is computed on at once.
        row: the first of the rows.
    """

    size: tuple[int, int]
    block: tuple[int, int]
    row: Any

    @property
    def steps(self) -> int:
        """Blocks in a row."""
        return -(-self.size[1] // self.block[1])

    def load(self, ref, i):
        """Block i of the rows of an array [t, k], in float32."""
        x = tiles.load(ref, self.size, self.row, i * self.block[1], self.block)
        return x.astype(jnp.float32)

    def load_channels(self, ref, i):
        """Block i of an array [1, k], the same for all rows, in float32."""
        _, columns = self.block
        x = tiles.load(ref, (1, self.size[1]), 0, i * columns, (1, columns))
        return x.astype(jnp.float32)

    def store(self, ref, i, value) -> None:
        """Writes block i of the rows of an array [t, k]."""
        tiles.store(ref, self.size, self.row, i * self.block[1], value)

    def inside(self, i, x):
        """`x` with 0 behind the rows' ends."""
        (_, k), (_, columns) = self.size, self.block
        if k % columns == 0:
            return x
        column = i * columns + jax.lax.broadcasted_iota(jnp.int32, self.block, 1)
        return jnp.where(column < k, x, 0.0)

    def fold(self, f: Callable, start):
        """`f(i, carry)` over the blocks of the rows."""
        return f(0, start) if self.steps == 1 else jax.lax.fori_loop(0, self.steps, f, start)

    def kept(self, read: Read) -> Read:
        """`read`, computed once where a row is one block: it stays in registers."""
        if self.steps > 1:
            return read
        only = read(0)
        return lambda _: only


def identity(walk: Walk, refs: dict, eps: float) -> Read:
    """The rows as they are."""
    return lambda i: walk.load(refs["x"], i)


def gelu(walk: Walk, refs: dict, eps: float) -> Read:
    """`row_math.gelu` of the rows."""
    return lambda i: row_math.gelu(walk.load(refs["x"], i))


def modulate(walk: Walk, refs: dict, eps: float) -> Read:
    """`(1 + scale) * layer_norm(x, eps) + shift`, the mean taken off before the squares are."""
    k = walk.size[1]
    x = walk.kept(lambda i: walk.load(refs["x"], i))

    def mean(read):
        add = lambda i, total: total + jnp.sum(read(i), axis=1, keepdims=True)  # noqa: E731
        return walk.fold(add, jnp.zeros((walk.block[0], 1), jnp.float32)) * jnp.float32(1 / k)

    average = mean(x)
    centred = walk.kept(lambda i: walk.inside(i, x(i) - average))
    variance = mean(lambda i: jnp.square(centred(i)))
    # an infinite variance would make zeros of a row that is anything but
    inverse = jnp.where(variance < jnp.inf, jax.lax.rsqrt(variance + eps), jnp.nan)

    def read(i):
        factor, shift = (walk.load_channels(refs[name], i) for name in ("scale", "shift"))
        return centred(i) * inverse * (1 + factor) + shift

    return read
