"""Every op on the GPU at hand against NumPy: `make gpu-check`, `python -m benchmarks.gpu_check`.

Each op of the audit runs at each of its layer shapes as a compiled kernel. Sampled rows and columns
of a product are computed again in int64 and float64 from the formula; rows of the quantising ops
in float64. Exit code 1 when anything differs by more than its rounding allows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pallas_kernels import api
from pallas_kernels.audit.cases import LAYERS, MAIN, OPS, Matmul, Rows
from tests.references import rows as rows_reference
from tests.references.matmul import Product, product

SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 256
OUT_DTYPES = (jnp.float32, jnp.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check every kernel on this GPU."""

    quick: bool = False
    """Only the audit's main shapes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One op at one shape. `fault` is None, or what was wrong in one line."""

    op: str
    shape: tuple[int, int, int]
    fault: str | None


def main(argv: list[str] | None = None) -> int:
    """Check, print a table; 0 if all is well, 1 if not, 2 where there is no GPU."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    device = jax.devices()[0]
    if jax.default_backend() != "gpu":
        print(
            f"gpu_check: needs an NVIDIA GPU, jax has {device.device_kind}; "
            "install 'lowbit-jax[cuda]' on a machine with one",
            file=sys.stderr,
        )
        return 2
    console = Console()
    outcomes = []
    with console.status("") as status:
        for op, shape in cases(options.quick):
            status.update(f"{op} {shape}")
            outcomes.append(check(op, *shape))
    print(f"{device.device_kind}, compute capability {device.compute_capability}")
    console.print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.fault]
    for outcome in failed:
        print(f"{outcome.op} {outcome.shape}: {outcome.fault}")
    print(f"figure: gpu_checks={len(outcomes)} failed={len(failed)}")
    return 1 if failed else 0


def cases(quick: bool) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(op, (m, k, n)) of all that is checked; the ops on rows have n = 0."""
    products = MAIN if quick else [(m, k, n) for _, k, n, rows in LAYERS for m in rows]
    for name, op in OPS.items():
        if isinstance(op, Matmul):
            yield from ((name, shape) for shape in dict.fromkeys(products))
        else:
            yield from ((name, shape) for shape in dict.fromkeys((m, k, 0) for m, k, _ in products))


def check(name: str, m: int, k: int, n: int, implementation: str = "triton") -> Outcome:
    """Runs one op at one shape. Whatever is raised is the fault: all cases are to be seen."""
    op = OPS[name]
    try:
        if isinstance(op, Matmul):
            fault = check_matmul(op, m, k, n, implementation)
        else:
            fault = check_rows(op, m, k, implementation)
    except Exception as error:  # a compiler's or a driver's, of any type
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    return Outcome(op=name, shape=(m, k, n), fault=fault)


def check_matmul(op: Matmul, m: int, k: int, n: int, implementation: str) -> str | None:
    """The fault of a product, in both output dtypes."""
    whole = product(
        op.format,
        m,
        n,
        k,
        group=op.group,
        asymmetric=op.zero,
        integer=op.integer,
        bias=True,
        gates=1 if op.gated else 0,
        residual=op.gated,
    )
    rows, columns = sampled(m, SAMPLED_ROWS), sampled(n, SAMPLED_COLUMNS)
    exact, size = part(whole, rows, columns).exact()
    # float32 rounds each sum of k products where x is floating, and a few times after the sum
    roundings = 8 if op.integer and op.group is None else 8 + k
    for dtype in OUT_DTYPES:
        out = api.matmul(
            *whole.args, **whole.keywords, out_dtype=dtype, implementation=implementation
        )
        if out.shape != (m, n) or out.dtype != dtype:
            return f"{out.dtype}{out.shape} where {jnp.dtype(dtype)}{(m, n)} was asked for"
        found = np.asarray(out[rows][:, columns], float)
        allowed = roundings * 2.0**-24 * size + 2.0**-8 * np.abs(exact) * (dtype == jnp.bfloat16)
        if fault := difference(found, exact, allowed, jnp.dtype(dtype).name):
            return fault
    return None


def part(whole: Product, rows: np.ndarray, columns: np.ndarray) -> Product:
    """The same product for some rows and output channels only."""
    options = dict(whole.options)
    for key in ("scale", "zero"):
        options[key] = None if options[key] is None else options[key][columns]
    if options["bias"] is not None:
        options["bias"] = options["bias"][columns]
    if options["gate"] is not None:
        options["gate"] = options["gate"][:, columns]
    if options["residual"] is not None:
        options["residual"] = options["residual"][rows][:, columns]
    x = jax.tree.map(lambda leaf: leaf[rows], whole.x)
    return Product(x, options, whole.codes[columns], whole.values[rows])


def check_rows(op: Rows, m: int, k: int, implementation: str) -> str | None:
    """The fault of an op that quantises rows."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    modulated = op.function == "modulate_quantize_rows"
    arrays = [normal(1, m, k), normal(1, k), normal(1, k)] if modulated else [normal(m, k)]
    mask = jnp.asarray(rng.uniform(0.5, 2, k), jnp.float32) if op.rotated else None
    rotation = 128 if op.rotated else None
    found = getattr(api, op.function)(
        *arrays, mask=mask, rotation=rotation, implementation=implementation
    )
    rows = sampled(m, SAMPLED_ROWS)
    floats = [np.asarray(array, float) for array in arrays]
    floats[0] = floats[0][..., rows, :]
    if modulated:
        floats[0] = rows_reference.modulate(*floats)
    elif op.function == "gelu_quantize_rows":
        floats[0] = rows_reference.gelu(floats[0])
    exact = floats[0] if mask is None else floats[0] * np.asarray(mask, float)
    exact = rows_reference.rotate(exact, rotation)
    cut = jax.tree.map(lambda leaf: leaf[..., rows, :], found)
    try:
        # float32 throughout: a row's statistics, a tanh, and up to 128 terms of a rotation
        rows_reference.assert_quantised(cut, exact, 8, error=1e-5)
    except AssertionError as error:
        return " ".join(str(error).split())[:200] or "codes, scales or sums are wrong"
    return None


def sampled(size: int, count: int) -> np.ndarray:
    """Indices below `size`: the first, the last and some between, without repetition."""
    between = np.random.default_rng(size).integers(0, size, count)
    return np.unique([0, size - 1, *between])


def difference(found: np.ndarray, exact: np.ndarray, allowed: np.ndarray, what: str) -> str | None:
    """What is wrong with the worst entry, or None; NaN is wrong."""
    excess = np.where(np.isfinite(found), np.abs(found - exact) / allowed, np.inf)
    if excess.max() <= 1:
        return None
    at = np.unravel_index(np.argmax(excess), excess.shape)
    wrong = int((excess > 1).sum())
    return (
        f"{wrong} of {excess.size} sampled {what} values are wrong; the worst is "
        f"{found[at]:.7g} for {exact[at]:.7g}, {allowed[at]:.2g} allowed"
    )


def table(outcomes: list[Outcome]) -> Table:
    """One row per op."""
    out = Table(box=box.SIMPLE, pad_edge=False)
    out.add_column("op", no_wrap=True)
    for column in ("shapes", "failed", "verdict"):
        out.add_column(column, justify="right")
    for op in dict.fromkeys(outcome.op for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.op == op]
        failed = sum(outcome.fault is not None for outcome in mine)
        out.add_row(op, str(len(mine)), str(failed), "fail" if failed else "pass")
    return out


if __name__ == "__main__":
    sys.exit(main())
