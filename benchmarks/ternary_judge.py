"""Beside pictures, what `benchmarks.ternary` looks at: velocities by step and products by layer."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ternary_rungs import JUDGE_SEED, STEPS, Workshop
from lowbit_jax.distill.trajectories import Trajectories, record
from lowbit_jax.quant.qtensor import QTensor, is_qtensor
from lowbit_jax.quant.stacks import iter_layers

VELOCITY_PROMPTS = 32
GRAM_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Where the loss sits, in dB of signal to noise, on held-out captions.

    Attributes:
        velocity: at each step of the float model's own trajectories, noise first.
        weights: of the weights, by kind of layer.
        products: of the products with held-out inputs of the float model, by kind of layer.
    """

    velocity: list[float]
    weights: dict[str, float]
    products: dict[str, float]


class Judge:
    """Measures `Losses` on the same inputs for all."""

    def __init__(self, shop: Workshop):
        self._shop = shop
        given = shop.samples(VELOCITY_PROMPTS, JUDGE_SEED, held_out=True)
        shards = list(record(shop.run, shop.params, given, size=VELOCITY_PROMPTS))
        self._data = Trajectories(shards, jax.tree.structure((0, 0, None)))
        self._grams = shop.grams(GRAM_PROMPTS, JUDGE_SEED, held_out=True)
        self._power = jax.jit(self._powers)

    def __call__(self, params: Any) -> Losses:
        """Of a quantised tree."""
        velocity = []
        for step in range(STEPS):
            batch = self._data.take(np.arange(len(self._data)) * STEPS + step)
            velocity.append(_decibels(*map(float, self._power(params, batch))))
        energies = self._energies(params)
        return Losses(
            velocity=velocity,
            weights={kind: _decibels(*sums[:2]) for kind, sums in energies.items()},
            products={kind: _decibels(*sums[2:]) for kind, sums in energies.items()},
        )

    def _powers(self, params, batch):
        run = self._shop.run

        def apply(*inputs, **named):
            return run.model.apply({"params": params}, *inputs, **named)

        out = run.denoise(apply, batch["x"], batch["timestep"], batch["conditions"])
        lost = out - batch["output"]
        return jnp.sum(jnp.square(batch["output"])), jnp.sum(jnp.square(lost))

    def _energies(self, params: Any) -> dict[str, np.ndarray]:
        """Of weights and what they lost, of products and what they lost, by kind of layer."""
        floats = {p: k if i is None else k[i] for p, k, i in iter_layers(self._shop.params)}
        found: dict[str, np.ndarray] = {}
        for path, kernel, index in iter_layers(params):
            if not isinstance(kernel, QTensor):
                continue
            one = kernel if index is None else jax.tree.map(lambda x, i=index: x[i], kernel)
            w, gram = np.asarray(floats[path], np.float64).T, self._grams[path]
            lost = w - np.asarray(one.dequantize(), np.float64)
            plain = [np.square(x).sum() for x in (w, lost)]
            products = [np.sum((x @ gram) * x) for x in (w, lost)]
            kind = re.sub(r"/\d+/", "/*/", path)
            found[kind] = found.get(kind, 0) + np.array([*plain, *products])
        return found


def with_activations(params: Any, bits: int) -> Any:
    """The same model with activations quantised per token: nothing else changes."""
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, act_bits=bits) if is_qtensor(leaf) else leaf,
        params,
        is_leaf=is_qtensor,
    )


def _decibels(signal: float, lost: float) -> float:
    return float(10 * np.log10(signal / max(lost, 1e-30)))
