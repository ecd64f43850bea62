"""What FLUX.1-dev takes on a GPU, prompt to picture: `python -m benchmarks.pipeline_memory`.

XLA compiles every program of `FluxPipeline` for a described GPU, on any machine and without
weights: exact figures of its buffer assignment. Not counted is what lies outside a program: the
CUDA context, the allocator's reserve, and the workspaces of cuDNN (attention, convolutions) and
cuBLAS, for which a device must be asked.

It needs the compiler, and cuDNN: `pip install 'lowbit-jax[audit]' nvidia-cudnn-cu12`.
"""

from __future__ import annotations

import os

# Before jax: the plugin registers its compiler, and no device is looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from lowbit_jax.models.autoencoder_kl import FLUX_VAE, AutoencoderConfig
from lowbit_jax.models.clip_text import CLIP_L, ClipTextConfig
from lowbit_jax.models.flux import FLUX_DEV, FluxConfig
from lowbit_jax.models.flux_modulation import split_modulation
from lowbit_jax.models.registry import MODELS
from lowbit_jax.models.t5 import T5_XXL, T5Config
from lowbit_jax.pipelines import flux_programs as programs
from lowbit_jax.pipelines.flux_pipeline import MODULATION, TRANSFORMER, TextStates
from lowbit_jax.pipelines.folder import FLUX
from lowbit_jax.quant import RECIPES, quantize
from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.samplers.flow_euler import FLUX_DEV_SCHEDULE, euler_steps
from pallas_kernels.audit.compile import ToolError, compile_program
from pallas_kernels.audit.targets import TARGETS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile FLUX.1-dev's whole pipeline for a GPU and print what it would allocate."""

    gpu: str = "a10"
    """Which of the audit's GPUs."""
    recipe: str = "flux-1.58bit"
    """Of the transformer."""
    text_recipe: str = "w8a16"
    """Of T5."""
    pixels: int = 1024
    """Height and width."""
    tokens: int = 512
    """Of T5."""
    steps: int = 28
    """Of the sampler: their modulations are made before the first."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The configs of a pipeline's parts, published ones by default."""

    clip: ClipTextConfig = CLIP_L
    t5: T5Config = T5_XXL
    flux: FluxConfig = FLUX_DEV
    vae: AutoencoderConfig = FLUX_VAE


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One program of the pipeline.

    Attributes:
        part: whose parameters it takes.
        run: the program, from its parameters and inputs.
        params: shapes of all parameters of the part.
        inputs: shapes of the rest.
    """

    part: str
    run: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one stage: parameters of its part, and all that a call takes besides."""

    weights: int
    call: int


def stages(options: Options, sizes: Sizes | None = None) -> list[Stage]:
    """The programs that a picture goes through, in bfloat16, for one picture at a time."""
    sizes = sizes or Sizes()
    configs = dict(zip(FLUX.models, (sizes.clip, sizes.t5, sizes.flux, sizes.vae), strict=True))
    recipes = {"transformer": options.recipe, "text_encoder_2": options.text_recipe}
    side = programs.PATCH * sizes.vae.pixels
    grid = (options.pixels // side, options.pixels // side)
    shape, count = jax.ShapeDtypeStruct, grid[0] * grid[1]
    narrow = partial(shape, dtype=jnp.bfloat16)
    tokens = shape((1, count, sizes.flux.in_channels), jnp.float32)
    texts = TextStates(
        pooled=narrow((1, sizes.flux.vec_in_dim)),
        states=narrow((1, options.tokens, sizes.flux.context_in_dim)),
    )
    steps = euler_steps(FLUX_DEV_SCHEDULE.sigmas(options.steps, count))
    now = jax.tree.map(lambda leaf: shape((), leaf.dtype), steps)
    times = shape((options.steps,), jnp.float32)
    scale = shape((1,), jnp.float32) if sizes.flux.guidance_embed else None
    positions = sizes.clip.max_position_embeddings
    models = {name: MODELS[model] for name, model in FLUX.models.items()}
    modules = {name: m.module(configs[name], jnp.bfloat16) for name, m in models.items()}
    params = {}
    for name, model in models.items():
        floats = model.abstract_params(configs[name], jnp.bfloat16)
        recipe = RECIPES[recipes.get(name, "float")]
        params[name] = jax.eval_shape(partial(quantize, recipe=recipe), floats)
    params[TRANSFORMER], params[MODULATION] = split_modulation(params[TRANSFORMER])
    modules[MODULATION] = modules[TRANSFORMER]
    made = partial(programs.step_modulations, modules[MODULATION])
    given = jax.eval_shape(made, params[MODULATION], times, texts.pooled, scale)
    one = jax.tree.map(lambda leaf: shape(leaf.shape[1:], leaf.dtype), given)
    calls: dict[str, tuple[Callable, tuple]] = {
        "text_encoder": (programs.pooled_vector, (shape((1, positions), jnp.int32),)),
        "text_encoder_2": (programs.text_states, (shape((1, options.tokens), jnp.int32),)),
        MODULATION: (programs.step_modulations, (times, texts.pooled, scale)),
        TRANSFORMER: (
            partial(programs.sampler_step, grid=grid),
            (tokens, texts.states, now, one),
        ),
        "vae": (partial(programs.decoded, grid=grid), (tokens,)),
    }
    return [
        Stage(part=part, run=partial(run, modules[part]), params=params[part], inputs=inputs)
        for part, (run, inputs) in calls.items()
    ]


def need(stage: Stage, gpu: str) -> Need:
    """Compile a stage.

    Raises:
        ToolError: a piece of the compiler is missing.
    """
    memory = compile_program(
        stage.run, (stage.params, *stage.inputs), TARGETS[gpu]
    ).memory_analysis()
    assert memory is not None
    besides = memory.temp_size_in_bytes + memory.output_size_in_bytes + tree_bytes(stage.inputs)
    return Need(weights=tree_bytes(stage.params), call=besides)


def totals(needs: Mapping[str, Need]) -> tuple[int, int]:
    """Peak bytes with one part in memory at a time, and with all of them."""
    one = max(item.weights + item.call for item in needs.values())
    return one, sum(item.weights for item in needs.values()) + max(n.call for n in needs.values())


def main(argv: list[str] | None = None) -> int:
    """Print the table and the figure line; returns the exit code, 2 without a compiler."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        needs = {stage.part: need(stage, options.gpu) for stage in stages(options)}
    except ToolError as error:
        print(f"pipeline_memory: {error}", file=sys.stderr)
        return 2
    title = f"FLUX.1-dev on {options.gpu}, {options.pixels} x {options.pixels}, MB (1e6)"
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("part")
    for column in ("weights", "call", "sum"):
        table.add_column(column, justify="right")
    for part, item in needs.items():
        cells = item.weights, item.call, item.weights + item.call
        table.add_row(part, *(f"{size / 1e6:,.0f}" for size in cells))
    Console().print(table)
    one, everything = totals(needs)
    print(f"figure: sequential_peak_GB={one / 1e9:.2f} resident_peak_GB={everything / 1e9:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
