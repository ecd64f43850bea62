"""`python -m pallas_kernels.tune`: chooses tiles by the audit and rewrites `tile_table.py`.

Every candidate tile of an op is compiled once per GPU generation. The model of the SM
(`audit.model`) then gives each candidate a time at every layer shape of a range of m: the busiest
pipe on the SM with the most blocks, or the DRAM if that takes longer. The candidate with the least
geometric mean over the shapes wins. Modelled, not measured: no GPU is asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from pallas_kernels.audit.cases import FEW_ROWS, LAYERS, OPS, Case, Op
from pallas_kernels.audit.examine import Finding
from pallas_kernels.audit.targets import SUB_PARTITIONS, TARGETS
from pallas_kernels.audit.targets import target as find_target
from pallas_kernels.audit.workers import attempt_all
from pallas_kernels.tiles import Tile

TABLE = Path(__file__).with_name("tile_table.py")
RANGES = (16, 64, 256, 1024, None)  # the greatest m of each; None: any
WARPS = 8  # resident on an SM, or the candidate is out
ACCUMULATORS = 128  # 32-bit sums a thread may hold: half of its registers
TIE = 1.02  # times this close are called equal; the lighter loop wins
HEAD = '''"""Tiles by GPU generation, op and rows; written by `python -m pallas_kernels.tune`.

Each entry: the greatest m it is for (None: any), the tile, and what its main loop compiles to.
Static figures and a model's, not measurements.
"""

from pallas_kernels.tiles import Tile

TILES: dict[str, dict[str, tuple[tuple[int | None, Tile], ...]]] = {
'''


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tile and what one compilation of it showed."""

    tile: Tile
    found: Finding

    @property
    def fits(self) -> bool:
        """Whether the machine code is clean and enough warps fit an SM."""
        return not (
            self.found.spill_bytes or self.found.byte_loads or self.found.warps_per_sm < WARPS
        )

    @property
    def load(self) -> float:
        """Busiest pipe beside the tensor pipe / the tensor pipe: the room left for latency."""
        others = {name: c for name, c in self.found.pipes.items() if name not in ("tensor", "half")}
        return max(others.values()) / max(1.0, self.found.pipes["tensor"])

    def seconds(self, m: int, k: int, n: int, weight_bits: int, activation_bytes: int) -> float:
        """The modelled time of one product."""
        gpu, tile = find_target(self.found.target), self.tile
        blocks = -(-m // tile.m) * -(-n // tile.n)
        warps = -(-blocks // gpu.sms) * tile.num_warps
        passes = -(-k // self.found.k_per_pass)
        busy = passes * self.found.pipes[self.found.busiest] * max(1.0, warps / SUB_PARTITIONS)
        moved = n * k * weight_bits / 8 + m * k * activation_bytes + 2 * m * n
        return max(busy / (gpu.clock_ghz * 1e9), moved / gpu.dram_bandwidth)


def candidates(few_rows: bool, ks: tuple[int, ...]) -> Iterator[Tile]:
    """Every tile worth compiling."""
    for m in (16,) if few_rows else (64, 128, 256):
        for n in (32, 64, 128, 256):
            for k in ks:
                for warps in (2, 4, 8) if few_rows else (4, 8):
                    sums = m * n / (32 * warps)
                    if 4 <= sums <= ACCUMULATORS:
                        for stages in (3, 4) if not few_rows else (4, 6):
                            yield Tile(m, n, k, warps, stages)


def shapes(limit: int | None, below: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of the layers for below < m <= limit; the range's end where no layer has such m."""
    linears = {(k, n) for _, k, n, _ in LAYERS}
    rows = {m for *_, ms in LAYERS for m in ms if below < m and (limit is None or m <= limit)}
    return [(m, k, n) for m in sorted(rows or {limit or below + 1}) for k, n in sorted(linears)]


def choose(found: list[Candidate], op: Op, limit: int | None, below: int) -> Candidate:
    """The candidate with the least modelled time over the range's shapes.

    Raises:
        ValueError: no candidate compiles cleanly.
    """
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        raise ValueError(f"no candidate for {op.name} compiles without spills or byte loads")

    def mean(candidate: Candidate) -> float:
        sizes = (op.weight_bits, op.activation_bytes)
        logs = [math.log(candidate.seconds(*shape, *sizes)) for shape in shapes(limit, below)]
        return math.exp(sum(logs) / len(logs))

    times = [mean(candidate) for candidate in fitting]
    close = [c for c, seconds in zip(fitting, times, strict=True) if seconds <= TIE * min(times)]
    return min(close, key=lambda c: (c.load, -c.found.warps_per_sm, c.found.registers))


def tune(op: Op, target: str, workers: int) -> list[tuple[int | None, Candidate]]:
    """The op's tiles on one GPU, by rows.

    Raises:
        ToolError: a piece of the compiler is missing.
        ValueError: no candidate compiles cleanly.
    """
    groups = {}
    for few, shape in ((True, (1, 3072, 9216)), (False, (4608, 3072, 3072))):
        case, tiles = Case(op.name, *shape), list(candidates(few, op.tile_ks))
        stream = attempt_all([(case, target, tile) for tile in tiles], workers)
        pairs = zip(tiles, stream, strict=True)
        groups[few] = [
            Candidate(tile, found) for tile, found in pairs if isinstance(found, Finding)
        ]
    chosen, below = [], 0
    for limit in RANGES:
        few = limit is not None and limit <= FEW_ROWS
        chosen.append((limit, choose(groups[few], op, limit, below)))
        below = limit or 0
    return [
        entry
        for entry, after in zip(chosen, [*chosen[1:], None], strict=True)
        if after is None or after[1].tile != entry[1].tile  # equal neighbours become one entry
    ]


def write(table: dict[str, dict[str, list[tuple[int | None, Candidate]]]], path: Path) -> None:
    """Writes the table as a module."""
    lines = [HEAD]
    for generation, ops in table.items():
        lines.append(f'    "{generation}": {{\n')
        for name, entries in ops.items():
            lines.append(f'        "{name}": (\n')
            lines += [f"            {_entry(limit, candidate)}\n" for limit, candidate in entries]
            lines.append("        ),\n")
        lines.append("    },\n")
    path.write_text("".join([*lines, "}\n"]), encoding="utf-8")


def _entry(limit: int | None, candidate: Candidate) -> str:
    tile, found = candidate.tile, candidate.found
    numbers = f"{tile.m}, {tile.n}, {tile.k}, {tile.num_warps}, {tile.num_stages}"
    say = f"{found.registers} registers, bound {found.bound:.2f}"
    return f"({limit}, Tile({numbers})),  # {say}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args(argv)
    tiled = [op for op in OPS.values() if op.tile_ks]
    table: dict[str, dict[str, list[tuple[int | None, Candidate]]]] = {}
    for name in arguments.targets:
        entries = table.setdefault(TARGETS[name].sm, {})
        for op in tiled:
            entries[op.name] = tune(op, name, arguments.workers)
            for limit, candidate in entries[op.name]:
                print(f"{name} {op.name} m <= {limit}: {_entry(limit, candidate)}", flush=True)
    write(table, arguments.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
