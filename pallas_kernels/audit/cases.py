"""What is audited: every op at the layer shapes of the networks, with the tile it chooses there.

A new op is one entry of `OPS`. Tiles come from where the kernel takes them, `matmul.choose_tile`:
the audit compiles what a GPU of that generation would run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import matmul, quantize_rows
from pallas_kernels.formats import FORMATS
from pallas_kernels.operands import Operands, prepare
from pallas_kernels.rows import QuantizedRows
from pallas_kernels.tiles import Tile

FEW_ROWS = 16  # up to here a product is bound by reading its weights

# (k, n) of the linears, and the rows they meet: tokens, or 1 for what is computed once per sample.
# DiT-XL/2 at 256 (256 tokens) and 512 pixels (1024), PixArt at 1024 pixels and STDiT (4096).
TOKENS_1152 = (256, 1024, 4096)
# FLUX.1: 1024 and 4096 image tokens; 4608 with the 512 text tokens
TOKENS_3072 = (1024, 4096, 4608)
LAYERS = (
    ("DiT, PixArt, STDiT attention out; PixArt, STDiT q", 1152, 1152, TOKENS_1152),
    ("DiT, PixArt, STDiT qkv", 1152, 3456, TOKENS_1152),
    ("DiT, PixArt, STDiT mlp in", 1152, 4608, TOKENS_1152),
    ("DiT, PixArt, STDiT mlp out", 4608, 1152, TOKENS_1152),
    ("FLUX attention out", 3072, 3072, TOKENS_3072),
    ("FLUX qkv", 3072, 9216, TOKENS_3072),
    ("FLUX mlp in", 3072, 12288, TOKENS_3072),
    ("FLUX mlp out", 12288, 3072, TOKENS_3072),
    ("FLUX single in", 3072, 21504, TOKENS_3072),
    ("FLUX single out", 15360, 3072, TOKENS_3072),
    ("DiT modulation; PixArt, STDiT t_block", 1152, 6912, (1,)),
    ("FLUX final modulation", 3072, 6144, (1,)),
    ("FLUX single modulation", 3072, 9216, (1,)),
    ("FLUX double modulation", 3072, 18432, (1,)),
)
ROWS = (1, 256, 1024, 4096, 4608)  # --full: every layer with each
MAIN = (
    (1, 3072, 9216),
    (1, 3072, 18432),
    (256, 1152, 4608),
    (1024, 1152, 4608),
    (1024, 4608, 1152),
    (4608, 3072, 3072),
    (4608, 3072, 12288),
    (4608, 15360, 3072),
)
MAIN_ROWS = ((1, 3072), (1024, 1152), (4096, 4608), (4608, 3072), (4608, 12288), (4608, 15360))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
    """A scaled product: codes of a format, int8 or bfloat16 activations, and what comes with it.

    Attributes:
        family: whose floor of the bound it must keep (`verdict.FLOORS`).
        format: of the weights. integer: int8 activations, else bfloat16.
        group: inputs that share a scale; None: a scale per channel.
        zero: with zero points. gated: with gate and residual in the epilogue.
    """

    family: str
    format: str
    integer: bool = True
    group: int | None = None
    zero: bool = False
    gated: bool = False

    @property
    def table(self) -> str:
        """Its key in `tile_table`."""
        activations = "a8" if self.integer else "a16"
        return f"{self.format}_{activations}" + ("_grouped" if self.group else "")

    @property
    def activation_bytes(self) -> int:
        """Of one activation."""
        return 1 if self.integer else 2

    def weight_bytes(self, codes: float) -> float:
        """Of this many stored weights."""
        return codes * FORMATS[self.format].bits / 8

    def build(self, m: int, k: int, n: int, generation: str, tile: Tile | None):
        """(function, its arguments as ShapeDtypeStructs, the tile)."""
        operands = self.operands(m, k, n)
        tile = tile or matmul.choose_tile(operands, generation)
        fn = functools.partial(matmul.matmul, out_dtype=jnp.bfloat16, tile=tile)
        return fn, (operands,), tile

    def operands(self, m: int, k: int, n: int) -> Operands:
        """Operands whose arrays are ShapeDtypeStructs."""
        spec = FORMATS[self.format]
        scales = (n, 1 if self.group is None else -(-k // self.group))
        codes: tuple[Any, ...] = (
            _spec(m, k, dtype=jnp.int8),
            _spec(m, 1),
            _spec(m, 1, dtype=jnp.int32),
        )
        arrays: dict[str, Any] = {
            "x": QuantizedRows(*codes) if self.integer else _spec(m, k, dtype=jnp.bfloat16),
            "w": _spec(n, spec.stored_size(k), dtype=spec.dtype),
            "scale": _spec(*scales),
            "zero": _spec(*scales, dtype=jnp.int8) if self.zero else None,
            "bias": _spec(n, dtype=jnp.bfloat16),
            "gate": _spec(1, n, dtype=jnp.bfloat16) if self.gated else None,
            "residual": _spec(m, n, dtype=jnp.bfloat16) if self.gated else None,
        }
        return prepare(**arrays, format=self.format, group=self.group, out_dtype=jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """An op on the rows of a bfloat16 array, bound by memory.

    Attributes:
        function: in `quantize_rows`. rotated: with a channel mask and a rotation of 128.
    """

    function: str
    rotated: bool = False
    family: str = "rows"

    def build(self, m: int, k: int, n: int, generation: str, tile: Tile | None):
        """(function, its arguments as ShapeDtypeStructs, None: it has no tile)."""
        modulated = self.function == "modulate_quantize_rows"
        shape = (1, m, k) if modulated else (m, k)
        specs = [
            _spec(*shape, dtype=jnp.bfloat16),
            *[_spec(1, k, dtype=jnp.bfloat16)] * 2 * modulated,
        ]
        mask = [_spec(k)] * self.rotated
        function = getattr(quantize_rows, self.function)

        def fn(*arrays):
            arrays, mask = arrays[: len(specs)], (*arrays[len(specs) :], None)[0]
            return function(*arrays, mask=mask, rotation=128 if self.rotated else None)

        return fn, (*specs, *mask), None


def _spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


OPS: dict[str, Matmul | Rows] = {
    "int8_a8": Matmul(family="int8", format="int8"),
    "int8_a8_zero": Matmul(family="int8", format="int8", zero=True),
    "int8_a8_gated": Matmul(family="int8", format="int8", gated=True),
    "int6_a8": Matmul(family="int6", format="int6"),
    "int4_a8": Matmul(family="int4", format="int4"),
    "int4_a8_gated": Matmul(family="int4", format="int4", gated=True),
    "int4_a8_group128": Matmul(family="int4", format="int4", group=128),
    "int4_a8_group128_zero": Matmul(family="int4", format="int4", group=128, zero=True),
    "int4_a8_group64": Matmul(family="int4_group64", format="int4", group=64),
    "ternary_a8": Matmul(family="ternary_a8", format="ternary"),
    "ternary_a8_gated": Matmul(family="ternary_a8", format="ternary", gated=True),
    "int8_a16": Matmul(family="int8_a16", format="int8", integer=False),
    "int4_a16": Matmul(family="int4_a16", format="int4", integer=False),
    "ternary_a16": Matmul(family="ternary_a16", format="ternary", integer=False),
    "quantize_rows": Rows(function="quantize_rows"),
    "quantize_rows_rotated": Rows(function="quantize_rows", rotated=True),
    "gelu_quantize_rows": Rows(function="gelu_quantize_rows"),
    "gelu_quantize_rows_rotated": Rows(function="gelu_quantize_rows", rotated=True),
    "modulate_quantize_rows": Rows(function="modulate_quantize_rows"),
    "modulate_quantize_rows_rotated": Rows(function="modulate_quantize_rows", rotated=True),
}


_FAMILIES = {
    ("int8", True): "int8",
    ("int4", True): "int4",
    ("ternary", True): "ternary_a8",
    ("ternary", False): "ternary_a16",
}
# An op for every entry of `tile_table`, for `tune`, in its heaviest form: what fits that fits the
# others. Groups of 128 stand for all groups.
TUNED = {
    op.table: op
    for format in FORMATS
    for integer in (True, False)
    for group in (None, 128)
    for op in [
        Matmul(
            family=_FAMILIES.get((format, integer), ""),
            format=format,
            integer=integer,
            group=group,
            zero=group is not None,
            gated=True,
        )
    ]
}


def find_op(name: str) -> Matmul | Rows:
    """An op of `OPS` or `TUNED`."""
    return OPS.get(name) or TUNED[name]


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

    @property
    def reads_weights(self) -> bool:
        """Whether it is a product of so few rows that reading the weights bounds it."""
        return bool(self.n) and self.m <= FEW_ROWS


def cases(ops: tuple[str, ...] = (), *, full: bool = False) -> list[Case]:
    """The cases of these ops (none named: all), each shape once.

    Args:
        ops: names in `OPS`.
        full: every layer with every number of rows; without it the main shapes, a few per op.

    Raises:
        ValueError: an op that is not there.
    """
    if unknown := set(ops) - set(OPS):
        raise ValueError(f"no op named {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    products = list(_every_layer()) if full else list(MAIN)
    rows = [(m, k) for m, k, _ in products] if full else list(MAIN_ROWS)
    return [
        Case(name, *(shape if isinstance(op, Matmul) else (*shape, 0)))
        for name, op in OPS.items()
        if not ops or name in ops
        for shape in dict.fromkeys(products if isinstance(op, Matmul) else rows)
    ]


def _every_layer() -> Iterator[tuple[int, int, int]]:
    for _, k, n, _ in LAYERS:
        for m in ROWS:
            yield m, k, n
