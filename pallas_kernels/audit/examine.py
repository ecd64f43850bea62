"""Compiles one case for one GPU and puts what was found into plain numbers."""

from __future__ import annotations

import dataclasses
import time

from pallas_kernels.audit import sass
from pallas_kernels.audit.cases import FEW_ROWS, OPS, Case, Op
from pallas_kernels.audit.compile import Kernel, compile_kernels
from pallas_kernels.audit.model import Report, report
from pallas_kernels.audit.targets import SUB_PARTITIONS, Target
from pallas_kernels.tiles import Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One case on one GPU, as static figures of its machine code and of the model.

    Attributes:
        kernel: of the matrix product, where the program has more than one.
        tile: what it was compiled with, "128x128x64 w8 s4"; "" without.
        spill_bytes: over all Pallas kernels of the program.
        pipes: cycles per warp and pass of the main loop (`model`); busiest: the longest.
        bound: useful tensor cycles / the busiest pipe's; 0 without matrix instructions.
        byte_loads: shared loads of one byte a lane in the main loop.
        moved, minimum: bytes (`traffic`).
        repeats: how often the machine code asks for a byte of its operands' tiles; 1 is perfect.
        unpack: the busiest pipe's time / the DRAM's time, both by the model; 0 for many rows.
    """

    case: Case
    family: str
    target: str
    kernel: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    blocks_per_sm: int
    warps_per_sm: int
    limit: str
    products: dict[str, int]
    instructions: int
    pipes: dict[str, float]
    busiest: str
    bound: float
    byte_loads: int
    minimum: int
    moved: float
    repeats: float
    unpack: float
    seconds: float


def examine(case: Case, target: Target, tile: Tile | None = None) -> Finding:
    """Compiles the case for the target with its own tile, or this one, and reads the result.

    Raises:
        ToolError: a piece of the compiler is missing, or fails.
    """
    start = time.perf_counter()
    op = OPS[case.op]
    tile = tile or op.tile(case.m, target.sm)
    fn, specs = op.build(case.m, case.k, case.n, tile)
    kernels = compile_kernels(fn, specs, target)
    found = report(max(kernels, key=_products))
    kernel, pipes = found.kernel, found.pipes
    repeats = _repeats(op, found, tile) if tile and case.m <= FEW_ROWS else 1.0
    moved = kernel.traffic.moved_with(repeats)
    return Finding(
        case=case,
        family=op.family,
        target=target.name,
        kernel=kernel.name,
        tile=f"{tile.m}x{tile.n}x{tile.k} w{kernel.num_warps} s{kernel.num_stages}" if tile else "",
        registers=kernel.registers,
        spill_bytes=sum(k.spill_bytes for k in kernels),
        shared_bytes=kernel.shared_bytes,
        blocks=kernel.blocks,
        blocks_per_sm=found.occupancy.blocks,
        warps_per_sm=found.occupancy.warps,
        limit=found.occupancy.limit,
        products=found.loop.mma,
        instructions=len(found.loop),
        pipes=dataclasses.asdict(pipes),
        busiest=pipes.busiest[0],
        bound=pipes.bound,
        byte_loads=found.loop.byte_loads,
        minimum=kernel.traffic.minimum,
        moved=moved,
        repeats=repeats,
        unpack=_unpack(case, found, tile, moved) if tile and case.m <= FEW_ROWS else 0.0,
        seconds=time.perf_counter() - start,
    )


def _products(kernel: Kernel) -> tuple[int, int]:
    return sum(kernel.function.main.mma.values()), len(kernel.function.main)


def _k_per_pass(found: Report, tile: Tile) -> float:
    """Contraction steps of one pass of the loop: `tile.k` times what the compiler unrolled."""
    macs = sum(i.macs for i in found.loop.instructions) * found.kernel.num_warps
    return macs / (tile.m * tile.n) or tile.k


def _repeats(op: Op, found: Report, tile: Tile) -> float:
    """Bytes the main loop asks for / bytes of the operands' tiles in one pass.

    Lanes that a mask or a repeated layout switches off are counted as if they read.
    """
    per_k = tile.m * op.activation_bytes + tile.n * op.weight_bits / 8
    code = found.loop if found.loop.is_loop else sass.Region(found.kernel.function.instructions)
    asked = code.global_read_bytes * found.kernel.num_warps
    return max(1.0, asked / (per_k * _k_per_pass(found, tile)))


def _unpack(case: Case, found: Report, tile: Tile, moved: float) -> float:
    """The busiest pipe's time on the fullest SM / the DRAM's time; below 1 memory is the bound."""
    target, kernel = found.kernel.target, found.kernel
    passes = -(-case.k // _k_per_pass(found, tile))
    warps = -(-kernel.blocks // target.sms) * kernel.num_warps
    busy = passes * found.pipes.busiest[1] * max(1.0, warps / SUB_PARTITIONS)
    return busy / (moved / (target.dram_bytes_per_cycle * target.sms))
