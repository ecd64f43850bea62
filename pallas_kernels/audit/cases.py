"""What is audited: every op at the layer shapes of the networks, with the tile it chooses there.

A new op is one entry of `OPS`. The tile comes from where the op itself takes it, by m and the GPU's
generation, so that the audit compiles what a GPU would run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import int8_matmul, packing, quantize_rows, ternary_matmul
from pallas_kernels.tiles import Tile

FEW_ROWS = 16  # up to here a matrix product is bound by reading its weights

# (k, n) of the linears, and the rows they meet: tokens, or 1 for what is computed once per sample.
# DiT-XL/2 at 256 (256 tokens) and 512 pixels (1024), PixArt at 1024 pixels (4096), STDiT's frames.
TOKENS_1152 = (256, 1024, 4096)
# FLUX.1: 1024 and 4096 image tokens; 4608 with the 512 text tokens
TOKENS_3072 = (1024, 4096, 4608)
LAYERS = (
    ("DiT, PixArt, STDiT attention out, q", 1152, 1152, TOKENS_1152),
    ("DiT, STDiT qkv", 1152, 3456, TOKENS_1152),
    ("DiT, PixArt, STDiT mlp in", 1152, 4608, TOKENS_1152),
    ("DiT, PixArt, STDiT mlp out", 4608, 1152, TOKENS_1152),
    ("FLUX attention out", 3072, 3072, TOKENS_3072),
    ("FLUX qkv", 3072, 9216, TOKENS_3072),
    ("FLUX mlp in", 3072, 12288, TOKENS_3072),
    ("FLUX mlp out", 12288, 3072, TOKENS_3072),
    ("FLUX single in", 3072, 21504, TOKENS_3072),
    ("FLUX single out", 15360, 3072, TOKENS_3072),
    ("FLUX final modulation", 3072, 6144, (1,)),
    ("FLUX single modulation", 3072, 9216, (1,)),
    ("FLUX double modulation", 3072, 18432, (1,)),
)
ROWS = (1, 256, 1024, 4096, 4608)  # --full: every layer with each
MAIN = {(1, 3072, 9216), (1, 3072, 18432), (1024, 1152, 4608), (1024, 4608, 1152)}
MAIN |= {(4608, 3072, 3072), (4608, 3072, 12288), (4608, 15360, 3072)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One op as the audit needs it.

    Attributes:
        name: as on the command line.
        family: whose floor of the bound it must keep (`verdict.FLOORS`); "rows": no product.
        build: (m, k, n, tile) -> (function, its arguments as ShapeDtypeStructs).
        tile: m, generation -> what the op chooses; None where it has no tile.
        weight_bits: of one stored weight. activation_bytes: of one activation.
        products: the matrix instruction that must be there, "I" integer or "H" bfloat16; "" none.
    """

    name: str
    family: str
    build: Callable
    tile: Callable[[int, str], Tile | None]
    weight_bits: int = 0
    activation_bytes: int = 1
    products: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape; n is 0 for an op on rows."""

    op: str
    m: int
    k: int
    n: int

    @property
    def shape(self) -> str:
        """ "4608 x 3072 x 9216": m, k, n."""
        return " x ".join(str(size) for size in (self.m, self.k, self.n) if size)


def _spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _int8(m: int, k: int, n: int, tile: Tile):
    fn = functools.partial(int8_matmul.int8_matmul, out_dtype=jnp.bfloat16, tile=tile)
    return fn, (_spec(m, k, dtype=jnp.int8), _spec(n, k, dtype=jnp.int8), *_scales(m, n))


def _ternary(m: int, k: int, n: int, tile: Tile):
    fn = functools.partial(ternary_matmul.ternary_matmul, out_dtype=jnp.bfloat16, tile=tile)
    packed = _spec(n, packing.packed_size(k, 2), dtype=jnp.uint8)
    return fn, (_spec(m, k, dtype=jnp.int8), packed, *_scales(m, n))


def _scales(m: int, n: int):
    """Scales of rows and channels, and a bias: every linear of the networks has one."""
    return _spec(m, 1), _spec(n), _spec(n)


def _quantize_rows(m: int, k: int, n: int, tile):
    return quantize_rows.quantize_rows, (_spec(m, k, dtype=jnp.bfloat16),)


OPS = {
    op.name: op
    for op in (
        Op(name="quantize_rows", family="rows", build=_quantize_rows, tile=lambda m, sm: None),
        Op(
            name="int8_matmul",
            family="int8",
            build=_int8,
            tile=lambda m, sm: int8_matmul.choose_tile(m),
            weight_bits=8,
            products="I",
        ),
        Op(
            name="ternary_matmul",
            family="ternary_a8",
            build=_ternary,
            tile=lambda m, sm: ternary_matmul.choose_tile(m),
            weight_bits=2,
            products="I",
        ),
    )
}


def cases(ops: tuple[str, ...] = (), *, full: bool = False) -> list[Case]:
    """The cases of these ops (none named: all), each shape once.

    Args:
        ops: names in `OPS`.
        full: every layer with every number of rows; without it the main shapes, a few per op.

    Raises:
        ValueError: an op that is not there.
    """
    if unknown := set(ops) - set(OPS):
        raise ValueError(f"no op named {sorted(unknown)}; there are {', '.join(OPS)}")
    shapes = list(_shapes(full))
    found = []
    for op in OPS.values():
        if ops and op.name not in ops:
            continue
        mine = shapes if op.family != "rows" else [(m, k, 0) for m, k, _ in shapes]
        found += [Case(op.name, *shape) for shape in dict.fromkeys(mine)]
    return found


def _shapes(full: bool) -> Iterator[tuple[int, int, int]]:
    for _, k, n, rows in LAYERS:
        for m in ROWS if full else rows:
            if full or (m, k, n) in MAIN:
                yield m, k, n
