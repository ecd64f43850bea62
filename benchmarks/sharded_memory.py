"""What each of several devices would allocate: `python -m benchmarks.sharded_memory`.

One forward pass of FLUX.1-dev at 1024 x 1024, split over described A100s or TPU v5e chips, compiled
by XLA on any machine and without weights. The figures are those of its buffer assignment for one
device; the collectives are counted in the compiled program. Nothing is run, no speed is claimed.

A100s need `pip install 'lowbit-jax[audit]' nvidia-cudnn-cu12`, TPUs `lowbit-jax[tpu]`.
"""

from __future__ import annotations

import os

# Before jax: no device is looked for, and libtpu asks no cloud which machine this is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import re
import sys
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.a100_memory import abstract_params
from benchmarks.workloads import WORKLOADS, Workload
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.sharding.place import shard
from lowbit_jax.sharding.plans import named_plan
from pallas_kernels.audit.compile import ToolError, compile_program, described_devices
from pallas_kernels.audit.targets import TARGETS

AXES = {"tensor": "model", "fsdp": "data", "data": "data"}
V5E = {4: "v5e:2x2", 8: "v5e:2x4"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile a sharded forward pass and print what one device would allocate."""

    platform: str = "a100"
    """a100 or v5e."""
    devices: tuple[int, ...] = (4,)
    """How many; of v5e 4 or 8."""
    plans: tuple[str, ...] = ("tensor",)
    """tensor, fsdp, data."""
    recipes: tuple[str, ...] = ("float", "w8a8", "flux-1.58bit-a8")
    """How the weights are stored."""
    model: str = "flux"
    """Which network, by its name in the registry."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One device of a compiled program.

    Attributes:
        arguments: bytes of its parameters and inputs.
        temporaries: bytes XLA allocates besides, at most at any time.
        collectives: how many of each kind the program holds; those of a scanned block once.
    """

    arguments: int
    temporaries: int
    collectives: Counter[str]


def mesh_of(platform: str, count: int, axis: str) -> Mesh:
    """Described devices along one axis.

    Raises:
        ToolError: a piece of the compiler is missing, or no such devices are known.
    """
    if platform in TARGETS:
        return Mesh(np.array(described_devices(TARGETS[platform], count)), (axis,))
    if platform != "v5e" or count not in V5E:
        raise ToolError(f"{count} devices of '{platform}' are not described")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(V5E[count], platform="tpu")
    except Exception as error:
        raise ToolError(f"no TPU compiler ({error}); pip install 'lowbit-jax[tpu]'") from error
    return Mesh(np.array(found.devices).reshape(-1), (axis,))


def share(work: Workload, recipe: str, plan: str, mesh: Mesh, platform: str) -> Share:
    """Compiles a forward pass in bfloat16 for a mesh; batches are split over its axis "data"."""
    model = NETWORKS[work.network].module(work.config, jnp.bfloat16)
    chosen = named_plan(plan, work.network, work.config)
    params = shard(abstract_params(work, recipe), mesh, chosen)
    whole = NamedSharding(mesh, P())
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in work.inputs]

    def forward(params, *inputs):
        return model.apply({"params": params}, *inputs)

    if platform in TARGETS:
        compiled = compile_program(forward, (params, *inputs), TARGETS[platform], mesh)
    else:
        compiled = jax.jit(forward).lower(params, *inputs).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    kinds = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return Share(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=Counter(re.findall(kinds, text)),
    )


def main(argv: list[str] | None = None) -> int:
    """Print a table and the figure line; returns the exit code, 2 without a compiler."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.model not in WORKLOADS:
        print(f"no model '{options.model}'; there are {', '.join(WORKLOADS)}", file=sys.stderr)
        return 2
    work = WORKLOADS[options.model]
    figures: list[str] = []
    moved: list[str] = []
    title = f"{work.title}; each {options.platform}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("plan", "recipe"):
        table.add_column(column, no_wrap=True)
    for column in ("devices", "args MB", "temps MB", "sum MB"):
        table.add_column(column, justify="right", no_wrap=True)
    try:
        for plan in options.plans:
            for count in options.devices:
                mesh = mesh_of(options.platform, count, AXES[plan])
                for recipe in options.recipes:
                    one = share(work, recipe, plan, mesh, options.platform)
                    needed = one.arguments + one.temporaries
                    sizes = [f"{n / 1e6:,.1f}" for n in (one.arguments, one.temporaries, needed)]
                    kinds = ", ".join(f"{n} {kind}" for kind, n in one.collectives.items())
                    moved.append(f"{plan} {recipe} on {count}: {kinds or 'nothing'}")
                    table.add_row(plan, recipe, str(count), *sizes)
                    name = f"{plan}_{recipe}_{options.platform}x{count}"
                    figures.append(f"{re.sub(r'[^a-z0-9]', '_', name)}_GB={needed / 1e9:.3f}")
    except ToolError as error:
        print(f"sharded_memory: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    print("collectives in the program, those of scanned blocks once:", *moved, sep="\n  ")
    print("figure: " + " ".join(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
