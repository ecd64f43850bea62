"""Every rung of the ladder to 1.58 bits on the shipped FLUX: `python -m benchmarks.ternary`.

A rung that is done is kept in OUT and not done again; a training that was interrupted goes on.
`--quick` runs all of them in minutes, with so little training that its scores say nothing.
Captions the rungs learn from and captions that judge them share no (head, accessory) pair.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.demo import save_grid
from benchmarks.ternary_judge import Judge, Verdict
from benchmarks.ternary_rungs import RUNGS, Sizes, Workshop
from lowbit_jax import checkpoint
from lowbit_jax.evaluation import metrics, nouns
from lowbit_jax.quant.qtensor import is_qtensor
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.report import size_report

QUICK = Sizes(
    prompts=24, gram_prompts=8, rows=96, block_steps=10, scale_steps=6, code_steps=10, batch=8
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    out: Path = Path("runs/ternary")
    """Folder of trajectories, models, trainings, results.json and grid.png."""
    quick: bool = False
    """Little training and few captions, in OUT-quick."""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """Which; each needs those it starts from."""
    captions: int = 128
    """Held-out captions that judge, at most 128, each with two noises."""
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = Sizes()


def main(options: Options) -> dict[str, Any]:
    """Run and judge the rungs; prints the tables, returns and writes the results."""
    console = Console()
    if options.quick:
        out = options.out.with_name(options.out.name + "-quick")
        options = replace(options, out=out, captions=min(options.captions, 16), sizes=QUICK)
    options.out.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.out, options.sizes, console)
    judge = Judge(shop, options.captions)
    verdicts: dict[str, Verdict] = {}
    for name in ("float", *options.rungs):
        params, seconds = _rung(shop, options.out, name)
        file = options.out / f"{name}-{options.captions}.npz"
        verdicts[name] = judge.cached(file, params, seconds)
        console.print(f"{name}: {verdicts[name].summary()}")
    best = max(options.rungs, key=lambda name: verdicts[name].score)
    eight = judge.cached(
        options.out / f"{best}-a8-{options.captions}.npz",
        with_activations(checkpoint.load(options.out / "models" / best).params, 8),
        0.0,
    )
    report = {name: verdict.to_json(verdicts["float"]) for name, verdict in verdicts.items()}
    report[f"{best} + int8 activations"] = eight.to_json(verdicts["float"])
    report["settings"] = {"captions": options.captions, **asdict(options.sizes)}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    save_grid(options.out / "grid.png", {n: v.pictures for n, v in verdicts.items()})
    show(verdicts, eight, best, console)
    sizes = size_report(
        checkpoint.iter_parts(checkpoint.load(options.out / "models" / best).params)
    )
    absmean = verdicts["absmean"].score if "absmean" in verdicts else float("nan")
    console.print(
        f"figure: float_score={verdicts['float'].score:.4f} absmean_score={absmean:.4f} "
        f"best_ternary_score={verdicts[best].score:.4f} a8_score={eight.score:.4f} "
        f"storage_ratio={sizes.ratio:.3f}",
        soft_wrap=True,
    )
    return report


def _rung(shop: Workshop, out: Path, name: str) -> tuple[Any, float]:
    """The parameters of a rung and the seconds of the call that finished it, now or before."""
    if name == "float":
        return shop.params, 0.0
    folder, times = out / "models" / name, out / f"{name}.seconds.json"
    if not times.exists():
        start = time.perf_counter()
        made = RUNGS[name](shop)
        seconds = time.perf_counter() - start
        checkpoint.save(
            folder,
            made,
            model="flux",
            config=shop.saved.config,
            recipe=RECIPES["flux-1.58bit"],
            overwrite=True,
        )
        times.write_text(json.dumps(seconds))
    return checkpoint.load(folder).params, json.loads(times.read_text())


def with_activations(params: Any, bits: int) -> Any:
    """The same model with activations quantised per token: nothing else changes."""
    return jax.tree.map(
        lambda leaf: replace(leaf, act_bits=bits) if is_qtensor(leaf) else leaf,
        params,
        is_leaf=is_qtensor,
    )


def show(verdicts: dict[str, Verdict], eight: Verdict, best: str, console: Console) -> None:
    """The tables."""
    table = Table(box=None, pad_edge=False, title="held-out captions, same noise")
    columns = ("score [95 %]", *nouns.KINDS, "PSNR", "SSIM", "velocity dB", "against below", "min")
    table.add_column("rung", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    before = None
    for name, v in [*verdicts.items(), (f"{best} + int8", eight)]:
        step = "-"
        if before is not None and not name.endswith("int8"):
            step = str(metrics.difference_interval(v.right.mean(1), before.right.mean(1)))
        kinds = [f"{share:.3f}" for share in v.right.mean(0)]
        floats = verdicts["float"]
        row = (
            str(metrics.mean_interval(v.right.mean(1))),
            *kinds,
            f"{v.psnr(floats):.1f}",
            f"{v.ssim(floats).mean():.3f}",
            f"{v.velocity_db.mean():.1f}",
            step,
            f"{v.seconds / 60:.1f}",
        )
        table.add_row(name, *row)
        before = v if name != "float" else None
    console.print(table)
    layers = Table(box=None, pad_edge=False, title="SNR of products on held-out inputs, dB")
    layers.add_column("layers", no_wrap=True)
    shown = {name: v for name, v in verdicts.items() if v.layers}
    for name in shown:
        layers.add_column(name, justify="right", no_wrap=True)
    for layer in next(iter(shown.values())).layers if shown else ():
        layers.add_row(layer, *(f"{v.layers[layer]['output']:.1f}" for v in shown.values()))
    console.print(layers)
    times = Table(box=None, pad_edge=False, title="SNR of the velocity by step, noise first, dB")
    for name, v in verdicts.items():
        if name != "float":
            times.add_row(name, *(f"{x:.1f}" for x in np.asarray(v.velocity_db)))
    console.print(times)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
