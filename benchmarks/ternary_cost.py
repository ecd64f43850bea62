"""What each rung to 1.58 bits costs at FLUX.1-dev's size, by arithmetic: nothing is run.

    python -m benchmarks.ternary_cost

Products are counted from the shapes of the parameters (two operations for each multiplication and
addition), attention's too, and nothing else; hours are those operations at a share of a GPU's dense
bfloat16 peak. Error feedback itself, which waits for its own results input after input, is not in
them, nor are the disk and the host. Memory is `convert.teach.memory_bytes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.table import Table

from benchmarks.console import wide_console
from benchmarks.ternary_rungs import Sizes
from convert.teach import STEPS, memory_bytes, rows_of
from lowbit_jax.models.flux import FLUX_DEV, FluxConfig, abstract_params
from lowbit_jax.quant.qtensor import tree_bytes
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize

# who sees what: the first that matches a kernel's path
ONCE = r".*(_in/(in|out)_layer|mod(ulation)?/lin|adaLN_modulation)"
TEXT = r".*(txt_attn|txt_mlp|txt_in).*"
IMAGE = r".*(img_attn|img_mlp|img_in|final_layer/linear).*"
TRAINING_STEP = 4  # forwards: one, one more where blocks are computed again, two of the backward


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much of each rung, as the evidence has it, and on what."""

    sizes: tyro.conf.OmitArgPrefixes[Sizes] = Sizes()
    pixels: int = 1024
    """Height and width."""
    text: int = 512
    """Tokens of T5."""
    held: int = 16
    """Forwards that are held at once in a training step, for memory; `--method` takes 16."""
    peak: float = 312.0
    """Of the GPU, dense bfloat16 with float32 sums, TFLOPS; an A100's."""
    share: float = 0.4
    """Of the peak that is reached: an assumption."""


def forward_flops(params: Any, config: FluxConfig, text: int, image: int) -> int:
    """Operations of the products of one forward of batch 1.

    Args:
        params: of the model, or their shapes; blocks stacked.
        config: of the model.
        text: tokens of text.
        image: latent patches.
    """
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/kernel"):
            total += 2 * _tokens(name.removesuffix("/kernel"), text, image) * leaf.size
    layers = config.depth + config.depth_single_blocks
    return total + layers * 4 * (text + image) ** 2 * config.hidden_size


def _tokens(layer: str, text: int, image: int) -> int:
    if re.fullmatch(ONCE, layer):
        return 1
    if re.fullmatch(TEXT, layer):
        return text
    return image if re.fullmatch(IMAGE, layer) else text + image


def forwards(options: Options, rows: int) -> dict[str, int]:
    """Of each rung, without those below it."""
    sizes = options.sizes
    return {
        "trajectories": sizes.prompts * STEPS,
        # through every block once for X^T X and once quantised
        "feedback": 2 * rows,
        # what the float blocks give, what the quantised ones do before and after, training
        "reconstruct": 2 * rows + TRAINING_STEP * sizes.block_steps * sizes.batch,
        "scales": TRAINING_STEP * sizes.scale_steps * sizes.batch,
        "distill": TRAINING_STEP * sizes.code_steps * sizes.batch,
    }


def main(options: Options) -> dict[str, float]:
    """Print the table; returns hours by rung."""
    params = abstract_params(FLUX_DEV, jnp.float32)
    image = (options.pixels // 16) ** 2
    tokens = options.text + image
    flops = forward_flops(params, FLUX_DEV, options.text, image)
    packed = jax.eval_shape(lambda tree: quantize(tree, RECIPES["flux-1.58bit"]), params)
    memory: dict[str, int] = {"trajectories": tree_bytes(params)}
    for method in ("scales", "distill"):  # their rungs are all there are
        memory |= memory_bytes(params, tree_bytes(packed), method, options.held, tokens)
    seconds = flops / (options.peak * 1e12 * options.share)
    counts = forwards(options, min(options.sizes.rows, rows_of(params, tokens)))
    table = Table(
        title=f"FLUX.1-dev, {options.pixels} x {options.pixels}", box=None, pad_edge=False
    )
    table.add_column("rung")
    for heading in ("forwards", "PFLOP", "hours", "GB"):
        table.add_column(heading, justify="right")
    hours = {rung: count * seconds / 3600 for rung, count in counts.items()}
    for rung, count in counts.items():
        cells = f"{count:,}", f"{count * flops / 1e15:,.0f}", f"{hours[rung]:.2f}"
        table.add_row(rung, *cells, f"{memory[rung] / 1e9:.1f}")
    console = wide_console()
    console.print(table)
    console.print(
        f"a forward: {flops / 1e12:.1f} TFLOP, {seconds:.2f} s at {options.share:.0%} of "
        f"{options.peak:g} TFLOPS (assumed, not measured)"
    )
    figures = " ".join(f"{rung}_hours={value:.2f}" for rung, value in hours.items())
    console.print(f"figure: forward_TFLOP={flops / 1e12:.1f} {figures}", soft_wrap=True)
    return hours


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
