"""Our products on a GPU against XLA's and the roofline: `python -m benchmarks.gpu_matmul`.

Times are the device's (`device_timing`): one program of many calls, each of which waits for the one
before by way of one element, which costs one more small kernel a call. At few rows the weights come
in several copies, taken in turn, so that they are read from memory and not from the cache.
Activations come quantised, as they do from the op that fuses quantisation with what comes before.
The roofline is the larger of products / published dense peak and bytes / published bandwidth.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.device_timing import looped, seconds_per_call
from pallas_kernels import api
from pallas_kernels.audit.cases import FEW_ROWS, LAYERS
from pallas_kernels.audit.targets import TARGETS, Target
from pallas_kernels.formats import FORMATS, pack_codes
from pallas_kernels.rows import QuantizedRows

MOST_COPIES = 16
BF16, INT8 = "XLA bf16", "XLA int8"
OURS = {  # name: (format, int8 activations)
    "int8 A8": ("int8", True),
    "int4 A8": ("int4", True),
    "ternary A8": ("ternary", True),
    "ternary A16": ("ternary", False),
}
FORMS = (BF16, INT8, *OURS)
MAIN = (4608, 3072, 12288)  # FLUX's widest product of all its tokens


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time matrix products on this GPU."""

    main: bool = False
    """Only FLUX's 4608 x 3072 x 12288, which the figure line is about."""


@dataclass(frozen=True)
class Weights:
    """Random operands of one product on the device; some copies of the weights."""

    x: jax.Array | QuantizedRows
    copies: list[jax.Array]
    scale: jax.Array
    bias: jax.Array


def main(argv: list[str] | None = None) -> int:
    """Print a table and the figure line; returns 2 where there is no GPU."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    if jax.default_backend() != "gpu":
        print(
            f"gpu_matmul: needs an NVIDIA GPU, jax has {jax.devices()[0].device_kind}; "
            "install 'lowbit-jax[cuda]' on a machine with one",
            file=sys.stderr,
        )
        return 2
    kind = jax.devices()[0].device_kind
    gpu = describe(kind)
    console = Console()
    print(f"{kind}; roofline of {gpu.description if gpu else 'no GPU: this one is not described'}")
    shapes = [MAIN] if options.main else [(m, k, n) for _, k, n, rows in LAYERS for m in rows]
    found = {}
    with console.status("timing"):
        for shape in dict.fromkeys([*shapes, MAIN]):
            found[shape] = {form: time_form(form, *shape, gpu) for form in FORMS}
    console.print(table(found, gpu))
    print(figure(found[MAIN]))
    return 0


def describe(kind: str) -> Target | None:
    """The described GPU of this device kind ("NVIDIA A100-SXM4-80GB"), if there is one."""
    words = kind.lower().replace("-", " ").split()
    return next((gpu for name, gpu in TARGETS.items() if name in words), None)


def time_form(form: str, m: int, k: int, n: int, gpu: Target | None) -> float:
    """Seconds of one product on the device.

    Args:
        form: one of `FORMS`.
        m, k, n: rows, inputs and outputs.
        gpu: whose cache the copies of the weights should exceed.
    """
    cache = gpu.l2_size if gpu else 40 << 20
    weights = operands(form, m, k, n, cache)
    step = bf16_step if form == BF16 else quantized_step(form)
    run = looped(step, weights.x, weights.copies, weights.scale, weights.bias)
    return seconds_per_call(run) / len(weights.copies)


def operands(form: str, m: int, k: int, n: int, cache: int) -> Weights:
    """Random operands; at few rows so many copies of the weights that they exceed `cache` twice."""
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.standard_normal(n), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (n, 1)) * k**-0.5 / 100, jnp.float32)
    x = jnp.asarray(rng.standard_normal((m, k), np.float32), jnp.bfloat16)
    if form == BF16:
        weight = jnp.asarray(rng.standard_normal((k, n), np.float32) * k**-0.5, jnp.bfloat16)
    else:
        format, integer = OURS.get(form, ("int8", True))
        spec = FORMATS[format]
        codes = rng.integers(spec.low, spec.high, (n, k), np.int8, endpoint=True)
        weight = pack_codes(jnp.asarray(codes), format)
        if integer:
            x = api.quantize_rows(x)
    wanted = -(-2 * cache // weight.nbytes) if m <= FEW_ROWS else 1
    copies = [weight] + [jnp.copy(weight) for _ in range(min(wanted, MOST_COPIES) - 1)]
    return Weights(x=x, copies=copies, scale=scale, bias=bias)


def bf16_step(x, copies, scale, bias):
    """XLA's bfloat16 product and bias, once with each copy."""
    del scale
    for weight in copies:
        y = (x @ weight) + bias
        x = x.at[0, 0].set(_bounded(y))
    return x


def quantized_step(form: str):
    """Our product, or XLA's of int8 codes with the same epilogue, once with each copy."""
    format, integer = OURS.get(form, ("int8", True))
    implementation = "xla" if form == INT8 else None

    def step(x, copies, scale, bias):
        for weight in copies:
            y = api.matmul(
                x,
                weight,
                scale,
                format=format,
                bias=bias,
                out_dtype=jnp.bfloat16,
                implementation=implementation,
            )
            if integer:
                x = x._replace(scale=x.scale.at[0, 0].set(_bounded(y).astype(jnp.float32)))
            else:
                x = x.at[0, 0].set(_bounded(y))
        return x

    return step


def _bounded(y):
    """One element of a result, such that a long chain of them neither grows nor vanishes."""
    return jnp.clip(jnp.abs(y[0, 0]), 0.01, 1)


def roofline(form: str, m: int, k: int, n: int, gpu: Target) -> float:
    """Seconds that the device needs at least, by its published peaks.

    `target.*_macs` are multiply-accumulates of a quarter of an SM in a cycle.
    """
    format, integer = OURS.get(form, ("int8", True))
    bits = 16 if form == BF16 else FORMATS[format].bits
    int8 = integer and form != BF16
    macs = gpu.int8_macs if int8 else gpu.bf16_macs
    products = m * k * n / (4 * macs * gpu.sms * gpu.clock_ghz * 1e9)
    moved = m * k * (1 if int8 else 2) + n * k * bits / 8 + 2 * m * n
    return max(products, moved / gpu.dram_bandwidth)


def table(found: dict[tuple[int, int, int], dict[str, float]], gpu: Target | None) -> Table:
    """Microseconds and, in percent, how near each form is to its own roofline."""
    out = Table(title="us (% of its roofline)", box=box.SIMPLE, padding=(0, 1, 0, 0))
    out.add_column("m x k x n", no_wrap=True)
    for form in FORMS:
        out.add_column(form, justify="right")
    for shape, times in found.items():
        cells = []
        for form, seconds in times.items():
            near = f" ({100 * roofline(form, *shape, gpu) / seconds:.0f})" if gpu else ""
            cells.append(f"{1e6 * seconds:,.0f}{near}")
        out.add_row(" x ".join(map(str, shape)), *cells)
    return out


def figure(times: dict[str, float]) -> str:
    """The figure line: how many times faster than XLA's bfloat16 product, at FLUX's widest."""
    names = [*OURS, INT8]
    parts = [
        f"{name.lower().replace(' ', '_')}_speedup={times[BF16] / times[name]:.3f}"
        for name in names
    ]
    return "figure: " + " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
