"""Tiles of the matmul kernels by GPU generation: operation -> ((up to this m, tile), ...)."""

from __future__ import annotations

from pallas_kernels.tiles import Tile

ANY = 2**31 - 1

# Static figures of the compiled code decide, never a timing.
TILES: dict[str, dict[str, tuple[tuple[int, Tile], ...]]] = {
    "sm_80": {
        "int8_a8": (
            (16, Tile(16, 32, 128, 4, 6)),
            (256, Tile(64, 128, 64, 4, 4)),
            (ANY, Tile(128, 128, 64, 4, 4)),
        ),
        "int8_a8_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (64, Tile(64, 64, 128, 4, 3)),
            (256, Tile(128, 64, 128, 4, 3)),
            (ANY, Tile(128, 128, 128, 8, 3)),
        ),
        "int8_a16": (
            (16, Tile(16, 32, 128, 4, 6)),
            (ANY, Tile(64, 128, 64, 4, 4)),
        ),
        "int8_a16_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "int6_a8": (
            (16, Tile(16, 32, 128, 4, 6)),
            (64, Tile(64, 64, 128, 4, 3)),
            (256, Tile(64, 128, 128, 4, 3)),
            (ANY, Tile(256, 64, 128, 4, 3)),
        ),
        "int6_a8_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (64, Tile(64, 64, 128, 4, 3)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "int6_a16": (
            (16, Tile(16, 32, 128, 4, 6)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "int6_a16_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "int4_a8": (
            (16, Tile(16, 32, 128, 2, 6)),
            (256, Tile(64, 64, 128, 4, 3)),
            (1024, Tile(128, 64, 128, 4, 3)),
            (ANY, Tile(128, 128, 128, 4, 3)),
        ),
        "int4_a8_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (64, Tile(64, 128, 128, 4, 3)),
            (ANY, Tile(128, 64, 128, 4, 3)),
        ),
        "int4_a16": (
            (16, Tile(16, 64, 128, 4, 6)),
            (64, Tile(64, 64, 128, 4, 3)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "int4_a16_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (64, Tile(64, 64, 128, 4, 3)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "ternary_a8": (
            (16, Tile(16, 32, 128, 2, 6)),
            (256, Tile(64, 128, 128, 4, 3)),
            (1024, Tile(128, 64, 128, 4, 3)),
            (ANY, Tile(256, 64, 128, 8, 3)),
        ),
        "ternary_a8_grouped": (
            (16, Tile(16, 32, 128, 2, 6)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "ternary_a16": (
            (16, Tile(16, 32, 128, 4, 6)),
            (64, Tile(64, 64, 128, 4, 3)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
        "ternary_a16_grouped": (
            (16, Tile(16, 32, 128, 4, 6)),
            (ANY, Tile(64, 128, 128, 4, 3)),
        ),
    },
}
