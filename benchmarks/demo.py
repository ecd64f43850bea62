"""`make demo`: convert the shipped FLUX with each recipe, sample the same noise, compare.

`python -m benchmarks.demo [--pictures N] [--out DIR]` writes DIR/grid.png (rows: recipes; columns:
prompts) and DIR/report.json. The model is small and its pictures are 32x32 sprites, but every byte
takes the path of a 24 GB checkpoint: file, converter, saved folder, loader, sampler.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from convert.__main__ import Arguments, convert_and_quantize
from convert.minilm import load_minilm
from lowbit_jax import checkpoint
from lowbit_jax.evaluation import nouns
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.quant.report import size_report
from lowbit_jax.samplers.flow_euler import FlowSchedule

MODEL = Path(__file__).parent.parent / "checkpoints" / "nouns-flux"
RECIPES = ("float", "w8a8", "w4a8", "flux-1.58bit", "flux-1.58bit-a8")
STEPS = 20
GRID = (8, 8)  # latent patches of a 32x32 picture
COLUMNS = 10  # of grid.png


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare recipes on the shipped model."""

    out: Path = Path("out/demo")
    """Folder of the converted models, grid.png and report.json."""
    pictures: int = 128
    """Held-out prompts to sample, at most 128."""
    seed: int = 0
    """Of the noise; the same for every recipe."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Encoded prompts: sentences, attributes, token states [b, t, k], pooled vectors [b, k]."""

    texts: list[str]
    attrs: np.ndarray
    states: np.ndarray
    pooled: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the report. Sizes in bytes; PSNR (dB) and SSIM against the float model's pictures;
    accuracy is the share of attributes right by the nearest-sprite test, None without sprites."""

    recipe: str
    bytes: int
    ratio: float
    bits_per_weight: float
    psnr: float | None
    ssim: float
    accuracy: dict[str, float] | None
    seconds_per_picture: float


def load_prompts(count: int, folder: Path = MODEL) -> Prompts:
    """The first `count` of the held-out prompts shipped with a model, encoded with MiniLM."""
    data = json.loads((folder / "prompts.json").read_text())
    items = data["prompts"][:count]
    texts = [item["text"] for item in items]
    states, pooled = load_minilm()(texts, data["max_tokens"])
    attrs = np.array([item["attrs"] for item in items])
    return Prompts(texts=texts, attrs=attrs, states=np.asarray(states), pooled=np.asarray(pooled))


def load_sprites(console: Console) -> nouns.Sprites | None:
    """The sprites that judge the pictures; None, with the reason, where they cannot be fetched."""
    try:
        return nouns.load_sprites()
    except Exception as error:
        console.print(f"no attribute accuracy: {error}")
        return None


def sample(saved: checkpoint.SavedModel, prompts: Prompts, seed: int) -> tuple[np.ndarray, float]:
    """Pictures float32 [b, 32, 32, 3] in [0, 1] and seconds per picture, compilation left out.

    Computed in float32, so that what differs between recipes is quantisation alone.
    """
    model = build(saved.model, saved.config, jnp.float32)
    schedule = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    sigmas = FlowSchedule.from_json(schedule).sigmas(STEPS, GRID[0] * GRID[1])
    count = len(prompts.texts)
    noise = jax.random.normal(
        jax.random.key(seed), (count, GRID[0] * GRID[1], model.config.in_channels)
    )
    arguments = (model, saved.params, noise, prompts.states, prompts.pooled, sigmas)
    compiled = sample_tokens.lower(*arguments, grid=GRID).compile()
    start = time.perf_counter()
    tokens = compiled(*arguments[1:]).block_until_ready()
    seconds = (time.perf_counter() - start) / count
    return np.clip(np.asarray(nouns.from_latent(tokens)) / 2 + 0.5, 0, 1), seconds


def judge(
    recipe: str,
    saved: checkpoint.SavedModel,
    pictures: np.ndarray,
    reference: np.ndarray,
    seconds: float,
    scores: dict[str, float] | None,
) -> Result:
    """Put the figures of one recipe together."""
    sizes = size_report(checkpoint.iter_parts(saved.params))
    same = np.array_equal(pictures, reference)
    return Result(
        recipe=recipe,
        bytes=sizes.after,
        ratio=sizes.ratio,
        bits_per_weight=sizes.bits_per_weight,
        # of the mean error: a mean of decibels would let one near-perfect picture hide the others
        psnr=None if same else float(-10 * np.log10(np.mean(np.square(pictures - reference)))),
        ssim=float(np.mean(dm_pix.ssim(jnp.asarray(pictures), jnp.asarray(reference)))),
        accuracy=scores,
        seconds_per_picture=seconds,
    )


def attribute_accuracy(sprites: nouns.Sprites | None, pictures, prompts: Prompts):
    """Share of pictures with the right sprite, by kind."""
    if sprites is None:
        return None
    right = nouns.score(sprites, pictures * 255, prompts.attrs)
    return {kind: float(np.mean(found)) for kind, found in right.items()}


def results_table(results: list[Result]) -> Table:
    """The report for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("recipe", no_wrap=True)
    for heading in ("MB", "ratio", "bits", "PSNR", "SSIM", *(k[:5] for k in nouns.KINDS), "s/pic"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        shares = [f"{100 * r.accuracy[k]:.0f}%" if r.accuracy else "-" for k in nouns.KINDS]
        psnr = "same" if r.psnr is None else f"{r.psnr:.1f}"
        sizes = (f"{r.bytes / 1e6:.2f}", f"{r.ratio:.2f}", f"{r.bits_per_weight:.2f}")
        seconds = f"{r.seconds_per_picture:.2f}"
        table.add_row(r.recipe, *sizes, psnr, f"{r.ssim:.3f}", *shares, seconds)
    return table


def save_grid(path: Path, rows: dict[str, np.ndarray], scale: int = 3) -> None:
    """One row of pictures per name, nearest-neighbour enlarged, names in a margin."""
    margin, gap = 120, 4
    side = 32 * scale + gap
    columns = min(COLUMNS, len(next(iter(rows.values()))))
    sheet = Image.new("RGB", (margin + columns * side, len(rows) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows.items()):
        draw.text((6, y * side + side // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures[:columns]):
            tile = Image.fromarray(np.round(picture * 255).astype(np.uint8))
            tile = tile.resize((32 * scale, 32 * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + x * side, y * side))
    sheet.save(path)


def main(options: Options) -> list[Result]:
    """Run the comparison; writes into `options.out` and returns the rows."""
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    prompts, sprites = load_prompts(options.pictures), load_sprites(console)
    rows: dict[str, np.ndarray] = {}
    if sprites is not None:
        rows["asked for"] = nouns.compose(sprites, prompts.attrs) / 255
    results: list[Result] = []
    for recipe in RECIPES:
        folder = options.out / recipe
        quiet = console if recipe == "flux-1.58bit" else Console(quiet=True)  # one plan is enough
        convert_and_quantize(
            Arguments(checkpoint=MODEL, recipe=recipe, out=folder, overwrite=True), quiet
        )
        saved = checkpoint.load(folder)
        with console.status(f"{recipe}: sampling {len(prompts.texts)} pictures, {STEPS} steps"):
            pictures, seconds = sample(saved, prompts, options.seed)
        rows[recipe] = pictures
        scores = attribute_accuracy(sprites, pictures, prompts)
        results.append(judge(recipe, saved, pictures, rows["float"], seconds, scores))
    save_grid(options.out / "grid.png", rows)
    report: dict[str, Any] = {
        "model": MODEL.name,
        "pictures": len(prompts.texts),
        "steps": STEPS,
        "device": jax.devices()[0].device_kind,
        "versions": checkpoint.library_versions(),
        "results": [asdict(result) for result in results],
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(results_table(results))
    console.print(
        f"{len(prompts.texts)} held-out prompts, {STEPS} steps, same noise; PSNR and SSIM against "
        "the float model; plain round-to-nearest ternary, nothing trained after rounding"
    )
    console.print(f"pictures: {options.out / 'grid.png'}   figures: {options.out / 'report.json'}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
