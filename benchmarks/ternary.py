"""Every rung of the ladder to 1.58 bits on a shipped FLUX: `python -m benchmarks.ternary`.

A rung that is done is kept in OUT and not done again; a training that was interrupted goes on.
`--quick` runs all of them in minutes, with so little training that its scores say nothing.
Captions the rungs learn from and captions that judge them are of the two parts of the split.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.console import wide_console
from benchmarks.evidence import Bench, Outcome, Subject
from benchmarks.evidence_report import beats, differences, save_grid, table
from benchmarks.evidence_subjects import Amount, picture_subject
from benchmarks.ternary_judge import Judge, Losses, with_activations
from benchmarks.ternary_neighbours import NEIGHBOURS, as_if_stored, on_grid
from benchmarks.ternary_rungs import RUNGS, Sizes, Workshop
from lowbit_jax import checkpoint
from lowbit_jax.quant.recipe import RECIPES

QUICK = Sizes(
    prompts=24, gram_prompts=8, rows=96, block_steps=10, scale_steps=6, code_steps=10, batch=8
)
# a rung of a rotated model, and of one as it is
ROTATED = (
    ("rotated-feedback", "feedback"),
    ("rotated-sequential", "sequential-feedback"),
    ("rotated-reconstruct", "reconstruct"),
    ("rotated-codes", "codes"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    model: str = "nouns-flux"
    """Of `benchmarks.picture_worlds.WORLDS`."""
    checkpoint: Path | None = None
    """Other weights of it, such as those of another width; by default the shipped ones."""
    out: Path = Path("runs/ternary")
    """Folder with a folder per model: trajectories, models, trainings, results.json, grid.png."""
    quick: bool = False
    """Little training and few captions, in OUT-quick."""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """Which; those they start from must be among them or done before."""
    captions: int = 128
    """Held-out captions that judge, at most as many as are shipped."""
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = Sizes()


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What was found of one rung."""

    outcome: Outcome
    losses: Losses
    minutes: float


def main(options: Options) -> dict[str, Any]:
    """Run and judge the rungs; prints the tables, returns and writes the results."""
    console = wide_console()
    if options.quick:
        out = options.out.with_name(options.out.name + "-quick")
        options = replace(options, out=out, captions=min(options.captions, 16), sizes=QUICK)
    name = options.checkpoint.name if options.checkpoint else options.model
    options = replace(options, out=options.out / name)
    options.out.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.model, options.out, options.sizes, console, options.checkpoint)
    judge = Judge(shop)
    amount = Amount(captions=options.captions)
    subject = picture_subject(options.model, amount, console, options.checkpoint)
    bench = Bench(subject, options.out / "judged")
    rungs: dict[str, Rung] = {}
    for name in options.rungs:
        params, minutes = _made(shop, name)
        outcome = bench.params(name, asdict(options.sizes), lambda tree=params: tree)
        rungs[name] = Rung(outcome=outcome, losses=judge(params), minutes=minutes)
        console.print(f"{name}: score {outcome.interval('score')}")
    near: dict[str, Outcome] = {}
    for name, grid in NEIGHBOURS.items():
        made = partial(on_grid, shop, grid)
        outcome = bench.params(name, [asdict(options.sizes), asdict(grid)], made)
        near[name] = as_if_stored(outcome, shop.params, grid)
        console.print(f"{name}: score {outcome.interval('score')}")
    best = max(rungs, key=lambda name: rungs[name].outcome.values["score"].mean())
    eight = bench.params(
        f"{best}-a8", asdict(options.sizes), lambda: with_activations(shop.rung(best), 8)
    )
    return report(options, subject, bench.reference[1], rungs, best, eight, near, console)


def _made(shop: Workshop, name: str) -> tuple[Any, float]:
    """The parameters of a rung and the minutes of the call that finished it, now or before."""
    file = shop.out / "models" / f"{name}.minutes.json"
    if not file.exists():
        start = time.perf_counter()
        made = RUNGS[name](shop)
        minutes = (time.perf_counter() - start) / 60
        (shop.out / "models").mkdir(exist_ok=True)
        checkpoint.save(
            shop.out / "models" / name,
            made,
            model="flux",
            config=shop.saved.config,
            recipe=RECIPES["flux-1.58bit"],
            overwrite=True,
        )
        file.write_text(json.dumps(minutes))
    return shop.rung(name), json.loads(file.read_text())


def report(
    options: Options,
    subject: Subject,
    floats: Outcome,
    rungs: dict[str, Rung],
    best: str,
    eight: Outcome,
    near: dict[str, Outcome],
    console: Console,
) -> dict[str, Any]:
    """Print and write everything."""
    outcomes = {"float": floats, **{name: rung.outcome for name, rung in rungs.items()}}
    outcomes[f"{best} + int8"] = eight
    outcomes |= near
    console.print(table(outcomes, f"{options.captions} held-out captions, same noise"))
    console.print(_categories(outcomes, subject))
    console.print(differences(outcomes, [pair for pair in ROTATED if {*pair} <= {*outcomes}]))
    console.print(_steps(rungs))
    console.print(_layers(rungs))
    save_grid(options.out / "grid.png", outcomes)
    scores = {name: float(outcome.values["score"].mean()) for name, outcome in outcomes.items()}
    found = {
        "settings": {"captions": options.captions, **asdict(options.sizes)},
        "scores": {n: outcome.interval("score")._asdict() for n, outcome in outcomes.items()},
        "rungs": {n: {**asdict(r.losses), "minutes": r.minutes} for n, r in rungs.items()},
    }
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    ratio = 16 / outcomes[best].bits  # against bfloat16, over everything stored
    console.print(
        f"figure: float_score={scores['float']:.4f} "
        f"absmean_score={scores.get('absmean', float('nan')):.4f} "
        f"best_ternary_score={scores[best]:.4f} a8_score={scores[f'{best} + int8']:.4f} "
        f"storage_ratio={ratio:.3f}",
        soft_wrap=True,
    )
    return found


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def _categories(outcomes: dict[str, Outcome], subject: Subject) -> Table:
    """Shares of right captions by category of the subject; and the score against the row before."""
    shares = {
        name: subject.categories({key: values > 0 for key, values in outcome.values.items()})
        for name, outcome in outcomes.items()
    }
    columns = next(iter(shares.values()))
    made = _table("share of captions", "rung", *columns, "score above the one before [95 %]")
    before = None
    for name, outcome in outcomes.items():
        step = "-" if before is None else str(beats(outcome, before, "score"))
        made.add_row(name, *(f"{share:.3f}" for share in shares[name].values()), step)
        before = outcome
    return made


def _steps(rungs: dict[str, Rung]) -> Table:
    made = _table("SNR of the velocity, dB, every third step from noise on; minutes", "rung", "dB")
    made.add_column("min", justify="right")
    for name, rung in rungs.items():
        numbers = " ".join(f"{x:5.1f}" for x in rung.losses.velocity[::3])
        made.add_row(name, numbers, f"{rung.minutes:.1f}")
    return made


def _layers(rungs: dict[str, Rung]) -> Table:
    made = _table("SNR of weights / of products on held-out inputs, dB", "layers", *rungs)
    for kind in next(iter(rungs.values())).losses.weights:
        cells = (
            f"{r.losses.weights[kind]:.1f} / {r.losses.products[kind]:.1f}" for r in rungs.values()
        )
        made.add_row(kind, *cells)
    return made


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
