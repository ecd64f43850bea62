"""`python -m pallas_kernels.tune`: chooses tiles by the audit and rewrites `tile_table.py`.

Every candidate tile of an op is compiled once per GPU generation. The model of a kernel's time
(`audit.timing`) then ranks the candidates at every layer shape of a range of m: waves of blocks,
pipes, L2 and DRAM. The least geometric mean over the shapes wins; among equals the one that leaves
an SM more to hide latency with. Modelled, not measured: no GPU is asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from pallas_kernels.audit.cases import FEW_ROWS, LAYERS, TUNED, Case, Matmul
from pallas_kernels.audit.examine import Finding
from pallas_kernels.audit.targets import TARGETS
from pallas_kernels.audit.targets import target as find_target
from pallas_kernels.audit.timing import times
from pallas_kernels.audit.verdict import FLOOR_ROWS, FLOORED, FLOORS
from pallas_kernels.audit.workers import attempt_all
from pallas_kernels.packing import BLOCK
from pallas_kernels.tile_table import ANY, TILES
from pallas_kernels.tiles import Tile

TABLE = Path(__file__).with_name("tile_table.py")
RANGES = (FEW_ROWS, 64, 256, 1024, ANY)  # the greatest m of each
WARPS = 8  # resident on an SM, or the candidate is out where others are not
SUMS = (32, 128)  # accumulators a thread may hold; 128 are half of its registers
TIE = 1.03  # times this close are called equal
Entries = list[tuple[int, Tile]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tile and what one compilation of it showed."""

    tile: Tile
    found: Finding

    @property
    def clean(self) -> bool:
        """Whether the machine code has no spills and no byte-wide loads."""
        return not (self.found.spill_bytes or self.found.byte_loads)

    @property
    def room(self) -> tuple:
        """What is left to hide latency with; greater is better.

        Few rows: more blocks, for more SMs to read with. Many: two blocks on an SM; 16 warps; how
        far the busiest other pipe is from the tensor pipe.
        """
        if self.tile.m <= FEW_ROWS:
            return (-self.tile.n, self.found.warps_per_sm)
        loop = self.found.block.loop
        others = max(cycles for pipe, cycles in loop.items() if pipe != "tensor")
        return (
            self.found.blocks_per_sm >= 2,
            self.found.warps_per_sm >= 16,
            -others / max(1.0, loop["tensor"]),
        )

    def seconds(self, op: Matmul, m: int, k: int, n: int) -> float:
        """The modelled time of one product."""
        blocks = -(-m // self.tile.m) * -(-n // self.tile.n)
        moved = op.weight_bytes(n * k) + m * k * op.activation_bytes + 2 * m * n
        passes = -(-k // self.found.k_per_pass)
        gpu = find_target(self.found.target)
        return times(self.found.block, blocks, passes, moved, gpu).seconds


def candidates(op: Matmul, few_rows: bool) -> Iterator[Tile]:
    """Every tile worth compiling."""
    if few_rows:
        yield from (Tile(FEW_ROWS, n, BLOCK, warps, 6) for n in (32, 64) for warps in (2, 4))
        return
    steps = ((64, 4), (128, 3)) if op.format == "int8" else ((BLOCK, 3),)
    for m in (64, 128, 256):
        for n in (64, 128, 256):
            for warps in (4, 8):
                if SUMS[0] <= m * n / (32 * warps) <= SUMS[1]:
                    yield from (Tile(m, n, k, warps, stages) for k, stages in steps)


def shapes(most: int, below: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of the layers with below < m <= most; without any, all of them at m = most."""
    found = [(m, k, n) for _, k, n, ms in LAYERS for m in ms if below < m <= most]
    return found or [(most, k, n) for _, k, n, _ in LAYERS]


def choose(op: Matmul, found: list[Candidate], most: int, below: int) -> Candidate:
    """The candidate with the least modelled time over the range's shapes.

    Raises:
        ValueError: no candidate compiles cleanly.
    """
    # in the op's heaviest form: zero points where it may have them, gate and residual
    clean = [candidate for candidate in found if candidate.clean]
    if not clean:
        raise ValueError(f"no tile of {op.table} compiles without spills and byte-wide loads")
    clean = [c for c in clean if c.found.warps_per_sm >= WARPS] or clean
    if most >= FLOOR_ROWS:
        clean = [c for c in clean if c.found.bound >= _floor(c)] or clean

    def mean(candidate: Candidate) -> float:
        logs = [math.log(candidate.seconds(op, *shape)) for shape in shapes(most, below)]
        return math.exp(sum(logs) / len(logs))

    means = [mean(candidate) for candidate in clean]
    close = [c for c, time in zip(clean, means, strict=True) if time <= TIE * min(means)]
    return max(close, key=lambda candidate: candidate.room)


def _floor(candidate: Candidate) -> float:
    """What `audit.verdict` asks of the candidate's bound: only the A100's kernels have a floor."""
    found = candidate.found
    return FLOORS.get(found.family, 0.0) if found.target == FLOORED else 0.0


def tune(op: Matmul, target: str, workers: int, near: str | None = None) -> Entries:
    """The op's tiles on one GPU, by rows; neighbouring ranges with one tile are one entry.

    Args:
        op: what to tune.
        target: the GPU.
        workers: processes that compile.
        near: a generation of the table whose tiles for the op are the only candidates, unless none
            of them compiles cleanly; None: all.

    Raises:
        ToolError: a piece of the compiler is missing.
        ValueError: no candidate compiles cleanly.
    """
    compiled: dict[bool, list[Candidate]] = {}
    for few_rows, shape in ((True, (1, 3072, 9216)), (False, (4608, 3072, 3072))):
        tiles, case = list(candidates(op, few_rows)), Case(op.table, *shape)
        held = [tile for _, tile in TILES[near][op.table]] if near else tiles
        found = _compile(case, target, [tile for tile in tiles if tile in held], workers)
        if near and not any(candidate.clean for candidate in found):
            found = _compile(case, target, tiles, workers)
        compiled[few_rows] = found
    entries: Entries = []
    for below, most in zip((0, *RANGES), RANGES, strict=False):
        tile = choose(op, compiled[most <= FEW_ROWS], most, below).tile
        if entries and entries[-1][1] == tile:
            entries.pop()
        entries.append((most, tile))
    return entries


def _compile(case: Case, target: str, tiles: list[Tile], workers: int) -> list[Candidate]:
    """The tiles that kernel and compiler take."""
    replies = attempt_all([(case, target, tile) for tile in tiles], workers)
    pairs = zip(tiles, replies, strict=True)
    return [Candidate(tile, reply) for tile, reply in pairs if isinstance(reply, Finding)]


def write(table: dict[str, dict[str, Entries]], path: Path) -> None:
    """Rewrites the table in a module, and nothing before it."""
    head = path.read_text(encoding="utf-8").split("TILES:")[0]
    lines = [f"{head}TILES: dict[str, dict[str, tuple[tuple[int, Tile], ...]]] = {{"]
    for generation, ops in table.items():
        lines.append(f'    "{generation}": {{')
        for name, entries in ops.items():
            lines.append(f'        "{name}": (')
            for most, tile in entries:
                sizes = ", ".join(str(value) for value in dataclasses.astuple(tile))
                lines.append(f"            ({'ANY' if most == ANY else most}, Tile({sizes})),")
            lines.append("        ),")
        lines.append("    },")
    path.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--ops", nargs="*", default=list(TUNED), choices=list(TUNED))
    parser.add_argument("--near", choices=list(TILES), help="try only this generation's tiles")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args(argv)
    table = {gpu: {op: list(held) for op, held in ops.items()} for gpu, ops in TILES.items()}
    for name in arguments.targets:
        for op in (TUNED[key] for key in arguments.ops):
            entries = tune(op, name, arguments.workers, arguments.near)
            table.setdefault(TARGETS[name].sm, {})[op.table] = entries
            print(name, op.table, *entries, sep="\n  ", flush=True)
    write(table, arguments.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
