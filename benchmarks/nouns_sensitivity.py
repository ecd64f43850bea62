"""How much every unit of the shipped image model minds being quantised, by what judges it.

    python -m benchmarks.nouns_sensitivity --out runs/nouns-scan.jsonl [--resume]

Quantises each unit (the attention of one stream of one block, and so on) alone, weights and
activations apart, FAKE quantisation in float32, and samples captions that nobody trained on: the
last of the shipped ones; `benchmarks.mixed_precision` judges by the first. Scores: `text`, how
clearly the asked-for sprites are the nearest of all candidates (`evaluation.nouns.margins`, mean of
the four kinds), and `quality`, dB to the exact picture. Then

    lowbit-jax allocate runs/nouns-scan.jsonl --mean-bits 4.5 --out recipe.json --heat-map map.png
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.demo import GRID, MODEL, load_prompts
from convert.port import port
from lowbit_jax.calibration.drivers import flux_run, flux_sample
from lowbit_jax.evaluation import nouns
from lowbit_jax.models.registry import build
from lowbit_jax.precision.menu import level_name, short_name
from lowbit_jax.precision.records import MSE
from lowbit_jax.precision.scan import Scan, scan
from lowbit_jax.precision.sensitivity import Sensitivity
from lowbit_jax.samplers.flow_euler import FlowSchedule

ALL_PROMPTS = 128
SCORER = "nouns: margins, dB to the exact picture"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Scan the shipped model."""

    out: Path
    """File of the scan: grows a line with each candidate."""
    resume: bool = False
    """Go on with a scan that was cut."""
    pictures: int = 16
    """Captions, the last of the shipped ones; a multiple of `batch`."""
    batch: int = 16
    """Pictures at a time."""
    steps: int = 8
    """Of the sampler."""
    acts: tuple[int, ...] = (4,)
    """Levels of the activations."""
    seed: int = 1
    """Of the noise."""


def main(argv: list[str] | None = None) -> int:
    """Run the scan and print how the measures agree."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    console = Console(markup=False)
    try:
        found = run_scan(options, console)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"nouns_sensitivity: {error}", file=sys.stderr)
        return 2
    console.print(agreement_table(found))
    return 0


def run_scan(options: Options, console: Console | None) -> Sensitivity:
    """The scan, or the rest of it.

    Raises:
        ScanError: see `precision.scan.scan`. RuntimeError: the sprites cannot be fetched.
    """
    sprites = nouns.load_sprites()
    saved = port(MODEL, dtype=jnp.float32)
    model = build(saved.model, saved.config, jnp.float32)
    schedule = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(options.steps, GRID[0] * GRID[1])
    prompts = load_prompts(ALL_PROMPTS)
    chosen = np.arange(ALL_PROMPTS - options.pictures, ALL_PROMPTS)
    shape = (options.pictures, GRID[0] * GRID[1], model.config.in_channels)  # type: ignore[attr-defined]
    noise = np.asarray(jax.random.normal(jax.random.key(options.seed), shape))
    samples = [
        flux_sample(noise[part - chosen[0]], prompts.states[part], prompts.pooled[part])
        for part in np.split(chosen, range(options.batch, options.pictures, options.batch))
    ]
    attrs = prompts.attrs[chosen]
    spec = Scan(
        run=flux_run(model, sigmas, grid=GRID),
        scorer=lambda tokens, _: scores(sprites, tokens, attrs),
        scorer_name=SCORER,
        act_bits=options.acts,
    )
    return scan(spec, saved.params, samples, options.out, resume=options.resume, console=console)


def scores(sprites: nouns.Sprites, tokens: np.ndarray, attrs: np.ndarray) -> dict[str, np.ndarray]:
    """The scorer of the image model: more is better, one number per picture."""
    pictures = to_pictures(tokens) * 255
    text = np.mean(list(nouns.margins(sprites, pictures, attrs).values()), axis=0)
    return {"text": text, "quality": nouns.psnr(pictures, nouns.compose(sprites, attrs))}


def to_pictures(tokens: np.ndarray) -> np.ndarray:
    """Latent tokens as pictures [b, 32, 32, 3] in [0, 1]."""
    return np.clip(np.asarray(nouns.from_latent(np.asarray(tokens))) / 2 + 0.5, 0, 1)


def agreement_table(found: Sensitivity) -> Table:
    """Rank correlation (Spearman) of the measures over the units, by level.

    Near 1: the metrics do not decouple, and MSE ranks the units as they do.
    """
    table = Table(title="rank correlation over all units, quantised alone", title_justify="left")
    pairs = [(MSE, "text"), (MSE, "quality"), ("text", "quality")]
    for name in ("quantised", *(f"{a} - {b}" for a, b in pairs)):
        table.add_column(name, justify="left" if name == "quantised" else "right")
    levels = [(f"weights {short_name(level_name(s))}", found.weights) for s in found.header.menu]
    levels += [(f"activations {bits}", found.acts) for bits in found.header.act_bits]
    columns = [*range(len(found.header.menu)), *range(len(found.header.act_bits))]
    for (name, harms), column in zip(levels, columns, strict=True):
        rows = [rank_correlation(harms[a][:, column], harms[b][:, column]) for a, b in pairs]
        table.add_row(name, *(f"{value:.2f}" for value in rows))
    return table


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    sys.exit(main())
