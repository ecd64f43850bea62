"""Compiles one case for one GPU and puts what was found into plain numbers."""

from __future__ import annotations

import dataclasses
import time

from pallas_kernels.audit import sass
from pallas_kernels.audit.cases import Case, Matmul, find_op
from pallas_kernels.audit.compile import Kernel, compile_kernels
from pallas_kernels.audit.model import Report, pipes, report
from pallas_kernels.audit.targets import SUB_PARTITIONS, Target
from pallas_kernels.audit.timing import Block, Times, times
from pallas_kernels.tiles import Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One case on one GPU, as static figures of its machine code and of the model.

    Attributes:
        kernel: of the product, where the program has more than one.
        tile: what it was compiled with; None: the op has none.
        spill_bytes: over all Pallas kernels of the program.
        products: {matrix instruction: count} in the main loop; instructions: all of them there.
        busiest: the pipe with the most cycles in the main loop.
        bound: useful tensor cycles / the busiest pipe's; 0 without matrix instructions (`model`).
        byte_loads: shared loads of one byte a lane in the main loop.
        moved, minimum: bytes (`traffic`).
        repeats: how often the machine code asks for a byte of its operands' tiles; 1 is perfect.
        block: the cycles and bytes of one block (`timing`); times: of the whole kernel.
        k_per_pass: contraction steps of one pass of the main loop; 0 without a tile.
        share: of the roofline (peak of the tensor pipe, DRAM for the minimum) the model gives it.
        seconds: it took to compile and read.
    """

    case: Case
    family: str
    target: str
    kernel: str
    tile: Tile | None
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    blocks_per_sm: int
    warps_per_sm: int
    limit: str
    products: dict[str, int]
    instructions: int
    busiest: str
    bound: float
    byte_loads: int
    minimum: int
    moved: float
    repeats: float
    block: Block
    times: Times
    k_per_pass: float
    share: float
    seconds: float


def examine(case: Case, target: Target, tile: Tile | None = None) -> Finding:
    """Compiles the case for the target with its own tile, or this one, and reads the result.

    Raises:
        ToolError: a piece of the compiler is missing, or fails.
    """
    start = time.perf_counter()
    op = find_op(case.op)
    fn, specs, tile = op.build(case.m, case.k, case.n, target.sm, tile)
    kernels = compile_kernels(fn, specs, target)
    found = report(max(kernels, key=_products))
    kernel = found.kernel
    k_per_pass = _k_per_pass(found, tile) if tile else 0.0
    repeats = 1.0
    if isinstance(op, Matmul) and tile and case.reads_weights:
        repeats = _repeats(op, found, tile, k_per_pass)
    moved = kernel.traffic.moved_with(repeats)
    block = _block(op, found, tile)
    passes = -(-case.k // k_per_pass) if k_per_pass else 1
    modelled = times(block, kernel.blocks, passes, moved, target)
    return Finding(
        case=case,
        family=op.family,
        target=target.name,
        kernel=kernel.name,
        tile=tile,
        registers=kernel.registers,
        spill_bytes=sum(k.spill_bytes for k in kernels),
        shared_bytes=kernel.shared_bytes,
        blocks=kernel.blocks,
        blocks_per_sm=found.occupancy.blocks,
        warps_per_sm=found.occupancy.warps,
        limit=found.occupancy.limit,
        products=found.loop.mma,
        instructions=len(found.loop),
        busiest=found.pipes.busiest[0],
        bound=found.pipes.bound,
        byte_loads=found.loop.byte_loads,
        minimum=kernel.traffic.minimum,
        moved=moved,
        repeats=repeats,
        block=block,
        times=modelled,
        k_per_pass=k_per_pass,
        share=roofline(op, case, kernel.traffic.minimum, target) / modelled.seconds,
        seconds=time.perf_counter() - start,
    )


def roofline(op, case: Case, minimum: float, target: Target) -> float:
    """Seconds no kernel can beat: products at the pipe's peak, bytes at the DRAM's bandwidth."""
    rate = target.int8_macs if getattr(op, "integer", True) else target.bf16_macs
    macs = case.m * case.k * case.n / (rate * SUB_PARTITIONS * target.sms)
    return max(macs / (target.clock_ghz * 1e9), minimum / target.dram_bandwidth)


def _products(kernel: Kernel) -> tuple[int, int]:
    return sum(kernel.function.main.mma.values()), len(kernel.function.main)


def _k_per_pass(found: Report, tile: Tile) -> float:
    """Contraction steps of one pass of the loop: `tile.k` times what the compiler unrolled."""
    macs = sum(i.macs for i in found.loop.instructions) * found.kernel.num_warps
    return macs / (tile.m * tile.n) or tile.k


def _repeats(op: Matmul, found: Report, tile: Tile, k_per_pass: float) -> float:
    """Bytes the main loop asks for / bytes of the operands' tiles in one pass.

    Lanes that a mask or a repeated layout switches off are counted as if they read.
    """
    per_k = tile.m * op.activation_bytes + op.weight_bytes(tile.n)
    return max(1.0, _reads(found) / (per_k * k_per_pass))


def _reads(found: Report) -> float:
    """Bytes of operand tiles a block asks for in one pass; of an unrolled loop, in all of it.

    Tiles come by asynchronous copies. Scales and sums come by plain loads, in which many lanes ask
    for the same bytes; they are counted only where a kernel has no asynchronous copies.
    """
    code = found.loop if found.loop.is_loop else sass.Region(found.kernel.function.instructions)
    copies = code.live("LDGSTS") or code.live(*sass.GLOBAL_READS)
    return sum(32 * i.lane_bytes for i in copies) * found.kernel.num_warps


def _block(op, found: Report, tile: Tile | None) -> Block:
    kernel, inside = found.kernel, {i.address for i in found.loop.instructions}
    rest = sass.Region([i for i in kernel.function.instructions if i.address not in inside])
    stages = max(1, kernel.num_stages - 1)
    return Block(
        loop=pipes(found.loop, kernel.target).cycles,
        rest=pipes(rest, kernel.target).cycles,
        num_warps=kernel.num_warps,
        resident=found.occupancy.blocks,
        reads=_reads(found) if tile else 0.0,
        in_flight=stages * op.weight_bytes(tile.n * tile.k) if tile else 0.0,
    )
