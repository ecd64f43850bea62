"""One program's row, walked in blocks, and what becomes of it before it is quantised."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import row_math, tiles

Read = Callable[[Any], Float32[Array, "1 c"]]
"""A block of the row, by its number; 0 behind the row's end."""

MAX_KEPT = 9  # blocks of a row that stay in registers: 9 x 128 is 1152, 9 x 512 is 4608


@dataclasses.dataclass(frozen=True)
class Walk:
    """A row in blocks.

    Attributes:
        k: its length.
        width: values of a block, a power of two.
    """

    k: int
    width: int

    @property
    def steps(self) -> int:
        """Number of blocks."""
        return -(-self.k // self.width)

    def load(self, ref, i) -> Float32[Array, "1 c"]:
        """Block i of an array [1, k]."""
        x = tiles.load(ref, (1, self.k), 0, i * self.width, (1, self.width))
        return x.astype(jnp.float32)

    def store(self, ref, i, value) -> None:
        """Writes block i of an array [1, k]."""
        tiles.store(ref, (1, self.k), 0, i * self.width, value)

    def inside(self, i, x) -> Float32[Array, "1 c"]:
        """Block i with 0 behind the row's end."""
        if self.k % self.width == 0:
            return x
        column = i * self.width + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(column < self.k, x, 0.0)

    def kept(self, read: Read) -> Read:
        """`read`, where the row is few blocks: each computed once and kept in registers."""
        if self.steps > MAX_KEPT:
            return read
        return [read(i) for i in range(self.steps)].__getitem__

    def total(self, combine: Callable, read: Callable):
        """The blocks combined elementwise, first to last: one block."""
        if self.steps <= MAX_KEPT:
            return functools.reduce(combine, map(read, range(self.steps)))
        return jax.lax.fori_loop(1, self.steps, lambda i, x: combine(x, read(i)), read(0))


def identity(walk: Walk, refs: dict, *, eps: float, interpret: bool) -> Read:
    """The row as it is."""
    return lambda i: walk.load(refs["x"], i)


def gelu(walk: Walk, refs: dict, *, eps: float, interpret: bool) -> Read:
    """`row_math.gelu` of the row."""
    return lambda i: row_math.gelu(walk.load(refs["x"], i), interpret)


def modulate(walk: Walk, refs: dict, *, eps: float, interpret: bool) -> Read:
    """`(1 + scale) * layer_norm(x, eps) + shift`, the mean taken off before the squares are."""
    share = jnp.float32(1 / walk.k)
    x = walk.kept(lambda i: walk.load(refs["x"], i))
    mean = row_math.over_row(jnp.sum, walk.total(jnp.add, x)) * share
    centred = walk.kept(lambda i: walk.inside(i, x(i) - mean))
    squares = walk.total(jnp.add, lambda i: jnp.square(centred(i)))
    variance = row_math.over_row(jnp.sum, squares) * share
    # an infinite variance would make zeros of a row that is anything but
    inverse = jnp.where(variance < jnp.inf, jax.lax.rsqrt(variance + eps), jnp.nan)

    def read(i):
        scale, shift = walk.load(refs["scale"], i), walk.load(refs["shift"], i)
        return centred(i) * inverse * (1 + scale) + shift

    return read
