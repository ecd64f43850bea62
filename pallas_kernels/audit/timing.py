"""A model of a whole kernel's time: waves of blocks, prologue and epilogue, L2, DRAM.

A model, not a measurement: it ranks tiles and says what bounds a shape.

* compute: the SM with the most blocks runs them through its pipes. A block costs `passes` of the
  main loop and once everything else. Where two or more blocks share an SM, one's epilogue may run
  under another's loop: the cycles of each pipe add up and the longest pipe counts. A block that is
  alone has the loop's longest pipe and then the rest's.
* l2: every block reads its operands' tiles from the L2, at the rate of all SMs together.
* dram: the bytes of `traffic` at the DRAM's bandwidth, or, if that is less, at what the loads in
  flight can carry (bytes in flight / latency, Little's law).

The longest of the three is the time.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.audit.targets import SUB_PARTITIONS, Target

DRAM_LATENCY = 600e-9  # seconds under load; an assumption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """What one block does; see `model.Pipes` for the cycles, which are per warp.

    Attributes:
        loop: cycles of each pipe in one pass of the main loop. rest: of everything else.
        num_warps: of the block.
        resident: blocks that fit an SM.
        reads: bytes its main loop asks of global memory in a pass.
        in_flight: bytes of weights its pipeline stages have on the way.
    """

    loop: dict[str, float]
    rest: dict[str, float]
    num_warps: int
    resident: int
    reads: float
    in_flight: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Modelled seconds of the three."""

    compute: float
    l2: float
    dram: float

    @property
    def seconds(self) -> float:
        """The longest."""
        return max(self.compute, self.l2, self.dram)

    @property
    def limit(self) -> str:
        """Which is the longest."""
        return max(dataclasses.asdict(self), key=lambda name: getattr(self, name))


def times(block: Block, blocks: int, passes: float, moved: float, target: Target) -> Times:
    """The modelled times of a grid of `blocks`, each `passes` times through its main loop.

    Args:
        block: one block.
        blocks: of the grid.
        passes: of the main loop.
        moved: bytes to and from DRAM.
        target: the GPU.
    """
    on_one_sm = -(-blocks // target.sms)
    sharing = max(1.0, min(block.resident, on_one_sm) * block.num_warps / SUB_PARTITIONS)
    rounds = on_one_sm / max(1, min(block.resident, on_one_sm))
    compute = rounds * sharing * _block_cycles(block, passes, on_one_sm) / (target.clock_ghz * 1e9)
    l2 = blocks * passes * block.reads / (target.l2_bytes_per_cycle * target.clock_ghz * 1e9)
    flying = min(blocks, block.resident * target.sms) * block.in_flight
    bandwidth = min(target.dram_bandwidth, flying / DRAM_LATENCY or target.dram_bandwidth)
    return Times(compute, l2, moved / bandwidth)


def _block_cycles(block: Block, passes: float, on_one_sm: int) -> float:
    if min(block.resident, on_one_sm) > 1:
        return max(passes * block.loop[pipe] + block.rest[pipe] for pipe in block.loop)
    return passes * max(block.loop.values()) + max(block.rest.values())
