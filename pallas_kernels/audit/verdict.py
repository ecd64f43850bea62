"""What a compiled kernel must keep, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Iterable

from pallas_kernels.audit.cases import FEW_ROWS, Matmul, find_op
from pallas_kernels.audit.examine import Finding

FLOORED = "a100"  # the GPU the kernels are written for; the others are reported
FLOORS = {"int8": 0.95, "int4": 0.95, "ternary_a8": 0.95, "ternary_a16": 0.85}
FLOOR_ROWS = 1024  # from here on the floor of the bound holds
WARPS = 8  # resident on an SM: two for each sub-partition, so that one may wait
MOVED = 1.10  # times the minimum, for few rows


def failures(found: Finding) -> list[str]:
    """Everything that is wrong with one finding; spills on any GPU, the rest on the A100."""
    wrong = []
    if found.spill_bytes:
        wrong.append(f"{found.spill_bytes} B of registers spilled")
    if found.target != FLOORED:
        return wrong
    op = find_op(found.case.op)
    if isinstance(op, Matmul) and found.case.m > FEW_ROWS:
        wanted = "I" if op.integer else "H"  # IMMA, IGMMA; HMMA, HGMMA
        if not any(kind.startswith(wanted) for kind in found.products):
            wrong.append(f"no {wanted}MMA in the main loop: {found.products or 'no products'}")
    if found.byte_loads:
        wrong.append(f"{found.byte_loads} byte-wide shared loads in the main loop")
    floor = FLOORS.get(found.family, 0.0)
    if found.case.m >= FLOOR_ROWS and found.bound < floor:
        wrong.append(f"bound {found.bound:.3f} under {floor} ({found.busiest} is the busiest)")
    if found.warps_per_sm < WARPS:
        wrong.append(f"{found.warps_per_sm} warps fit an SM, {WARPS} are wanted ({found.limit})")
    if found.case.reads_weights and found.moved > MOVED * found.minimum:
        ratio = found.moved / found.minimum
        wrong.append(f"moves {ratio:.2f} times the minimum of {found.minimum} B, over {MOVED}")
    return wrong


def figure(findings: Iterable[Finding]) -> str:
    """The last line of a report: lowest bounds on the A100 from 1024 rows on, spills, kernels."""
    findings = list(findings)
    parts = []
    for family in dict.fromkeys(f.family for f in findings):
        bounds = [
            f.bound
            for f in findings
            if f.family == family and f.target == FLOORED and f.case.m >= FLOOR_ROWS
            if f.case.n
        ]
        if bounds:
            parts.append(f"{family}_bound_min={min(bounds):.3f}")
    spills = sum(f.spill_bytes > 0 for f in findings)
    return f"figure: {' '.join([*parts, f'spills={spills}', f'kernels={len(findings)}'])}"
