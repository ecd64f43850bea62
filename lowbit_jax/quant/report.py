"""What a model's parameters take, counted over everything that is stored, from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from lowbit_jax.quant.qtensor import QTensor, TransformedKernel, tree_bytes
from lowbit_jax.quant.ranged import RangedKernel
from pallas_kernels.formats import FORMATS

OTHERS = "norms and tables"


@dataclass(kw_only=True)
class Group:
    """All linears of one kind, over all layers, or all norms and lookup tables together.

    Attributes:
        name: layer path with layer numbers as "*".
        kind: format, scale granularity and activation bits in words; the dtype when not quantised.
        count: number of matrices (or norms and tables).
        parameters: number of parameters, biases included.
        before: bytes as floating-point parameters.
        after: bytes in memory: codes, scales, zero points, masks, biases.
        disk: bytes before compression on disk; less than `after` in the dense ternary archive form.
    """

    name: str
    kind: str
    count: int = 0
    parameters: int = 0
    before: int = 0
    after: int = 0
    disk: int = 0


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Sizes of a whole model."""

    groups: list[Group]
    parameters: int
    before: int
    after: int
    disk: int

    @property
    def ratio(self) -> float:
        """How many times smaller in memory."""
        return self.before / max(self.after, 1)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per parameter over everything that is stored in memory."""
        return 8 * self.after / max(self.parameters, 1)


def size_report(
    parts: Iterable[tuple[str, Mapping[str, Any]]], *, float_bytes: int = 2, archive: bool = False
) -> SizeReport:
    """Count a model part by part.

    Args:
        parts: (part, {path: array, shape or QTensor of either}), see `checkpoint.iter_parts`.
        float_bytes: bytes a parameter takes in the unquantised model (2 for bfloat16).
        archive: count ternary codes on disk at five to the byte.
    """
    groups: dict[tuple[str, str], Group] = {}
    for part, leaves in parts:
        linears = {_linear(path): leaf for path, leaf in leaves.items() if _is_kernel(path)}
        for path, leaf in leaves.items():
            linear = _linear(path)
            owner = linears.get(linear)
            name = (
                OTHERS if owner is None else re.sub(r"/\d+(?=/)", "/*", f"{_prefix(part)}{linear}")
            )
            kind = describe(leaf if owner is None else owner)
            group = groups.setdefault((name, kind), Group(name=name, kind=kind))
            size = math.prod(leaf.shape) * (leaf.layers if isinstance(leaf, QTensor) else 1)
            group.count += owner is None or _is_kernel(path)
            group.parameters += size
            group.before += size * float_bytes
            group.after += tree_bytes(leaf)
            group.disk += disk_bytes(leaf, archive)
    total = list(groups.values())
    return SizeReport(
        groups=total,
        parameters=sum(g.parameters for g in total),
        before=sum(g.before for g in total),
        after=sum(g.after for g in total),
        disk=sum(g.disk for g in total),
    )


def describe(leaf: Any) -> str:
    """A leaf's storage in words, such as "int4 (4 bit) per group 128"."""
    if isinstance(leaf, RangedKernel):
        return f"{len(leaf.edges) - 1} timestep ranges of {describe(leaf.kernels)}"
    if not isinstance(leaf, QTensor):
        return str(leaf.dtype) + (_transforms(leaf) if isinstance(leaf, TransformedKernel) else "")
    if leaf.scale.shape[-1] > 1:
        sharing = f"group {leaf.group}"
    else:
        sharing = "tensor" if leaf.scale.shape[-2] == 1 < leaf.shape[0] else "channel"
    zero = "" if leaf.zero is None else ", zero points"
    how = "" if leaf.act_scale is None else "static "
    how = how if leaf.act_symmetric else "asymmetric "
    acts = "" if leaf.act_bits is None else f", {how}int{leaf.act_bits} activations"
    bits = FORMATS[leaf.format].bits
    return f"{leaf.format} ({bits} bit) per {sharing}{zero}{acts}{_transforms(leaf)}"


def _transforms(leaf: QTensor | TransformedKernel) -> str:
    if leaf.rotation is not None:
        return f", masked, rotated {leaf.rotation}"
    return "" if leaf.mask is None else ", masked"


def disk_bytes(leaf: Any, archive: bool) -> int:
    """Bytes of one leaf on disk, before orbax compresses it."""
    if not (archive and isinstance(leaf, QTensor) and leaf.format == "ternary"):
        return tree_bytes(leaf)
    n, k = leaf.shape
    return leaf.layers * n * -(-k // 5) + leaf.nbytes - tree_bytes(leaf.codes)


def size_table(report: SizeReport, title: str) -> Table:
    """A report as a table of 80 columns: a section per way of storing, largest groups first."""
    table = Table(title=title, box=box.SIMPLE, padding=0)  # else long names are cut off
    table.add_column("layers")
    for column in ("count", " bits", "MB before", " MB after", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    by_size = sorted(report.groups, key=lambda group: -group.before)
    for kind in dict.fromkeys(group.kind for group in by_size):
        table.add_row(kind, style="bold")
        for g in (group for group in by_size if group.kind == kind):
            table.add_row(f"  {g.name}", f"{g.count}", *_numbers(g.parameters, g.before, g.after))
        table.add_section()
    table.add_row(
        "total", "", *_numbers(report.parameters, report.before, report.after), style="bold"
    )
    return table


def _numbers(parameters: int, before: int, after: int) -> list[str]:
    bits, ratio = 8 * after / max(parameters, 1), before / max(after, 1)
    return [f"{bits:.2f}", f"{before / 1e6:,.2f}", f"{after / 1e6:,.2f}", f"{ratio:.2f}"]


def _is_kernel(path: str) -> bool:
    return path.rsplit("/", 1)[-1] == "kernel"


def _linear(path: str) -> str:
    return path.rsplit("/", 1)[0]


def _prefix(part: str) -> str:
    return f"{part}/" if "/" in part else ""
