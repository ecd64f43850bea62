"""End-to-end distillation: the quantised model shall give what the float model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.calibration.collect import Run
from lowbit_jax.distill import latent


def velocity_loss(run: Run) -> Callable[[Any, Any], Float[Array, ""]]:
    """`loss(tree, batch)`: mean squared error of the model's output on `Trajectories.batch`.

    Args:
        run: what is run. Give it a model with `remat`: then a step keeps one input per block.
    """

    def loss(tree, batch):
        params = latent.values(tree)

        def apply(*inputs, **named):
            return run.model.apply({"params": params}, *inputs, **named)

        found = run.denoise(apply, batch["x"], batch["timestep"], batch["conditions"])
        return jnp.mean(jnp.square(found.astype(jnp.float32) - batch["output"]))

    return loss
