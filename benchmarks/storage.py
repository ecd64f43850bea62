"""What FLUX.1 takes under every named recipe: `python -m benchmarks.storage`.

Exact bytes, from shapes alone; no weights are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.models.flux import FLUX_DEV, FLUX_SCHNELL, FluxConfig, abstract_params
from lowbit_jax.quant.recipe import RECIPES, Recipe
from lowbit_jax.quant.report import SizeReport, size_report
from lowbit_jax.quant.transform import quantize

# what calibration decides changes the sizes of the other recipes by 4 bytes a channel and no more
NAMED = {name: recipe for name, recipe in RECIPES.items() if not recipe.needs_statistics}
MODELS = {"FLUX.1-dev": FLUX_DEV, "FLUX.1-schnell": FLUX_SCHNELL}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Exact sizes of FLUX.1 under every recipe without calibration, against bfloat16."""


def measure(config: FluxConfig, recipe: Recipe, archive: bool = False) -> SizeReport:
    """Sizes of a FLUX quantised by a recipe; `archive` as in `convert_and_quantize --archive`."""
    params = jax.eval_shape(partial(quantize, recipe=recipe), abstract_params(config))
    return size_report(iter_parts(params), archive=archive)


def table(model: str, reports: dict[str, SizeReport]) -> Table:
    """One row per recipe; the sizes are exact, rounded only for printing. GB is 1e9 bytes."""
    count = next(iter(reports.values())).parameters
    out = Table(title=f"{model}: {count:,} parameters", box=box.SIMPLE, pad_edge=False)
    out.add_column("recipe")
    for column in ("memory GB", "ratio", "bits/weight", "archive GB", "archive ratio"):
        out.add_column(column, justify="right", no_wrap=True)
    for name, report in reports.items():
        memory = f"{report.after / 1e9:.3f}", f"{report.ratio:.3f}", f"{report.bits_per_weight:.3f}"
        out.add_row(name, *memory, f"{report.disk / 1e9:.3f}", f"{archive_ratio(report):.3f}")
    return out


def archive_ratio(report: SizeReport) -> float:
    """How many times smaller than bfloat16 on disk, before orbax compresses anything."""
    return report.before / report.disk


def main(argv: list[str] | None = None) -> None:
    """Print a table per model and the figure line."""
    tyro.cli(Options, args=argv, description=__doc__)
    reports = {
        model: {name: measure(config, recipe, archive=True) for name, recipe in NAMED.items()}
        for model, config in MODELS.items()
    }
    console = Console()
    for model, rows in reports.items():
        console.print(table(model, rows))
    ternary = reports["FLUX.1-dev"]["flux-1.58bit"]
    print(
        f"figure: flux_dev_ternary_ratio={ternary.ratio:.4f} "
        f"flux_dev_archive_ratio={archive_ratio(ternary):.4f}"
    )


if __name__ == "__main__":
    main()
