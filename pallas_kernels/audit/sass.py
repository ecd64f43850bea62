"""Reads SASS as `nvdisasm -c` prints it: instructions, loops, and what each instruction costs.

Which pipe executes what follows NVIDIA's descriptions of the pipelines (Nsight Compute's guide,
"Pipelines") and the CUDA C++ Programming Guide's "Throughput of Native Arithmetic Instructions".
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^(\.L[\w.]*):", re.MULTILINE)
_FUNCTION = re.compile(r"^\.text\.(\S+):\s*$", re.MULTILINE)
_TARGET = re.compile(r"`\((\.L[\w.]*)\)")
_IMMA = re.compile(r"\.(\d{3,6})\.")
_GMMA = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")

MMA_ROOTS = ("IMMA", "HMMA", "IGMMA", "HGMMA", "QGMMA", "QMMA", "BMMA", "DMMA")

# Pipes by opcode root. XU: conversions between integer and float, transcendentals, bit scans. What
# moves data or waits takes an issue slot and no arithmetic pipe; so does the uniform datapath, U...
# An opcode in no list counts as ALU: a new one is not free.
_XU = "MUFU I2F F2I F2F FRND POPC FLO BREV I2FP64".split()
_FMA_FLOAT = "FFMA FADD FMUL FFMA32I FADD32I FMUL32I FSWZADD".split()
_FMA_INTEGER = "IMAD IMUL IDP IDP4A IMAD32I".split()
_HALF = "HADD2 HMUL2 HFMA2 HADD2_32I HMUL2_32I HFMA2_32I HMNMX2 HSET2 HSETP2".split()
_ALU = (
    "LOP LOP3 LOP32I PLOP3 PRMT SHF SHL SHR IADD IADD3 IADD32I ISETP ISET SEL IMNMX VIMNMX IABS"
    " LEA SGXT BMSK VABSDIFF VABSDIFF4 VIADD VIADDMNMX I2I I2IP I2FP F2FP F2IP FMNMX FSEL FSET"
    " FSETP FCHK MOV MOV32I P2R R2P CS2R VOTE"
).split()
_NO_PIPE = (
    "BRA BRX JMP JMX EXIT RET CALL BSSY BSYNC BREAK BMOV WARPSYNC NOP BAR DEPBAR LDGDEPBAR LDG LDS"
    " LDSM LDGSTS STS STSM STG LD ST LDL STL LDC S2R S2UR R2UR MEMBAR FENCE ERRBAR CCTL YIELD"
    " NANOSLEEP WARPGROUP ARRIVES SHFL REDUX ATOM ATOMG ATOMS RED MATCH ELECT SYNCS DEPBAR KILL"
).split()
_ALU_FLOAT = "FMNMX FSEL FSET FSETP FCHK F2FP".split()
_NOT_INTEGER = {*_ALU_FLOAT, "MOV", "MOV32I", "CS2R", "VOTE"}
_PIPES = {
    **dict.fromkeys(_XU, "xu"),
    **dict.fromkeys(_FMA_FLOAT, "fma_float"),
    **dict.fromkeys(_FMA_INTEGER, "fma_integer"),
    **dict.fromkeys(_HALF, "half"),
    **dict.fromkeys(_ALU, "alu"),
    **dict.fromkeys(MMA_ROOTS, "tensor"),
    **dict.fromkeys(_NO_PIPE, ""),
}
SHARED_READS, SHARED_WRITES = ("LDS", "LDSM"), ("STS", "STSM", "LDGSTS")
GLOBAL_READS = ("LDG", "LDGSTS", "LD")
OTHER_MOVES = ("STG", "ST", "RED", "LDL", "STL")  # through L1 as well; spills are LDL and STL


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @functools.cached_property
    def root(self) -> str:
        """The opcode without modifiers: "LDGSTS" of "LDGSTS.E.BYPASS.128"."""
        return self.opcode.split(".")[0]

    @property
    def never(self) -> bool:
        """Predicated off for good (`@!PT LDS RZ, [RZ]`, put in as padding): takes a slot only."""
        return self.predicate == "@!PT"

    @property
    def pipe(self) -> str:
        """tensor, alu, fma_float, fma_integer, half, xu, or "" for those that only issue."""
        if self.never or (self.root.startswith("U") and self.root not in _PIPES):
            return ""
        return _PIPES.get(self.root, "alu")

    @property
    def integer(self) -> bool:
        """Integer arithmetic on registers, conversions from integers among it."""
        return (self.pipe == "alu" and self.root not in _NOT_INTEGER) or (
            self.pipe == "fma_integer" or self.root in ("I2F", "I2FP")
        )

    @property
    def lane_bytes(self) -> int:
        """Bytes one lane moves, for loads and stores; LDSM: its lane's share."""
        if self.root in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits: 4 bytes a lane and matrix
            last = self.opcode.rsplit(".", 1)[-1]
            return 4 * (int(last) if last in ("2", "4") else 1)
        parts = self.opcode.split(".")
        for mark, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
            if mark in parts:
                return size
        return 4

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a matrix instruction, per warp (a warp group's divided by 4)."""
        if self.root not in MMA_ROOTS:
            return 0
        wide = _GMMA.search(self.opcode + ".")
        if wide:
            m, n, k = map(int, wide.groups())
            return m * n * k // 4
        digits = _IMMA.search(self.opcode + ".")
        if not digits:
            raise ValueError(f"no shape in {self.opcode}: the parser must learn it")
        return _mma_macs(digits[1])

    @property
    def kind(self) -> str:
        """A matrix instruction's root, shape and input types, "IMMA.16832.S8.S8"."""
        return ".".join(
            part for part in self.opcode.split(".") if part not in ("SAT", "ROW", "COL", "gsb0")
        )


def _mma_macs(digits: str) -> int:
    """m16n8k16 is printed 16816, m8n8k4 884, m16n8k256 168256: two sizes 8 or 16, then k."""
    m = 16 if digits.startswith("16") else 8
    rest = digits[len(str(m)) :]
    n = 16 if rest.startswith("16") else 8
    return m * n * int(rest[len(str(n)) :])


class Region:
    """A run of instructions: a loop's body, or a whole kernel; counts are per warp and pass."""

    def __init__(self, instructions: list[Instruction], *, is_loop: bool = False):
        self.instructions = instructions
        self.is_loop = is_loop
        self.roots = collections.Counter(i.root for i in instructions)
        self.pipes = collections.Counter(i.pipe for i in instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    def live(self, *roots: str) -> list[Instruction]:
        """The instructions with one of these roots that can execute."""
        return [i for i in self.instructions if i.root in roots and not i.never]

    @property
    def mma(self) -> dict[str, int]:
        """{kind: count} of the matrix instructions."""
        return dict(collections.Counter(i.kind for i in self.live(*MMA_ROOTS)))

    @property
    def integer(self) -> int:
        """Integer instructions."""
        return sum(i.integer for i in self.instructions)

    @property
    def shared_by_width(self) -> dict[str, int]:
        """{"LDS.1": count, "STS.16": ...}: shared loads and stores by bytes a lane."""
        moved = self.live("LDS", "STS", "LDSM", "STSM")
        return dict(sorted(collections.Counter(f"{i.root}.{i.lane_bytes}" for i in moved).items()))

    @property
    def byte_loads(self) -> int:
        """Shared loads of one byte a lane: what a wrong layout or tile compiles to."""
        return self.shared_by_width.get("LDS.1", 0)

    @property
    def global_read_bytes(self) -> int:
        """Bytes a full warp asks of global memory in one pass."""
        return sum(32 * i.lane_bytes for i in self.live(*GLOBAL_READS))


@dataclasses.dataclass(frozen=True)
class Function:
    """One kernel's instructions and the address each label stands for."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]

    @functools.cached_property
    def loops(self) -> list[tuple[int, int]]:
        """(first, last) addresses of every backward branch's range, the closing self-jump not."""
        found = []
        for instruction in self.instructions:
            target = _TARGET.search(instruction.operands)
            if instruction.root != "BRA" or not target:
                continue
            start = self.labels.get(target[1])
            if start is not None and start < instruction.address:
                found.append((start, instruction.address))
        return found

    def region(self, first: int, last: int, *, is_loop: bool = True) -> Region:
        """The instructions at these addresses, both ends included."""
        inside = [i for i in self.instructions if first <= i.address <= last]
        return Region(inside, is_loop=is_loop)

    @functools.cached_property
    def innermost(self) -> list[Region]:
        """The loops that hold no other loop."""
        return [
            self.region(first, last)
            for first, last in self.loops
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b in self.loops)
        ]

    @functools.cached_property
    def main(self) -> Region:
        """The innermost loop with the most matrix products; without any, the longest loop.

        Where the compiler has unrolled the loop away: from the first product to the last. A kernel
        without loops and products: all of it.
        """
        with_mma = [loop for loop in self.innermost if loop.mma]
        if with_mma:
            return max(with_mma, key=lambda loop: sum(loop.mma.values()))
        whole = Region(self.instructions)
        if products := whole.live(*MMA_ROOTS):
            return self.region(products[0].address, products[-1].address, is_loop=False)
        return max(self.innermost, key=len, default=whole)


def parse(text: str) -> dict[str, Function]:
    """{name: function} of everything in a disassembly.

    Raises:
        ValueError: the text holds no function.
    """
    heads = list(_FUNCTION.finditer(text))
    if not heads:
        raise ValueError("no '.text.<kernel>:' in the disassembly: not the output of nvdisasm -c")
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {
        head[1]: _parse_function(head[1], text[head.end() : end])
        for head, end in zip(heads, ends, strict=True)
    }


def _parse_function(name: str, text: str) -> Function:
    instructions, positions = [], []
    for match in _INSTRUCTION.finditer(text):
        address, predicate, opcode, operands = match.groups()
        instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands))
        positions.append(match.start())
    labels = {}
    for match in _LABEL.finditer(text):  # a label stands for the instruction after it
        later = [
            i for i, position in zip(instructions, positions, strict=True) if position > match.end()
        ]
        if later:
            labels[match[1]] = later[0].address
    return Function(name, instructions, labels)
