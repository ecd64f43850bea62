"""What FLUX.1-dev needs when modulations are made first: `python -m benchmarks.modulation_memory`.

One forward pass at 1024 x 1024 as it is, one that is given its modulations, and the program that
makes those of 50 steps, each compiled by XLA for a described A100 without weights: what its buffer
assignment says. The last two never need to be on the card together.

It needs what `benchmarks.a100_memory` needs.
"""

from __future__ import annotations

import os

# Before jax: the plugin registers its compiler, and no device is looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.a100_memory import abstract_params
from benchmarks.workloads import WORKLOADS, Workload
from lowbit_jax.models.flux import FluxTransformer
from lowbit_jax.models.flux_modulation import modulation_bytes, modulations, split_modulation
from pallas_kernels.audit.compile import ToolError, compile_program
from pallas_kernels.audit.targets import TARGETS

NOW, GIVEN, FIRST = "as it is", "given them", "making them"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile FLUX.1-dev with its modulations made in every step, or before the first."""

    steps: int = 50
    """Steps of a picture."""
    recipes: tuple[str, ...] = ("float", "w8a8", "flux-1.58bit-a8")
    """How the weights are stored."""


def programs(work: Workload, recipe: str, steps: int) -> dict[str, tuple[Callable, tuple]]:
    """Each program with the shapes it takes."""
    model = FluxTransformer(work.config, jnp.bfloat16)
    params = abstract_params(work, recipe)
    each, once = split_modulation(params)
    img, txt, timestep, pooled, img_ids, txt_ids, guidance = work.inputs
    times = jax.ShapeDtypeStruct((steps, *timestep.shape), timestep.dtype)

    def now(params, *inputs):
        return model.apply({"params": params}, *inputs)

    def first(params, times, pooled, guidance):
        return modulations(model, params, times, pooled, guidance)

    def given(params, modulations, img, txt, img_ids, txt_ids):
        named: dict[str, Any] = {"modulations": modulations}
        return model.apply({"params": params}, img, txt, None, None, img_ids, txt_ids, **named)

    made = jax.eval_shape(first, once, times, pooled, guidance)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), made)
    return {
        NOW: (now, (params, *work.inputs)),
        GIVEN: (given, (each, one, img, txt, img_ids, txt_ids)),
        FIRST: (first, (once, times, pooled, guidance)),
    }


def main(argv: list[str] | None = None) -> int:
    """Print a table and the figure line; returns the exit code, 2 without a compiler."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    work = WORKLOADS["flux"]
    title = f"{work.title}; modulations of {options.steps} steps"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("recipe", "program"):
        table.add_column(column, no_wrap=True)
    for column in ("args", "temps", "output", "sum MB"):
        table.add_column(column, justify="right", no_wrap=True)
    figures = []
    try:
        for recipe in options.recipes:
            needed = {}
            for name, (fn, specs) in programs(work, recipe, options.steps).items():
                memory = compile_program(fn, specs, TARGETS["a100"]).memory_analysis()
                assert memory is not None
                sizes = (
                    memory.argument_size_in_bytes,
                    memory.temp_size_in_bytes,
                    memory.output_size_in_bytes,
                )
                needed[name] = sum(sizes)
                table.add_row(recipe, name, *(f"{n / 1e6:,.1f}" for n in (*sizes, sum(sizes))))
            # beside one step's modulations, those of the others stay on the card
            loop = needed[GIVEN] + modulation_bytes(work.config, options.steps - 1)
            label = recipe.replace("-", "_").replace(".", "_")
            figures.append(f"{label}_ratio={needed[NOW] / max(loop, needed[FIRST]):.3f}")
    except ToolError as error:
        print(f"modulation_memory: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    print("figure: " + " ".join(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
