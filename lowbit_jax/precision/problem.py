"""A scan and a budget as the numbers of an integer programme.

Items 0 to u - 1 are the weights of the units, items u to 2u - 1, where activations are chosen too,
their activations. Levels are in the order of the scan, floating point last.

Shape letters: u units, v levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from lowbit_jax.models.registry import NETWORKS, read_config
from lowbit_jax.precision.menu import FLOAT_BITS, planned_sizes, unit_bytes
from lowbit_jax.precision.programme import AllocationError, Budget, Programme
from lowbit_jax.precision.records import MSE, Header
from lowbit_jax.precision.sensitivity import Sensitivity
from lowbit_jax.quant.recipe import Recipe
from lowbit_jax.quant.stacks import is_stack, segments

Scheme = Literal["metric", "mse"]
Place = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted. Give `bytes` or `mean_bits`.

    Attributes:
        bytes: the model may take in memory, embedders, biases and norms included.
        mean_bits: the same as bits per parameter, as `lowbit-jax inspect` counts them.
        scheme: "metric" for both levels, "mse" for the first alone, see `precision.allocate`.
        act_bits: of the activations of all quantised units; None: floating point.
        mean_act_bits: choose them too, to this mean (weighted by the weights they meet), in place
            of `act_bits`; the scan must have tried some.
        segments: of all stacks together, at most; None: any number.
        like: recipe that lends balance, rotation, error feedback and static scales to every rule,
            see `rules.rule_of`. The harms are those of the scan, which had none of them.

    Raises:
        AllocationError: no budget, or two; an unknown scheme; `like` with `mean_act_bits`, as it
            may leave inputs in floating point that a budget of activation bits would count.
    """

    bytes: int | None = None
    mean_bits: float | None = None
    scheme: Scheme = "metric"
    act_bits: int | None = 8
    mean_act_bits: float | None = None
    segments: int | None = 8
    like: Recipe | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.mean_bits is None):
            raise AllocationError(
                f"bytes is {self.bytes} and mean_bits {self.mean_bits}: give one of them"
            )
        if self.scheme not in get_args(Scheme):
            raise AllocationError(f"scheme '{self.scheme}' is none of {get_args(Scheme)}")
        if self.like is not None and self.mean_act_bits is not None:
            raise AllocationError(
                f"mean_act_bits {self.mean_act_bits:g} with like '{self.like.name}': give act_bits"
            )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an allocation chooses from.

    Attributes:
        header: of the scan.
        harms: of every item and level, by measure, see `monotone`.
        metrics: which measure judges each item.
        budgets: of bytes, and of activation bits where they are chosen.
        places: where stacks can be cut.
        cuts: how often they may be; None: any number.
        implications: activations of floating weights stay floating.
        kernel_bytes: of every unit in every level.
        base_segments: segments of the floating model.
    """

    header: Header
    harms: dict[str, list[Float64[np.ndarray, "v"]]]
    metrics: list[str]
    budgets: list[Budget]
    places: list[Place]
    cuts: int | None
    implications: list[tuple[int, int, int, int]]
    kernel_bytes: Int64[np.ndarray, "u v"]
    base_segments: int

    def programme(
        self, harms: Sequence[Float64[np.ndarray, "v"]], budgets: Sequence[Budget]
    ) -> Programme:
        """To be solved: with these harms and budgets and all other bounds."""
        return Programme(
            harms=harms,
            budgets=budgets,
            places=self.places,
            cuts=self.cuts,
            implications=self.implications,
        )


def pose(sensitivity: Sensitivity, request: Request) -> Problem:
    """The problem of a finished scan and a request.

    Raises:
        AllocationError: what is wanted is less than the least there is, with both numbers; mean
            activation bits without a scan of activations.
    """
    header = sensitivity.header
    params, units = abstract_params(header), header.units
    kernel_bytes = unit_bytes(params, units, header.menu, request.like)
    parts: list[tuple[Any, Any]] = [(sensitivity.weights, kernel_bytes)]
    budgets = [_bytes_budget(params, kernel_bytes, request)]
    stacks = list(stacks_of(params))
    _check_segments(request, len(stacks))
    if request.mean_act_bits is not None:
        costs = _act_costs(header, request.mean_act_bits)
        parts.append((sensitivity.acts, costs))
        limit = int(request.mean_act_bits * sum(unit.weights for unit in units))
        items = range(len(units), 2 * len(units))
        budgets.append(Budget(name="act bits x weights", items=items, costs=costs, limit=limit))
    chooses_acts = len(parts) == 2
    return Problem(
        header=header,
        harms={
            measure: [row for found, costs in parts for row in monotone(found[measure], costs)]
            for measure in (MSE, *header.reference)
        },
        metrics=[unit.metric for unit in units] * len(parts),
        budgets=budgets,
        places=_places(header, stacks, chooses_acts),
        cuts=None if request.segments is None else request.segments - len(stacks),
        implications=[
            (i, len(header.menu), len(units) + i, len(header.act_bits)) for i in range(len(units))
        ]
        if chooses_acts
        else [],
        kernel_bytes=kernel_bytes,
        base_segments=len(stacks),
    )


def monotone(
    harms: Float64[np.ndarray, "u v"], costs: Int64[np.ndarray, "u v"]
) -> Float64[np.ndarray, "u v"]:
    """Harms such that no cheaper level of a unit does less harm than a dearer one, or less than 0.

    Of few samples a measured harm of many bits is noise, and may be negative: an integer programme
    would buy noise. The harm of a level is taken as the largest of those that cost as much or more.
    """
    out = np.empty_like(harms)
    for row, (harm, cost) in enumerate(zip(harms, costs, strict=True)):
        for v in range(len(harm)):
            out[row, v] = max(0.0, harm[cost >= cost[v]].max())
    return out


def abstract_params(header: Header) -> Any:
    """The scanned model's parameters as shapes; what is not quantised in bfloat16."""
    config = read_config(header.model, header.config)
    return NETWORKS[header.model].abstract_params(config, jnp.bfloat16)


def stacks_of(params: Any) -> list[tuple[str, int, int]]:
    """(stack, first block, number of blocks) of every segment of a model."""
    return [
        (name, first, length)
        for name, node in params.items()
        if is_stack(node)
        for first, length, _ in segments(node)
    ]


def _bytes_budget(params: Any, kernel_bytes: np.ndarray, request: Request) -> Budget:
    """Of the units' kernels; all else is stored whatever is chosen."""
    floating = planned_sizes(params, Recipe(name="float"))
    rest = floating.after - int(kernel_bytes[:, -1].sum())
    wanted = request.bytes
    if wanted is None:
        assert request.mean_bits is not None
        wanted = int(request.mean_bits * floating.parameters / 8)
    least = rest + int(kernel_bytes.min(axis=1).sum())
    if wanted < least:
        wanted_bits, least_bits = (8 * size / floating.parameters for size in (wanted, least))
        raise AllocationError(
            f"{wanted:,} bytes, {wanted_bits:.3f} bits per weight, cannot be reached: the smallest "
            f"is {least:,} bytes, {least_bits:.3f} bits per weight, of which {rest:,} bytes are "
            "what no level changes (embedders, final layer, biases, norms)"
        )
    items = range(len(kernel_bytes))
    return Budget(name="bytes", items=items, costs=list(kernel_bytes), limit=wanted - rest)


def _act_costs(header: Header, wanted: float) -> list[Int64[np.ndarray, "v"]]:
    if not header.act_bits:
        raise AllocationError("the scan tried no activation bits: give act_bits for all instead")
    if wanted < min(header.act_bits):
        raise AllocationError(
            f"{wanted:g} mean activation bits cannot be reached: {min(header.act_bits)} are the "
            "fewest that were scanned"
        )
    bits = np.array([*header.act_bits, FLOAT_BITS], np.int64)
    return [bits * unit.weights for unit in header.units]


def _check_segments(request: Request, base: int) -> None:
    if request.segments is not None and request.segments < base:
        raise AllocationError(
            f"{request.segments} segments cannot be reached: the floating model has {base}"
        )


def _places(header: Header, stacks: Sequence[tuple[str, int, int]], acts: bool) -> list[Place]:
    """Pairs of items on both sides of every place where a segment can be cut."""
    blocks: dict[tuple[str, int], dict[str, int]] = {}
    for i, unit in enumerate(header.units):
        blocks.setdefault((unit.stack, unit.block), {})[unit.kind] = i
    found = []
    for stack, first, length in stacks:
        for block in range(first, first + length - 1):
            after = blocks[stack, block + 1]
            pairs = [(i, after[kind]) for kind, i in blocks[stack, block].items()]
            shift = len(header.units)
            found.append([*pairs, *((i + shift, j + shift) for i, j in pairs if acts)])
    return found
