"""Findings as rows of a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

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
    "compute/DRAM",
    "modelled share",
)


def cells(found: Finding) -> list[str]:
    """One row of the table, under `COLUMNS`."""
    kinds = " + ".join(
        f"{count} {'.'.join(kind.split('.')[:2])}" for kind, count in found.products.items()
    )
    few_bytes = found.case.reads_weights or not found.case.n
    tile = found.tile
    return [
        found.case.op,
        found.case.shape,
        f"{tile.m}x{tile.n}x{tile.k} w{tile.num_warps} s{tile.num_stages}" if tile else "",
        found.target,
        str(found.registers),
        str(found.spill_bytes),
        f"{found.shared_bytes / 1024:.0f}K",
        f"{found.blocks_per_sm} {found.limit}",
        str(found.warps_per_sm),
        kinds,
        str(found.instructions),
        f"{found.busiest} {found.block.loop[found.busiest]:.0f}",
        f"{found.bound:.2f}" if found.case.n else "",
        str(found.byte_loads),
        f"{found.moved / found.minimum:.2f}" if few_bytes else "",
        f"{found.times.compute / found.times.dram:.2f}" if few_bytes else "",
        f"{found.share:.2f} {found.times.limit}",
    ]


def write_json(path: Path, findings: Iterable[Finding]) -> None:
    """Every number of every finding, with what failed, as JSON."""
    rows = [{**dataclasses.asdict(f), "failures": failures(f)} for f in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
