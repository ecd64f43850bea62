"""The judge of `benchmarks.ternary`: pictures, velocities and products on held-out captions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from benchmarks.demo import GRID, load_prompts
from benchmarks.ternary_rungs import JUDGE_SEED, STEPS, Workshop
from lowbit_jax.distill.trajectories import Trajectories, record
from lowbit_jax.evaluation import metrics, nouns
from lowbit_jax.models.flux import FluxTransformer
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.stacks import iter_layers

SAMPLE_STEPS = 20
NOISES = 2
VELOCITY_PROMPTS = 32
GRAM_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of a rung; b pictures: every caption with every noise."""

    right: Bool[np.ndarray, "b 4"]
    pictures: Float[np.ndarray, "b 32 32 3"]
    velocity_db: Float[np.ndarray, "s"]
    layers: dict[str, dict[str, float]]
    seconds: float

    @property
    def score(self) -> float:
        """Share of attributes that are right."""
        return float(self.right.mean())

    def psnr(self, other: Verdict) -> float:
        """Of the mean error over all pictures, in dB."""
        error = np.mean(np.square(self.pictures.astype(np.float64) - other.pictures))
        return float(-10 * np.log10(error)) if error else float("inf")

    def ssim(self, other: Verdict) -> np.ndarray:
        """Picture by picture."""
        return metrics.ssim(self.pictures, other.pictures)

    def summary(self) -> str:
        """In one line."""
        kinds = zip(nouns.KINDS, self.right.mean(0), strict=True)
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in kinds)
        return f"score {metrics.mean_interval(self.right.mean(1))} ({shares})"

    def to_json(self, floats: Verdict) -> dict[str, Any]:
        """Everything but the pictures."""
        per_picture = self.right.mean(1)
        return {
            "score": metrics.mean_interval(per_picture)._asdict(),
            "of_float": self.score / floats.score,
            "kinds": dict(zip(nouns.KINDS, self.right.mean(0).tolist(), strict=True)),
            "psnr": self.psnr(floats) if self is not floats else None,
            "ssim": metrics.mean_interval(self.ssim(floats))._asdict(),
            "velocity_db": self.velocity_db.tolist() if self is not floats else None,
            "layers": self.layers,
            "seconds": self.seconds,
        }


class Judge:
    """Judges trees by the same captions, noises and inputs."""

    def __init__(self, shop: Workshop, captions: int):
        self._shop, self._sprites = shop, nouns.load_sprites()
        self._prompts = load_prompts(captions)
        self._model = FluxTransformer(shop.run.model.config)  # type: ignore[attr-defined]
        given = shop.samples(VELOCITY_PROMPTS, JUDGE_SEED, held_out=True)
        shards = list(record(shop.run, shop.params, given, size=VELOCITY_PROMPTS))
        self._held_out = Trajectories(shards, jax.tree.structure((0, 0, None)))
        self._grams = shop.grams(GRAM_PROMPTS, JUDGE_SEED, held_out=True)

    def cached(self, file: Path, params: Any, seconds: float) -> Verdict:
        """The verdict in `file`, or a new one that is put there."""
        if not file.exists():
            verdict = self(params, seconds)
            layers = json.dumps(verdict.layers)
            arrays = {k: getattr(verdict, k) for k in ("right", "pictures", "velocity_db")}
            np.savez(file, layers=layers, seconds=seconds, **arrays)
        found = np.load(file)
        return Verdict(
            right=found["right"],
            pictures=found["pictures"],
            velocity_db=found["velocity_db"],
            layers=json.loads(str(found["layers"])),
            seconds=float(found["seconds"]),
        )

    def __call__(self, params: Any, seconds: float) -> Verdict:
        """Sample, score, compare."""
        pictures = np.concatenate([self._sample(params, seed) for seed in range(NOISES)])
        attrs = np.concatenate([self._prompts.attrs] * NOISES)
        found = nouns.score(self._sprites, pictures * 255, attrs)
        return Verdict(
            right=np.stack([found[kind] for kind in nouns.KINDS], 1),
            pictures=pictures.astype(np.float32),
            velocity_db=self._velocity(params),
            layers=self._layers(params),
            seconds=seconds,
        )

    def _sample(self, params: Any, seed: int) -> np.ndarray:
        prompts = self._prompts
        noise = jax.random.normal(jax.random.key(seed), (len(prompts.texts), 64, 48))
        sigmas = self._shop.schedule.sigmas(SAMPLE_STEPS, GRID[0] * GRID[1])
        given = (self._model, params, noise, prompts.states, prompts.pooled, sigmas)
        tokens = sample_tokens(*given, grid=GRID)
        return np.clip(np.asarray(nouns.from_latent(tokens)) / 2 + 0.5, 0, 1)

    def _velocity(self, params: Any) -> np.ndarray:
        """SNR of the velocity at every step of the float model's held-out trajectories, in dB."""
        run, data = self._shop.run, self._held_out

        @jax.jit
        def power(params, batch):
            apply = lambda *x, **named: self._model.apply({"params": params}, *x, **named)  # noqa: E731
            out = run.denoise(apply, batch["x"], batch["timestep"], batch["conditions"])
            lost = jnp.sum(jnp.square(out - batch["output"]))
            return jnp.sum(jnp.square(batch["output"])), lost

        found = []
        for step in range(STEPS):
            signal, lost = power(params, data.take(np.arange(len(data)) * STEPS + step))
            found.append(10 * np.log10(float(signal) / max(float(lost), 1e-30)))
        return np.array(found)

    def _layers(self, params: Any) -> dict[str, dict[str, float]]:
        """SNR of the weights and of the products on held-out inputs, by kind of layer, in dB."""
        floats = {p: k if i is None else k[i] for p, k, i in iter_layers(self._shop.params)}
        energies: dict[str, list[tuple[float, float, float, float]]] = {}
        for path, kernel, index in iter_layers(params):
            if not isinstance(kernel, QTensor):
                continue
            one = kernel if index is None else jax.tree.map(lambda x, i=index: x[i], kernel)
            w = np.asarray(floats[path], np.float64).T
            lost = w - np.asarray(one.dequantize(), np.float64)
            gram = self._grams[path]
            pair = [float(np.sum((x @ gram) * x)) for x in (w, lost)]
            kind = re.sub(r"/\d+/", "/*/", path)
            row = (float(np.square(w).sum()), float(np.square(lost).sum()), *pair)
            energies.setdefault(kind, []).append(row)  # type: ignore[arg-type]
        out = {}
        for kind, rows in energies.items():
            total = np.sum(rows, axis=0)
            out[kind] = {
                "weight": float(10 * np.log10(total[0] / total[1])),
                "output": float(10 * np.log10(total[2] / total[3])),
            }
        return out
