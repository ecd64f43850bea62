"""The rungs of `benchmarks.ternary`: functions of the workshop that give a quantised tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.evidence_subjects import GRID, ROOT
from benchmarks.picture_worlds import WORLDS
from convert.minilm import load_minilm
from convert.port import port
from convert.trajectories import save_trajectories
from lowbit_jax import checkpoint
from lowbit_jax.calibration import drivers
from lowbit_jax.calibration.collect import Run, Sample, collect
from lowbit_jax.distill import latent, split, train
from lowbit_jax.distill.blocks import feedback_blocks, reconstruct
from lowbit_jax.distill.trajectories import Trajectories
from lowbit_jax.distill.velocity import velocity_loss
from lowbit_jax.models.flux import FluxTransformer
from lowbit_jax.models.registry import read_config
from lowbit_jax.quant.recipe import BLOCK_LINEARS, RECIPES, Feedback, Recipe, Rule, WeightSpec
from lowbit_jax.quant.transform import quantize
from lowbit_jax.samplers.flow_euler import FlowSchedule

STEPS = 16  # of a trajectory; the judge samples with 20
CALIBRATION_SEED, JUDGE_SEED = 11, 12  # of captions
FEEDBACK = Feedback(refits=12)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done."""

    prompts: int = 512
    """Captions whose trajectories are recorded."""
    gram_prompts: int = 64
    """Those of them that X^T X is summed over."""
    rows: int = 2048
    """Forwards that block-wise reconstruction uses."""
    block_steps: int = 200
    """Of each block."""
    scale_steps: int = 200
    """Of distilling scales, biases and norms."""
    code_steps: int = 600
    """Of distilling codes too."""
    batch: int = 32


class Workshop:
    """What the rungs share: the float model, captions, trajectories, Hessians; made when needed.

    `model` is one of `WORLDS`, shipped or in `folder`.
    """

    def __init__(
        self, model: str, out: Path, sizes: Sizes, console: Console, folder: Path | None = None
    ):
        self.out, self.sizes, self.console = out, sizes, console
        self.world, folder = WORLDS[model](), folder or ROOT / model
        self.saved = port(folder, dtype=jnp.float32)
        self.params = self.saved.params
        config = read_config("flux", self.saved.config)
        schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        self.schedule = FlowSchedule.from_json(schedule)
        sigmas = self.schedule.sigmas(STEPS, GRID[0] * GRID[1])
        self.run = self._run(FluxTransformer(config), sigmas)
        self.gram_run = self._run(FluxTransformer(config), sigmas, grams=BLOCK_LINEARS)
        # bfloat16 products with float32 sums: what the float model was trained with
        self.train_run = self._run(FluxTransformer(config, jnp.bfloat16, remat=True), sigmas)

    @staticmethod
    def _run(model: FluxTransformer, sigmas, **named: Any) -> Run:
        return drivers.flux_run(model, sigmas, grid=GRID, **named)

    def samples(self, count: int, seed: int, held_out: bool) -> list[Sample]:
        """Noise and encoded captions, training ones or held-out ones."""
        world = self.world
        texts = world.caption(world.sample_attrs(np.random.default_rng(seed), count, held_out))
        encode, out = load_minilm(), []
        for start in range(0, count, 128):
            states, pooled = encode(texts[start : start + 128], world.max_len)
            for i in range(len(states)):
                key = jax.random.fold_in(jax.random.key(seed), start + i)
                noise = jax.random.normal(key, (1, GRID[0] * GRID[1], 48))
                conditions = np.asarray(states[i : i + 1]), np.asarray(pooled[i : i + 1])
                out.append(drivers.flux_sample(noise, *conditions))
        return out

    @cached_property
    def data(self) -> Trajectories:
        """Trajectories of the float model on training captions."""
        given = self.samples(self.sizes.prompts, CALIBRATION_SEED, held_out=False)
        with self.console.status("trajectories"):
            folder = self.out / "trajectories"
            return save_trajectories(folder, self.run, self.params, given, size=32)

    def grams(self, count: int, seed: int, held_out: bool) -> dict[str, np.ndarray]:
        """X^T X of every block linear's input in the float model, kept in a file."""
        file = self.out / f"grams-{seed}.npz"
        if not file.exists():
            given = self.samples(count, seed, held_out)
            found = collect(self.gram_run, self.params, given, console=self.console)
            layers = {p: x.gram for p, x in found.layers.items() if x.gram is not None}
            np.savez(file, **layers)  # type: ignore[arg-type]
        return dict(np.load(file))

    def rung(self, name: str) -> Any:
        """The tree of a rung that was made before."""
        return checkpoint.load(self.out / "models" / name).params

    def options(self, steps: int, rate: float) -> train.Options:
        """Of a training."""
        return train.Options(steps=steps, learning_rate=rate, batch=self.sizes.batch)


def _recipe(quantizer: str, granularity: str = "channel", rotation: Any = None) -> Recipe:
    spec = WeightSpec(format="ternary", quantizer=quantizer, granularity=granularity)
    return Recipe(
        name=quantizer, rules=(Rule(match=BLOCK_LINEARS, weights=spec, rotation=rotation),)
    )


PLAIN, ROTATED = RECIPES["flux-1.58bit"], _recipe("least_squares", rotation="auto")


def _sequential(shop: Workshop, recipe: Recipe) -> Any:
    return feedback_blocks(
        shop.run,
        shop.params,
        recipe,
        shop.data,
        FEEDBACK,
        rows=shop.sizes.rows,
        folder=shop.out,
    )


def _feedback(shop: Workshop, recipe: Recipe) -> Any:
    grams = shop.grams(shop.sizes.gram_prompts, CALIBRATION_SEED, held_out=False)
    return quantize(shop.params, recipe.with_feedback(FEEDBACK), grams=grams)


def _blocks(shop: Workshop, name: str, start: str) -> Any:
    found = reconstruct(
        shop.train_run,
        shop.params,
        shop.rung(start),
        shop.data,
        shop.options(shop.sizes.block_steps, 3e-4),
        rows=shop.sizes.rows,
        folder=shop.out / name,
        console=shop.console,
    )
    return found.params


def _distill(shop: Workshop, name: str, tree: Any, trained: str, steps: int, rate: float) -> Any:
    parts = split.split(tree, trained)
    options, data = shop.options(steps, rate), shop.data
    found = train.fit(
        velocity_loss(shop.train_run),
        parts,
        lambda step: data.batch(step, options.batch, options.seed),
        options,
        shop.out / name,
        name=name,
        about=data.digest,
        console=shop.console,
    )
    np.savetxt(shop.out / f"{name}-losses.csv", found.losses)
    return latent.tensors(parts.join(found.trained, parts.frozen))


def _scales(shop: Workshop) -> Any:
    tree = latent.rescaled(shop.rung("reconstruct"))
    return _distill(shop, "scales", tree, split.SCALES, shop.sizes.scale_steps, 3e-4)


def _codes(shop: Workshop, name: str, start: str) -> Any:
    tree = latent.latents(shop.params, shop.rung(start))
    return _distill(shop, name, tree, split.CODES, shop.sizes.code_steps, 3e-4)


def _codes_from_scratch(shop: Workshop) -> Any:
    """The probe's way: float weights as latent ones, least-squares scales, no rung below."""
    plain = quantize(shop.params, PLAIN)
    tree = latent.latents(shop.params, plain, exact_scale=True)
    trained = split.CODES
    return _distill(shop, "codes-only", tree, trained, shop.sizes.code_steps, 1e-3)


RUNGS: dict[str, Callable[[Workshop], Any]] = {
    "absmean": lambda shop: quantize(shop.params, _recipe("absmean", "tensor")),
    "least-squares": lambda shop: quantize(shop.params, PLAIN),
    "feedback": lambda shop: _feedback(shop, PLAIN),
    "rotated-feedback": lambda shop: _feedback(shop, ROTATED),
    "sequential-feedback": lambda shop: _sequential(shop, PLAIN),
    "reconstruct": lambda shop: _blocks(shop, "reconstruct", "sequential-feedback"),
    "scales": _scales,
    "codes": lambda shop: _codes(shop, "codes", "sequential-feedback"),
    "codes-only": _codes_from_scratch,
    "rotated-sequential": lambda shop: _sequential(shop, ROTATED),
    "rotated-reconstruct": lambda shop: _blocks(shop, "rotated-reconstruct", "rotated-sequential"),
    "rotated-codes": lambda shop: _codes(shop, "rotated-codes", "rotated-sequential"),
}
