"""What one forward pass allocates on an A100: `python -m benchmarks.a100_memory`.

XLA compiles the whole network for a described A100, on any machine and without weights, and says
what it would allocate there: exact figures of its buffer assignment, not a model of them. What it
leaves out is what lies outside a program: the CUDA context, the allocator's reserve, and cuDNN's
workspace, which only a device can be asked for.

It needs the compiler, and cuDNN for its attention: `pip install 'lowbit-jax[audit]'
nvidia-cudnn-cu12`.
"""

from __future__ import annotations

import os

# Before jax: the plugin registers its compiler, and no device is looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import WORKLOADS, Workload
from lowbit_jax.models import attention as attention_module
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.stacks import is_stack, kernels, segments
from lowbit_jax.quant.transform import quantize
from pallas_kernels.audit.compile import ToolError, compile_program
from pallas_kernels.audit.targets import TARGETS

FLOAT, TERNARY = "float", "flux-1.58bit"
QUANTIZED = ("w8a8", "w4a8", TERNARY, "flux-1.58bit-a8")
CUDNN, CHUNKED = "cuDNN", "chunked"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile whole networks for the A100 and print what they would allocate."""

    models: tuple[str, ...] = tuple(WORKLOADS)
    """Which networks, by their names in the registry."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one compiled forward pass.

    Attributes:
        attention: what there is in the compiled program. Where a caption is masked, its attention
            is in chunks in either case.
        arguments: parameters and inputs.
        temporaries: what XLA allocates besides, at most at any time.
        output: the result.
        peak: the largest sum of all that is alive.
    """

    attention: str
    arguments: int
    temporaries: int
    output: int
    peak: int

    @property
    def needed(self) -> int:
        """Arguments and temporaries: what the ratios compare."""
        return self.arguments + self.temporaries


def footprint(work: Workload, recipe: str, *, fused: bool = True, gpu: str = "a100") -> Footprint:
    """Compiles a forward pass in bfloat16 under a recipe.

    Args:
        work: what to compile.
        recipe: a named recipe.
        fused: whether attention may be cuDNN's.
        gpu: a key of `pallas_kernels.audit.targets.TARGETS`.

    Raises:
        ToolError: a piece of the compiler is missing.
    """
    network = NETWORKS[work.network]
    model = network.module(work.config, jnp.bfloat16)
    params = abstract_params(work, recipe)
    forward = lambda params, *inputs: model.apply({"params": params}, *inputs)  # noqa: E731
    allowed = fused and attention_module.cudnn_is_known()
    with mock.patch.object(attention_module, "cudnn_is_known", lambda: allowed):
        compiled = compile_program(forward, (params, *work.inputs), TARGETS[gpu])
    memory = compiled.memory_analysis()
    assert memory is not None
    return Footprint(
        attention=CUDNN if "__cudnn$fmha" in compiled.as_text() else CHUNKED,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
    )


def abstract_params(work: Workload, recipe: str) -> Any:
    """Shapes of a network's parameters, bfloat16 where a recipe leaves them in floating point."""
    params = NETWORKS[work.network].abstract_params(work.config, jnp.bfloat16)
    return jax.eval_shape(partial(quantize, recipe=RECIPES[recipe]), params)


def weights(work: Workload) -> tuple[int, int]:
    """(linear weights of all blocks, of the largest block): bytes if unpacked to one each."""
    per_block = [
        (length, sum(math.prod(kernel.shape[1:]) for _, kernel in kernels(tree)))
        for stack in abstract_params(work, FLOAT).values()
        if is_stack(stack)
        for _, length, tree in segments(stack)
    ]
    return sum(length * size for length, size in per_block), max(size for _, size in per_block)


def measure(work: Workload) -> dict[tuple[str, str], Footprint]:
    """All recipes with the best attention there is; the float and ternary one with the other."""
    cases = [(recipe, True) for recipe in (FLOAT, *QUANTIZED)]
    if attention_module.cudnn_is_known():
        cases += [(FLOAT, False), (TERNARY, False)]
    found = [(recipe, footprint(work, recipe, fused=fused)) for recipe, fused in cases]
    return {(recipe, one.attention): one for recipe, one in found}


def ratio(rows: dict[tuple[str, str], Footprint], recipe: str, attention: str) -> float:
    """How many times less than bfloat16 weights with the same attention."""
    return rows[FLOAT, attention].needed / rows[recipe, attention].needed


def table(work: Workload, rows: dict[tuple[str, str], Footprint]) -> Table:
    """One row per recipe and attention. MB is 1e6 bytes."""
    out = Table(title=work.title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("recipe", "attention"):
        out.add_column(column, no_wrap=True)
    for column in ("args", "temps", "sum MB", "output", "peak", "ratio"):
        out.add_column(column, justify="right", no_wrap=True)
    for (recipe, attention), one in rows.items():
        sizes = one.arguments, one.temporaries, one.needed, one.output, one.peak
        cells = [f"{size / 1e6:,.1f}" for size in sizes]
        out.add_row(recipe, attention, *cells, f"{ratio(rows, recipe, attention):.2f}")
    return out


def remarks(work: Workload, rows: dict[tuple[str, str], Footprint]) -> list[str]:
    """What the temporaries say about unpacked weights and about attention."""
    best = next(iter(rows.values())).attention
    more = rows[TERNARY, best].temporaries - rows[FLOAT, best].temporaries
    everything, block = weights(work)
    lines = [
        f"ternary temporaries are {more / 1e6:+,.1f} MB against bfloat16's; unpacked to a byte, "
        f"one block would take {block / 1e6:,.1f} MB and all {everything / 1e6:,.1f} MB"
    ]
    if (TERNARY, CHUNKED) in rows and best == CUDNN:
        cost = rows[TERNARY, CHUNKED].temporaries - rows[TERNARY, CUDNN].temporaries
        lines.append(f"chunked attention takes {cost / 1e6:+,.1f} MB against cuDNN's")
    if best == CHUNKED:
        lines.append("attention is chunked: with nvidia-cudnn-cu12 installed it is cuDNN's")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print a table per model and the figure line; returns the exit code, 2 without a compiler."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    if unknown := set(options.models) - set(WORKLOADS):
        print(f"no model {sorted(unknown)}; there are {', '.join(WORKLOADS)}", file=sys.stderr)
        return 2
    console = Console()
    figures = []
    try:
        for name in options.models:
            work = WORKLOADS[name]
            rows = measure(work)
            console.print(table(work, rows))
            print("\n".join(remarks(work, rows)))
            best = next(iter(rows.values())).attention
            figures += [
                f"{name.replace('-', '_')}_{label}_memory_ratio={ratio(rows, recipe, best):.3f}"
                for label, recipe in (("ternary", TERNARY), ("w8a8", "w8a8"))
            ]
    except ToolError as error:
        print(f"a100_memory: {error}", file=sys.stderr)
        return 2
    print("figure: " + " ".join(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
