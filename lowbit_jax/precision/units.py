"""Units: what is given its bits as one, such as the attention of one block, and what judges it.

ViDiT-Q (section 4.3 of the paper) quantises one layer type of one block at a time and scores it by
the metric that fits its type: text alignment for cross-attention, visual quality for spatial
attention and feed-forward layers, temporal consistency for temporal attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_jax import ops
from lowbit_jax.quant.stacks import iter_layers

# "double_blocks/3/img_attn/qkv" -> stack, block, kind "img_attn"; "blocks/3/temporal/mlp/fc1" ->
# kind "temporal/mlp": a layer of Latte and STDiT3 is a pair of blocks
_LAYER = re.compile(
    r"(?P<stack>[a-z_]*blocks)/(?P<block>\d+)/(?P<kind>(?:(?:spatial|temporal)/)?[^/]+)(?:/.*)?"
)

METRICS: tuple[tuple[str, str], ...] = (
    (r"(.*/)?cross_attn", "text"),
    (r"txt_.*", "text"),  # FLUX's text stream
    (r"attn_temp|temporal/attn", "time"),
    (r".*", "quality"),
)
"""Which metric judges units of which kind: the first regular expression that matches."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Some linears of one block.

    Attributes:
        stack: whose block it is.
        block: number of the block.
        kind: what it is in the block, such as "img_attn".
        metric: that judges it; units of one metric are a group.
        layers: layer paths of its linears.
        weights: number of weights in them.
    """

    stack: str
    block: int
    kind: str
    metric: str
    layers: tuple[str, ...]
    weights: int

    @property
    def name(self) -> str:
        """Such as "double_blocks/3/img_attn"."""
        return f"{self.stack}/{self.block}/{self.kind}"


def find_units(params: Any, metrics: Sequence[tuple[str, str]] = METRICS) -> list[Unit]:
    """The units of a model: all linears of its blocks, in the order of stacks, kinds and blocks.

    Linears outside the blocks (embedders, final layer) are in none: they stay in floating point, as
    in every recipe here.

    Args:
        params: parameters, or their shapes.
        metrics: see `METRICS`.

    Raises:
        ValueError: a kind that no entry of `metrics` matches; a model without blocks.
    """
    found: dict[tuple[str, str, int], list[tuple[str, int]]] = {}
    for path, kernel, _ in iter_layers(params):
        match = _LAYER.fullmatch(path)
        if match is not None:
            key = match["stack"], match["kind"], int(match["block"])
            k, n = ops.logical_shape(kernel)[-2:]
            found.setdefault(key, []).append((path, k * n))
    if not found:
        raise ValueError("the model has no linear in a stack of blocks: there is nothing to choose")
    return [
        Unit(
            stack=stack,
            block=block,
            kind=kind,
            metric=metric_of(kind, metrics),
            layers=tuple(path for path, _ in linears),
            weights=sum(size for _, size in linears),
        )
        for (stack, kind, block), linears in sorted(found.items())
    ]


def metric_of(kind: str, metrics: Sequence[tuple[str, str]] = METRICS) -> str:
    """The metric that judges units of a kind.

    Raises:
        ValueError: none does.
    """
    for pattern, metric in metrics:
        if re.fullmatch(pattern, kind):
            return metric
    raise ValueError(f"no metric for units of kind '{kind}': add one, such as ('.*', 'quality')")
