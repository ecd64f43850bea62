"""A finding of the audit that nothing is wrong with: what several tests start from."""

from pallas_kernels.audit.cases import Case
from pallas_kernels.audit.examine import Finding
from pallas_kernels.audit.timing import Block, Times
from pallas_kernels.tiles import Tile

CYCLES = dict.fromkeys(("tensor", "issue", "alu", "fma", "xu", "shared"), 1.0)
GOOD = Finding(
    case=Case("int8_a8", 4608, 3072, 3072),
    family="int8",
    target="a100",
    kernel="int8_matmul",
    tile=Tile(128, 128, 64, 8, 4),
    registers=126,
    spill_bytes=0,
    shared_bytes=49152,
    blocks=864,
    blocks_per_sm=2,
    warps_per_sm=16,
    limit="registers",
    products={"IMMA.16832.S8.S8": 32},
    instructions=86,
    busiest="tensor",
    bound=1.0,
    byte_loads=0,
    minimum=1000,
    moved=1000.0,
    repeats=1.0,
    block=Block(loop=CYCLES, rest=CYCLES, num_warps=8, resident=2, reads=1.0, in_flight=1.0),
    times=Times(2.0, 1.0, 1.0),
    k_per_pass=64.0,
    share=0.9,
    seconds=1.0,
)
