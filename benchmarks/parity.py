"""How closely every network follows its publisher's, from every checkpoint layout.

    python -m benchmarks.parity [--quick]

For each entry of `benchmarks.parity_cases`: the reference (diffusers' module where it has one,
plain PyTorch otherwise) gets random weights and writes its checkpoint; the checkpoint is converted;
both run one forward and one sampling run of 20 steps from the same noise, in float32. The errors
are the largest difference over the largest number. Once small, and once (without --quick) at the
published width with fewer blocks ("2 of 28"), which takes ten minutes of a CPU and 6 GB.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.parity_cases import CASES, Case, Inputs
from benchmarks.parity_samplers import RUNS
from convert.checkpoint_files import open_checkpoint
from convert.port import port
from convert.registry import SOURCES, recognise
from lowbit_jax.models.registry import build

LIMIT = 1e-3  # of a sampling run, which adds up 20 forwards


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare every network and checkpoint layout with its publisher's code."""

    quick: bool = False
    """Small sizes only."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one case gave.

    Attributes:
        case: which.
        size: "small", or the depth it was cut to at full width.
        forward: error of one forward.
        trajectory: error of the last state of a sampling run.
        seconds: all of it took.
    """

    case: Case
    size: str
    forward: float
    trajectory: float
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Print the table and the figure line; 1 if an error is over the limit."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    check_complete(CASES)
    sizes = ("small",) if options.quick else ("small", "full")
    console = Console()
    results = []
    for case in CASES:
        for size in sizes:
            with (
                console.status(f"{case.model}, {case.layout} layout, {size}"),
                tempfile.TemporaryDirectory(prefix="parity-") as folder,
            ):
                results.append(measure(case, size, Path(folder)))
    console.print(table(results))
    worst = max(max(result.forward, result.trajectory) for result in results)
    models = len({case.model for case in CASES})
    print(f"figure: worst_relative_error={worst:.2e} models={models} layouts={len(CASES)}")
    return int(not worst <= LIMIT)


def check_complete(cases: Sequence[Case]) -> None:
    """Check that every network and layout that can be converted is compared.

    Raises:
        SystemExit: names what is missing.
    """
    known = {(model, layout.name) for model, s in SOURCES.items() for layout in s.layouts}
    missing = sorted(known - {(case.model, case.layout) for case in cases})
    if missing:
        names = ", ".join(f"{model} ({layout})" for model, layout in missing)
        raise SystemExit(f"no entry in benchmarks/parity_cases.py for: {names}")


def measure(case: Case, size: str, folder: Path) -> Result:
    """Run a case at `size` ("small" or "full"), with its checkpoint in `folder`.

    The reference is gone before ours is built, so that the weights are held once.

    Raises:
        AssertionError: the checkpoint was taken for another network, layout or config.
    """
    start = time.perf_counter()
    config = getattr(case, size)
    inputs = case.inputs(config)
    noise = np.random.default_rng(7).standard_normal(inputs[case.state].shape, np.float32)
    expected = run_reference(case, config, inputs, noise, folder)
    with open_checkpoint(folder) as checkpoint:
        model, layout = recognise(checkpoint)
    assert (model, layout.name) == (case.model, case.layout), (model, layout.name)
    saved = port(folder, dtype=jnp.float32)
    network = build(saved.model, saved.config)
    assert network.config == config, (network.config, config)
    found = run_ours(case, network, saved.params, inputs, noise)
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    return Result(
        case=case,
        size="small" if size == "small" else case.cut,
        forward=errors[0],
        trajectory=errors[1],
        seconds=time.perf_counter() - start,
    )


def run_reference(
    case: Case, config: Any, inputs: Inputs, noise: np.ndarray, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Write the reference's checkpoint; its output, and its last state of a sampling run."""
    reference = case.reference(config)
    case.write(folder, reference)

    def denoise(x, timestep):
        return case.run(reference, inputs | {case.state: x, "timestep": timestep})

    return case.run(reference, inputs), RUNS[case.sampler].theirs(denoise, noise)


def run_ours(
    case: Case, network: Any, params: Any, inputs: Inputs, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Our output, and our last state of a sampling run compiled as one program."""

    @jax.jit
    def forward(params, inputs):
        return network.apply({"params": params}, **inputs)

    @jax.jit
    def sample(params, noise):
        def denoise(x, timestep):
            return forward(params, inputs | {case.state: x, "timestep": timestep})

        return RUNS[case.sampler].ours(denoise, noise)

    return np.asarray(forward(params, inputs)), np.asarray(sample(params, noise))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest number; infinite where anything is not finite.

    Raises:
        AssertionError: other shapes, or a reference that is zero.
    """
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = np.abs(expected).max()
    assert scale > 0
    error = float(np.abs(found - expected).max() / scale)
    return error if np.isfinite(error) else float("inf")


def table(results: Sequence[Result]) -> Table:
    """One row per case and size."""
    out = Table(title="against the publishers' code, float32", box=box.SIMPLE, padding=(0, 0))
    for name in ("network", "checkpoint", "size", "forward", "sampler", "20 steps", "s"):
        justify = "right" if name in ("forward", "20 steps", "s") else "left"
        out.add_column(name, justify=justify, no_wrap=True)
    for result in results:
        case = result.case
        out.add_row(
            *(case.model, case.layout, result.size, f"{result.forward:.1e}"),
            *(case.sampler, f"{result.trajectory:.1e}", f"{result.seconds:.0f}"),
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
