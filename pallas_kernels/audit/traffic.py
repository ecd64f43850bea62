"""Bytes a compiled program moves, from XLA's optimized HLO: every operation's operands and results.

The DRAM model: an operation reads each operand once and writes its result once. Between operations
nothing stays in the L2, within one everything does: a block that reads again what another block has
read is not counted. That is what XLA schedules, byte for byte, and not a measurement. Whether the
kernel itself asks for a weight byte only once is read from its machine code (`repeats`).
"""

from __future__ import annotations

import dataclasses
import math
import re

_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_LINE = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
    r"(?P<opcode>[\w\-]+)\((?P<operands>[^)]*)\)"
)
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one program.

    minimum: its arguments and results, each once. moved: operands and results of every operation.
    weights: the largest operand of a Pallas kernel, in a matrix product of few rows the weights.
    """

    minimum: int
    moved: int
    weights: int

    def moved_with(self, repeats: float) -> float:
        """The bytes moved when the kernel asks for every weight byte `repeats` times."""
        return self.moved + (repeats - 1) * self.weights


def traffic(hlo: str) -> Traffic:
    """The traffic of an optimized HLO module's entry computation.

    Raises:
        ValueError: the text has no entry computation, or an element type of unknown size.
    """
    if "\nENTRY " not in hlo:
        raise ValueError("no ENTRY computation in the HLO text")
    sizes: dict[str, int] = {}
    minimum = moved = weights = 0
    for line in hlo.split("\nENTRY ", 1)[1].splitlines()[1:]:
        match = _LINE.match(line)
        if not match:
            continue
        size = sizes[match["name"]] = shape_bytes(match["shape"])
        minimum += size if match["opcode"] == "parameter" else 0
        minimum += size if match["root"] else 0
        if match["opcode"] in _FREE:
            continue
        operands = [sizes[name] for name in re.findall(r"%([\w.\-]+)", match["operands"])]
        moved += size + sum(operands)
        if "__gpu$xla.gpu.triton" in line:
            weights = max([weights, *operands])
    return Traffic(minimum, moved, weights)


def shape_bytes(text: str) -> int:
    """Bytes of an HLO shape or tuple of shapes, "s8[4608,3072]{1,0}".

    Raises:
        ValueError: an element type without a width in its name.
    """
    total = 0
    for element, sizes in _SHAPE.findall(text):
        width = 8 if element == "pred" else int(_BITS.findall(element)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * width // 8
    return total
