"""ViDiT-Q against its rivals on trained models with an exact judge: `python -m benchmarks.viditq`.

    python -m benchmarks.viditq --quick     # fewer captions and methods, a few minutes
    python -m benchmarks.viditq             # everything; goes on where it was cut

Every method at W8A8, W6A6, W4A8, W4A8 mixed and W4A4, then the paper's ladder at W4A8, one thing
changed at a time. Same held-out captions, same noise, float32 but for what is quantised; the
integers are real, not simulated. PSNR, SSIM and LPIPS are to the float model's
pictures. Calibration sees captions of the training part only. Results are kept in `--out`; tables
and pictures are written there too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks.console import wide_console
from benchmarks.evidence import Bench, Outcome
from benchmarks.evidence_report import (
    differences,
    judged,
    markdown,
    save_grid,
    save_plot,
    table,
)
from benchmarks.evidence_subjects import SUBJECTS, Amount
from lowbit_jax.quant.recipe import RECIPES, Recipe, load_recipe

BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
METHODS = ("naive", "qdit", "smoothquant", "quarot", "viditq")
QUICK = ("naive-w8a8", "viditq-w8a8", "naive-w4a8", "viditq-w4a8", "viditq-w4a8-mp")
COMPARED = tuple(
    name
    for bits in BITS
    for name in (
        *(f"{method}-{bits}" for method in METHODS),
        f"viditq-v1-{bits}",
        f"viditq-{bits}-mp",
    )
    if name in RECIPES
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare ViDiT-Q with its rivals on the shipped models."""

    quick: bool = False
    """32 captions, five methods, no ladder."""
    subjects: tuple[str, ...] = ("nouns-flux", "moving-nouns-stdit")
    """Shipped models; scenes-flux too."""
    out: Path = Path("runs/viditq")
    """Folder of results, tables and pictures."""
    captions: int = 128
    """Held-out captions."""
    mixed: tuple[Path, ...] = ()
    """Recipe files of `lowbit-jax allocate`, compared too, each with the one before."""


def ladder(bits: str = "w4a8") -> dict[str, Recipe]:
    """The paper's ablation: each recipe changes one thing of the one before.

    Static per-tensor activations, then per token, then a mask, then (without the mask) a rotation,
    then both; masks by the least output error. Weights are the same int4 throughout, per channel
    and rounded plainly; then, which the paper has not, with error feedback.
    """
    whole = RECIPES[f"viditq-{bits}"].rounded()
    *head, rest = whole.rules
    changes = {
        "1 static": {"balance": None, "rotation": None, "act_static": True},
        "2 dynamic": {"balance": None, "rotation": None},
        "3 + balance": {"rotation": None},
        "4 rotation alone": {"balance": None},
        "5 balance, then rotation": {},
    }
    steps = {
        step: dataclasses.replace(
            whole,
            name=f"ladder-{bits}-{step[0]}",
            rules=(*head, dataclasses.replace(rest, **change)),
        )
        for step, change in changes.items()
    }
    last = dataclasses.replace(RECIPES[f"viditq-{bits}"], name=f"ladder-{bits}-6")
    return steps | {"6 + error feedback": last}


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, write pictures and the figure line."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    console = wide_console()
    mixed = [load_recipe(path) for path in options.mixed]
    captions = min(options.captions, 32) if options.quick else options.captions
    amount = Amount(captions=captions, calibration=4 if options.quick else 16)
    figures: dict[str, float] = {}
    for name in options.subjects:
        bench = Bench(SUBJECTS[name](amount, console), options.out)
        rows = compare(bench, QUICK if options.quick else COMPARED, mixed, console)
        title = f"{name}, {captions} held-out captions"
        recipes = {} if options.quick else ladder()
        steps = {step: run(bench, recipe, console) for step, recipe in recipes.items()}
        tables = {title: rows}
        if steps:
            tables[f"{name}, the ladder at W4A8"] = {"float": rows["float"], **steps}
        names = ["viditq-w4a8", *(recipe.name for recipe in mixed)]
        pairs = [*against_rivals(rows), *in_turn(names), *in_turn(list(steps))]
        texts = []
        for heading, these in tables.items():
            console.print(table(these, heading))
            texts.append(markdown(these, heading))
        console.print(differences(rows | steps, pairs), judged(rows | steps))
        folder = options.out / name
        (folder / "tables.md").write_text("\n\n".join(texts) + "\n")
        # more bits look like float
        seen = {name: row for name, row in rows.items() if name == "float" or "-w4" in name}
        save_grid(folder / "grid.png", seen)
        save_plot(folder / "plot.png", rows, title)
        figures |= {f"{name}/{key}": value for key, value in ratios(rows).items()}
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print("figure: " + " ".join(f"{key}={value:.4f}" for key, value in _last_line(figures).items()))


def compare(
    bench: Bench, chosen: Sequence[str], mixed: Sequence[Recipe], console: Console
) -> dict[str, Outcome]:
    """The float model, every method and every recipe that was given, by name."""
    rows = {"float": bench.reference[1]}
    for recipe in [*(RECIPES[name] for name in chosen), *mixed]:
        rows[recipe.name] = run(bench, recipe, console)
    return rows


def against_rivals(rows: Mapping[str, Outcome]) -> list[tuple[str, str]]:
    """ViDiT-Q at each of the bits, and the other method that is nearest to float there."""
    pairs = []
    for bits in BITS:
        others = [f"{m}-{bits}" for m in METHODS if m != "viditq" and f"{m}-{bits}" in rows]
        if others and f"viditq-{bits}" in rows:
            best = max(others, key=lambda name: rows[name].values["psnr"].mean())
            pairs.append((f"viditq-{bits}", best))
    if "viditq-w4a8-mp" in rows:
        pairs.append(("viditq-w4a8-mp", "viditq-w4a8"))
    return pairs


def in_turn(names: list[str]) -> list[tuple[str, str]]:
    """Each and the one before."""
    return list(zip(names[1:], names[:-1], strict=True))


def run(bench: Bench, recipe: Recipe, console: Console) -> Outcome:
    """One recipe, with a word on what is going on."""
    with console.status(f"{bench.subject.name}: {recipe.name}"):
        outcome = bench.recipe(recipe)
    score, psnr = outcome.interval("score"), outcome.interval("psnr")
    console.print(f"{recipe.name}: score {score}, PSNR {psnr}, {outcome.seconds:.0f} s")
    return outcome


def ratios(rows: dict[str, Outcome]) -> dict[str, float]:
    """Scores as shares of the float model's, and what mixed precision gains on W4A8."""
    score = {name: float(row.values["score"].mean()) for name, row in rows.items()}
    found = {
        f"{name}_score_ratio": score[recipe] / score["float"]
        for name, recipe in (
            ("w8a8", "viditq-w8a8"),
            ("w4a8", "viditq-w4a8"),
            ("w4a8_naive", "naive-w4a8"),
            ("w4a4", "viditq-w4a4"),
        )
        if recipe in score
    }
    if "viditq-w4a8-mp" in rows:
        psnr = {name: float(rows[name].values["psnr"].mean()) for name in rows}
        found["mp_gain"] = psnr["viditq-w4a8-mp"] - psnr["viditq-w4a8"]
    return found


def _last_line(figures: dict[str, float]) -> dict[str, float]:
    """The worst of the models for each figure."""
    worst: dict[str, float] = {}
    for key, value in figures.items():
        name = key.split("/", 1)[1]
        worst[name] = min(worst.get(name, value), value)
    return worst


if __name__ == "__main__":
    main()
