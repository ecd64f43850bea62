"""Findings as rows of a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from pallas_kernels.audit.cases import FEW_ROWS
from pallas_kernels.audit.examine import Finding
from pallas_kernels.audit.verdict import failures

COLUMNS = (
    "op",
    "m x k x n",
    "tile",
    "gpu",
    "regs",
    "spill B",
    "smem",
    "blocks/SM",
    "warps/SM",
    "MMA in loop",
    "instr",
    "busiest pipe",
    "bound",
    "byte LDS",
    "bytes/min",
    "unpack/DRAM",
)


def cells(found: Finding) -> list[str]:
    """One row of the table, under `COLUMNS`."""
    few = found.case.m <= FEW_ROWS and found.tile
    kinds = " + ".join(f"{count} {kind}" for kind, count in found.products.items())
    moved = f"{found.moved / found.minimum:.2f}x" if few or found.family == "rows" else ""
    return [
        found.case.op,
        found.case.shape,
        found.tile,
        found.target,
        str(found.registers),
        str(found.spill_bytes),
        f"{found.shared_bytes / 1024:.0f}K",
        f"{found.blocks_per_sm} ({found.limit})",
        str(found.warps_per_sm),
        kinds,
        str(found.instructions),
        f"{found.busiest} {found.pipes[found.busiest]:.0f}",
        f"{found.bound:.2f}" if kinds else "",
        str(found.byte_loads),
        moved,
        f"{found.unpack:.2f}" if few else "",
    ]


def write_json(path: Path, findings: Iterable[Finding]) -> None:
    """Every number of every finding, with what failed, as JSON."""
    rows = [{**dataclasses.asdict(f), "failures": failures(f)} for f in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
