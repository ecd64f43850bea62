"""Optimisers of the training runs: AdamW or Muon, warm-up, plateau, decay; and the EMA's decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

LEARNING_RATES = {"adamw": 1e-3, "muon": 2e-3}
EMA_DECAY = 0.999


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """Optimiser and its schedule."""

    steps: int = 1000
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float | None = None
    """Learning rate of the plateau; default by optimiser."""
    warmup: int = 150
    decay: float = 0.3
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    weight_decay: float = 0.01


def schedule(options: OptimOptions) -> optax.Schedule:
    """Warm-up, plateau, decay: linear up, constant, linear to zero."""
    peak = options.lr or LEARNING_RATES[options.optimizer]
    warmup = min(options.warmup, options.steps // 4)
    down = max(1, round(options.decay * options.steps))
    parts = [
        optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup)),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, down),
    ]
    return optax.join_schedules(parts, [warmup, max(warmup, options.steps - down)])


def make_optimizer(options: OptimOptions) -> optax.GradientTransformation:
    """Clip the gradient to norm 1, then AdamW or Muon. Only kernels decay.

    Muon takes the kernels of the blocks, [l, k, n], each layer a matrix of its own; the embedders,
    the last layer, biases and norms stay with Adam. Its updates are scaled to Adam's usual RMS of
    0.2 (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.
    """
    rate = schedule(options)
    if options.optimizer == "adamw":
        inner = optax.adamw(
            rate, b1=0.9, b2=0.99, weight_decay=options.weight_decay, mask=_is_kernel
        )
    else:
        inner = optax.contrib.muon(
            rate,
            adam_b2=0.99,
            weight_decay=options.weight_decay,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def _is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _muon_axes(params: Any) -> Any:
    def axes(path, leaf):
        is_block = path[0].key.endswith("blocks")
        if is_block and path[-1].key == "kernel" and leaf.ndim == 3:
            return MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def ema_decay(step: Int[Array, ""]) -> Float[Array, ""]:
    """0.999, less at first: (1 + step) / (10 + step), so that the start is soon forgotten."""
    return jnp.minimum(EMA_DECAY, (1 + step) / (10 + step))
