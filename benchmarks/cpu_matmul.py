"""What quantised layers cost on this CPU: `python -m benchmarks.cpu_matmul`.

Single matrix products in every form, then one double and two single blocks of FLUX.1 at full width
(1024 image and 512 text tokens) under the recipes that have a float model to beat. Quantising the
activations, scales and the cast to bfloat16 are inside the time. The forms take turns, and a ratio
is taken within each round, because the machine may not be ours alone. Weights are random numbers:
no time here depends on them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Times, interleaved
from lowbit_jax import ops
from lowbit_jax.models import flux
from lowbit_jax.quant.qtensor import QTensor, is_qtensor
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from pallas_kernels import reference, reference_rows
from pallas_kernels.formats import FORMATS, pack_codes

LAYERS = ((3072, 9216), (3072, 12288), (12288, 3072), (1152, 4608))  # (k, n): FLUX, DiT-XL
ROWS = (1, 256, 1024 + 512)  # a modulation, DiT at 256 pixels, FLUX at 512
BASE = "bf16"
BLOCKS = {
    "bf16": "float",
    "w8a8": "w8a8",
    "ternary": "flux-1.58bit",
    "ternary_a8": "flux-1.58bit-a8",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time matrix products and FLUX blocks on the CPU, every form side by side."""

    rounds: int = 5
    """Times each form is run, after one that compiles."""
    blocks: tuple[int, int] = (1, 2)
    """Number of double and of single blocks."""
    hidden: int = 3072
    """Width of the blocks, a multiple of 128."""
    tokens: tuple[int, int] = (1024, 512)
    """Image tokens (a square number) and text tokens."""
    layers: bool = True
    """Also time the single products; they do not depend on the other options."""


def main(argv: list[str] | None = None) -> None:
    """Print a table per number of rows, one of the blocks, and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    console = Console()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} processors, {load:.1f} busy at the start; {options.rounds} rounds")
    if options.layers:
        for rows in ROWS:
            timed = {f"{k} x {n}": time_layer(rows, k, n, options.rounds) for k, n in LAYERS}
            console.print(layers_table(rows, timed))
    times = time_blocks(options)
    console.print(blocks_table(options, times))
    ratios = [
        f"{name}_vs_bf16={times[name].ratio(times[BASE]):.3f}" for name in BLOCKS if name != BASE
    ]
    print("figure: " + " ".join(ratios))


def time_layer(rows: int, k: int, n: int, rounds: int) -> dict[str, Times]:
    """Every form of one product of `rows` bfloat16 (in float32: float32) rows."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, k), np.float32), jnp.bfloat16)
    kernel = some_normals(rng, (k, n))
    weights = {name: random_qtensor(rng, name, n, k) for name in ("int8", "int4", "ternary")}
    a8 = {name: dataclasses.replace(weight, act_bits=8) for name, weight in weights.items()}
    forms: dict[str, tuple[Callable, Any, Any]] = {
        "float32": (ops.linear, x.astype(jnp.float32), kernel.astype(jnp.float32)),
        BASE: (ops.linear, x, kernel),
        "W8A8, int8 dot": (int8_dot, x, a8["int8"]),
        "W8A8": (ops.linear, x, a8["int8"]),
        "W4A8": (ops.linear, x, a8["int4"]),
        "ternary A8": (ops.linear, x, a8["ternary"]),
        "ternary A16": (ops.linear, x, weights["ternary"]),
    }
    jitted = {function: jax.jit(function) for function, _, _ in forms.values()}
    calls = {name: partial(jitted[f], x, weight) for name, (f, x, weight) in forms.items()}
    return interleaved(calls, rounds)


def int8_dot(x, weight: QTensor):
    """W8A8 with XLA's product of int8 codes: exact at any size, and no faster on a CPU."""
    rows = reference_rows.quantize_rows(x)
    y = reference.matmul_int32(rows.codes, weight.unpacked())
    return (y * rows.scale * weight.scale[:, 0]).astype(x.dtype)


def time_blocks(options: Options) -> dict[str, Times]:
    """A FLUX of few blocks under each recipe of `BLOCKS`, embedders and final layer included."""
    config = flux.FluxConfig(
        hidden_size=options.hidden,
        num_heads=options.hidden // 128,
        depth=options.blocks[0],
        depth_single_blocks=options.blocks[1],
    )
    rng = np.random.default_rng(0)
    image, text = options.tokens
    side = round(image**0.5)
    if side * side != image:
        raise SystemExit(f"{image} image tokens are no square picture")
    inputs = [
        some_normals(rng, (1, image, config.in_channels)),
        some_normals(rng, (1, text, config.context_in_dim)),
        jnp.full((1,), 0.5),
        some_normals(rng, (1, config.vec_in_dim)),
        flux.image_ids(side, side),
        flux.text_ids(text),
        jnp.full((1,), 3.5),
    ]
    model = flux.FluxTransformer(config, jnp.bfloat16)
    forward = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    calls = {
        name: partial(forward, random_params(config, recipe), *inputs)
        for name, recipe in BLOCKS.items()
    }
    return interleaved(calls, options.rounds)


def random_params(config: flux.FluxConfig, recipe: str) -> Any:
    """Parameters of the shapes and formats that a recipe gives, without quantising anything."""
    rng = np.random.default_rng(0)
    quantized = partial(quantize, recipe=RECIPES[recipe])
    shapes = jax.eval_shape(quantized, flux.abstract_params(config))

    def fill(leaf):
        if not is_qtensor(leaf):
            return some_normals(rng, leaf.shape, leaf.dtype, scale=0.02)
        layers = leaf.codes.shape[:-2]
        made = random_qtensor(rng, leaf.format, *leaf.shape, layers)
        return dataclasses.replace(made, act_bits=leaf.act_bits)

    return jax.tree.map(fill, shapes, is_leaf=is_qtensor)


def random_qtensor(rng, format: str, n: int, k: int, layers: tuple[int, ...] = ()) -> QTensor:
    """Random codes with a scale per channel that gives weights of deviation around 0.02."""
    spec = FORMATS[format]
    codes = rng.integers(spec.low, spec.high, (256, k), np.int8, endpoint=True)
    packed = np.asarray(pack_codes(jnp.asarray(codes), format))
    scale = np.full((*layers, n, 1), 0.035 / spec.high, np.float32)
    return QTensor(
        codes=jnp.asarray(np.resize(packed, (*layers, n, packed.shape[-1]))),
        scale=jnp.asarray(scale),
        format=format,
        shape=(n, k),
        group=k,
    )


def some_normals(rng, shape, dtype=jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Normal numbers, repeated where many are asked for."""
    some = rng.standard_normal(min(2**20, int(np.prod(shape))), np.float32) * scale
    return jnp.asarray(np.resize(some.astype(dtype), shape))


def layers_table(rows: int, timed: dict[str, dict[str, Times]]) -> Table:
    """Median milliseconds by the clock, and times bfloat16 in processor time; a row per form."""
    title = f"{rows} rows: ms (processor time, times bf16's)"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("k x n", no_wrap=True)
    for layer in timed:
        table.add_column(layer, justify="right", no_wrap=True)
    for form in next(iter(timed.values())):
        cells = [
            f"{1e3 * times[form].median:,.1f} ({times[form].busy_ratio(times[BASE]):.2f})"
            for times in timed.values()
        ]
        table.add_row(form, *cells)
    return table


def blocks_table(options: Options, times: dict[str, Times]) -> Table:
    """Seconds of the blocks, a row per recipe."""
    double, single = options.blocks
    title = f"{double} double and {single} single FLUX blocks, width {options.hidden}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("weights", no_wrap=True)
    for column in ("best s", "median s", "times bf16", "processor s", "times bf16"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, t in times.items():
        cells = t.best, t.median, t.ratio(base := times[BASE]), min(t.busy), t.busy_ratio(base)
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    return table


if __name__ == "__main__":
    main()
