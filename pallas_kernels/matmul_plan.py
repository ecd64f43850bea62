"""What is settled about a matmul kernel before it is traced: its tile, and how k is cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels import packing, unpack
from pallas_kernels.dispatch import DEFAULT_GENERATION, generation
from pallas_kernels.formats import FORMATS
from pallas_kernels.operands import Operands
from pallas_kernels.tile_table import TILES
from pallas_kernels.tiles import Tile


@dataclass(frozen=True)
class Spec:
    """What a program knows while it is traced.

    Attributes:
        m: rows of x.
        n: output channels.
        k: contraction.
        format: of the weights.
        group: inputs that share a scale; None: all of them.
        part: inputs that are summed before they are scaled: a step of the tile, or a group where
            that is less; None: all of them.
        base: what is taken off every stored code, zero points apart.
        rows_per_gate: rows of x that one row of the gate serves.
        tile: the tile.
        interpret: whether the body runs as plain JAX.
    """

    m: int
    n: int
    k: int
    format: str
    group: int | None
    part: int | None
    base: int
    rows_per_gate: int
    tile: Tile
    interpret: bool

    @staticmethod
    def of(operands: Operands, tile: Tile, interpret: bool) -> Spec:
        """The spec of a product.

        Raises:
            ValueError: a tile that the format or its groups do not allow.
            NotImplementedError: groups that cut a run of the packing.
        """
        m, k = operands.x.shape
        return Spec(
            m=m,
            n=operands.w.shape[0],
            k=k,
            format=operands.format,
            group=operands.group,
            part=_part(operands.format, operands.group, tile),
            base=unpack.base(operands.format, operands.x.dtype == jnp.int8),
            rows_per_gate=m if operands.gate is None else m // operands.gate.shape[0],
            tile=tile,
            interpret=interpret,
        )

    @property
    def step_bytes(self) -> int:
        """Bytes of a row of weights in one step of the tile."""
        return self.tile.k * FORMATS[self.format].bits // 8


def choose_tile(operands: Operands, gpu: str | None = None) -> Tile:
    """The tile of `tile_table` for these operands.

    Args:
        operands: the arrays' shapes and dtypes decide.
        gpu: a generation, "sm_80"; None: this process's GPU, without one the A100. A generation
            that the table lacks takes the A100's tiles.
    """
    acts = "a8" if operands.x.dtype == jnp.int8 else "a16"
    op = f"{operands.format}_{acts}" + ("" if operands.group is None else "_grouped")
    table = TILES.get(gpu or generation(), TILES[DEFAULT_GENERATION])[op]
    tile = next(tile for most, tile in table if operands.x.shape[0] <= most)
    group = operands.group
    if operands.format == "int8" and group in (32, 64) and group < tile.k:
        return dataclasses.replace(tile, k=group)  # a step is a group
    return tile


def gate_fits(operands: Operands, tile: Tile) -> bool:
    """Whether no tile holds rows of two batch entries with gates of their own."""
    gate = operands.gate
    return gate is None or len(gate) == 1 or (operands.x.shape[0] // len(gate)) % tile.m == 0


def _part(format: str, group: int | None, tile: Tile) -> int | None:
    if format in unpack.RUN and tile.k != packing.BLOCK:
        raise ValueError(f"tile.k must be {packing.BLOCK} for {format}, got {tile.k}")
    if group is None:
        return None
    if tile.k > packing.BLOCK:
        raise ValueError(f"tile.k must be at most {packing.BLOCK} for groups, got {tile.k}")
    run = unpack.RUN.get(format, tile.k)
    if group % tile.k and (tile.k % group or group % run):
        raise NotImplementedError(
            f"groups of {group} are neither whole steps of {tile.k} nor whole runs of {run} in one"
        )
    return min(group, tile.k)
