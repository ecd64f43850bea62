"""A model of the SM: how busy each pipe is in a kernel's main loop. A model, not a measurement.

Per warp and pass of the loop, in cycles of one SM sub-partition (an SM has four; each issues one
warp instruction a cycle and has its own pipes):

* tensor: multiply-accumulates of the matrix instructions / the pipe's rate. A100: one m16n8k32 int8
  or m16n8k16 bf16 product is 8 cycles. On sm_80 packed half arithmetic (HFMA2...) shares this pipe
  and adds 2 cycles each, which count as busy and not as useful.
* issue: every instruction, 1.
* alu: integer and logic instructions but multiplications, and float comparisons; 16 lanes, so 2
  cycles.
* fma: float32 arithmetic (32 / `fp32_lanes` cycles) and integer multiply-adds (2).
* xu: conversions between integer and float, transcendentals: 4 lanes, 8 cycles.
* shared: the SRAM that is L1 and shared memory moves 128 bytes a cycle for the whole SM, 32 for a
  sub-partition when all four are at work. Counted are the bytes of LDS, LDSM, STS, LDGSTS, LDG,
  STG, SHFL and of spills, for a full warp; what moves less than 128 bytes takes the whole cycle.
  Bank conflicts are not counted.

The loop is what is modelled: what a block does once, before and after it, is left out.

`bound = useful tensor cycles / the busiest pipe's cycles`. Latency, bank conflicts, L2 and DRAM can
only lower what a GPU reaches; on sm_90 mma.sync (as against wgmma) cannot reach the pipe's rate.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.audit import sass
from pallas_kernels.audit.compile import Kernel
from pallas_kernels.audit.targets import SUB_PARTITIONS, Target

ALU_CYCLES, XU_CYCLES, INTEGER_MULTIPLY_CYCLES, HALF_CYCLES = 2, 8, 2, 2
SHARED_BYTES_PER_CYCLE = 128  # of an SM
REGISTER_UNIT = 256  # registers are given to a warp in units of this many
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes; the driver keeps 1 KiB of every block


@dataclasses.dataclass(frozen=True)
class Pipes:
    """Cycles of each pipe in one pass of a region, per warp."""

    tensor: float
    half: float
    issue: float
    alu: float
    fma: float
    xu: float
    shared: float

    @property
    def cycles(self) -> dict[str, float]:
        """Of every pipe; the half arithmetic that shares the tensor pipe is in that one's."""
        cycles = {"tensor": self.tensor + self.half}
        return cycles | {
            name: getattr(self, name) for name in ("issue", "alu", "fma", "xu", "shared")
        }

    @property
    def busiest(self) -> tuple[str, float]:
        """The limiting pipe and its cycles."""
        cycles = self.cycles
        name = max(cycles, key=lambda pipe: cycles[pipe])  # the first of equals: tensor
        return name, cycles[name]

    @property
    def bound(self) -> float:
        """The greatest share of time the tensor pipe can do useful work; 0 without products."""
        return self.tensor / self.busiest[1] if self.tensor else 0.0


def pipes(region: sass.Region, target: Target) -> Pipes:
    """Cycles of every pipe for one warp's pass of the region."""
    counts = region.pipes
    half = HALF_CYCLES * counts["half"]
    fma: float = INTEGER_MULTIPLY_CYCLES * counts["fma_integer"]
    fma += 32 / target.fp32_lanes * counts["fma_float"]
    return Pipes(
        tensor=sum(i.macs / _macs_rate(i, target) for i in region.live(*sass.MMA_ROOTS)),
        half=half if target.half_on_tensor else 0,
        issue=len(region),
        alu=ALU_CYCLES * counts["alu"],
        fma=fma + (0 if target.half_on_tensor else half),
        xu=XU_CYCLES * counts["xu"],
        shared=SUB_PARTITIONS * sum(_wavefronts(i) for i in region.instructions),
    )


def _macs_rate(instruction: sass.Instruction, target: Target) -> int:
    return target.int8_macs if instruction.root in ("IMMA", "IGMMA") else target.bf16_macs


def _wavefronts(instruction: sass.Instruction) -> float:
    """Cycles of the SM's 128-byte-wide SRAM port."""
    memory = {
        *sass.SHARED_READS,
        *sass.SHARED_WRITES,
        *sass.GLOBAL_READS,
        *sass.OTHER_MOVES,
        "SHFL",
    }
    if instruction.never or instruction.root not in memory:
        return 0
    return max(1, 32 * instruction.lane_bytes / SHARED_BYTES_PER_CYCLE)


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How many blocks and warps an SM can hold at a time, and what limits it."""

    blocks: int
    warps: int
    limit: str


def occupancy(registers: int, shared_bytes: int, num_warps: int, target: Target) -> Occupancy:
    """Resident blocks of an SM from registers a thread, shared bytes a block and warps a block."""
    per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = target.registers_per_sm // SUB_PARTITIONS // per_warp * SUB_PARTITIONS
    shared = -(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    limits = {
        "registers": by_registers // num_warps,
        "smem": target.shared_per_sm // shared,
        "warps": target.warps_per_sm // num_warps,
        "blocks": target.blocks_per_sm,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * num_warps, limit)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the machine code of one kernel says, and what the model makes of it."""

    kernel: Kernel
    loop: sass.Region
    pipes: Pipes
    occupancy: Occupancy

    @property
    def bound(self) -> float:
        """See the module's head."""
        return self.pipes.bound

    @property
    def mma(self) -> str:
        """ "128 IMMA.16832.S8.S8", or "no MMA"."""
        return " + ".join(f"{count} {kind}" for kind, count in self.loop.mma.items()) or "no MMA"

    def line(self) -> str:
        """Everything on one line."""
        kernel, pipes = self.kernel, self.pipes
        where = "loop" if self.loop.is_loop else "unrolled" if self.loop.mma else "whole kernel"
        slowest, cycles = pipes.busiest
        waves = kernel.blocks / max(1, self.occupancy.blocks * kernel.target.sms)
        return (
            f"{kernel.name} {kernel.target.name}: {kernel.registers} regs, "
            f"{kernel.spill_bytes} B spilled, {kernel.shared_bytes} B smem, "
            f"{self.occupancy.blocks} blocks/SM ({self.occupancy.limit}), "
            f"{self.occupancy.warps} warps/SM, {kernel.blocks} blocks = {waves:.2f} waves | "
            f"{where}: {self.mma}, {len(self.loop)} instr, {2 * self.loop.integer} int cycles; "
            f"cycles: tensor {pipes.tensor:.0f} half {pipes.half:.0f} issue {pipes.issue:.0f} "
            f"alu {pipes.alu:.0f} fma {pipes.fma:.0f} xu {pipes.xu:.0f} shared {pipes.shared:.0f}"
            f" | {self.loop.shared_by_width} byte LDS {self.loop.byte_loads}"
            f" | bound {pipes.bound:.2f} ({slowest}, {cycles:.0f})"
        )


def report(kernel: Kernel) -> Report:
    """Reads one compiled kernel."""
    loop = kernel.function.main
    held = occupancy(kernel.registers, kernel.shared_bytes, kernel.num_warps, kernel.target)
    return Report(kernel, loop, pipes(loop, kernel.target), held)
