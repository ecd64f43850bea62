"""What a step of distilling FLUX.1-dev's scales takes on a GPU.

    python -m benchmarks.distill_memory

Rung 5a of the ladder to 1.58 bits (`docs/evidence-ternary.md`): the whole model is quantised, its
codes stay packed, and only scales, biases and norms have gradients and moments; blocks keep their
input and are computed again in the backward pass. The step, Adam included, is compiled by XLA for a
described GPU without weights: what its buffer assignment says. Targets are read from trajectories,
so the float model is not on the card.

It needs what `benchmarks.a100_memory` needs.
"""

from __future__ import annotations

import os

# Before jax: the plugin registers its compiler, and no device is looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.a100_memory import abstract_params
from benchmarks.workloads import flux_workload
from lowbit_jax.calibration.drivers import flux_run
from lowbit_jax.distill import latent, split, train
from lowbit_jax.distill.velocity import velocity_loss
from lowbit_jax.models.flux import FLUX_DEV, FluxConfig, FluxTransformer
from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.samplers.flow_euler import FLUX_DEV_SCHEDULE
from pallas_kernels.audit.compile import ToolError, compile_program
from pallas_kernels.audit.targets import TARGETS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile a training step of FLUX.1-dev's scales and print what it would allocate."""

    gpu: str = "a100"
    """Which of the audit's GPUs."""
    pixels: int = 1024
    """Height and width."""
    batch: int = 1
    """Forwards of a step."""


def program(config: FluxConfig, pixels: int, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """A step and the shapes it takes: the state of the training, frozen leaves, a batch."""
    work = flux_workload(config, pixels)
    quantized = abstract_params(work, "flux-1.58bit")
    parts = split.split(jax.eval_shape(latent.rescaled, quantized), split.SCALES)
    wide = {n: jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in parts.trained.items()}
    options, side = train.Options(steps=100, batch=batch), pixels // 16
    model = FluxTransformer(config, jnp.bfloat16, remat=True)
    run = flux_run(model, FLUX_DEV_SCHEDULE.sigmas(16, side * side), grid=(side, side))
    shape, (x, txt, _, pooled, *_) = jax.ShapeDtypeStruct, work.inputs
    rows = lambda leaf, dtype: shape((batch, *leaf.shape[1:]), dtype)  # noqa: E731
    guidance = shape((batch,), jnp.float32) if config.guidance_embed else None
    conditions = rows(txt, jnp.bfloat16), rows(pooled, jnp.bfloat16), guidance
    states = {
        "x": rows(x, jnp.float32),
        "output": rows(x, jnp.float32),
        "timestep": shape((batch,), jnp.float32),
        "conditions": conditions,
    }
    state = {
        "trained": wide,
        "optimizer": jax.eval_shape(options.optimizer().init, wide),
        "losses": shape((options.steps,), jnp.float32),
        "step": shape((), jnp.int32),
    }
    loss = velocity_loss(run)
    step = train.step_program(loss, parts.structure, parts.names, tuple(wide), options)
    return step, (state, parts.frozen, states)


def main(argv: list[str] | None = None) -> int:
    """Print the figures; returns the exit code, 2 without a compiler."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    step, specs = program(FLUX_DEV, options.pixels, options.batch)
    try:
        memory = compile_program(step, specs, TARGETS[options.gpu]).memory_analysis()
    except ToolError as error:
        print(f"distill_memory: {error}", file=sys.stderr)
        return 2
    assert memory is not None
    state, frozen, _ = map(tree_bytes, specs)
    print(
        f"FLUX.1-dev, {options.pixels} x {options.pixels}, batch {options.batch}: frozen leaves "
        f"{frozen / 1e6:,.0f} MB, trained ones with moments {state / 1e6:,.0f} MB, temporaries "
        f"{memory.temp_size_in_bytes / 1e6:,.0f} MB"
    )
    # the new state is written over the old one where the caller gives it away, as `fit` does
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"figure: scales_step_GB={total / 1e9:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
