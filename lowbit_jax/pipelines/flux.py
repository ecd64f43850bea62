"""FLUX sampling: noise and text states in, latent tokens out, in one compiled loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lowbit_jax.models.flux import FluxTransformer, Modulations, image_ids, text_ids
from lowbit_jax.quant.ranged import at_timestep
from lowbit_jax.samplers import flow_euler, loop


@partial(jax.jit, static_argnames=("model", "grid"))
def sample_tokens(
    model: FluxTransformer,
    params: Any,
    noise: Float[Array, "b i c"],
    txt: Float[Array, "b x context"],
    pooled: Float[Array, "b vec"] | None,
    sigmas: Float32[Array, "steps+1"],
    *,
    grid: tuple[int, int],
    guidance: Float[Array, "b"] | None = None,
    modulations: Modulations | None = None,
) -> Float32[Array, "b i c"]:
    """Integrate the flow from `noise` to latent tokens; compiled once per shape and kernel formats.

    Args:
        model: the module; its dtype is the dtype of the computation.
        params: its parameters, float or quantised in any mix.
        noise: standard normal start, one row per 2x2 latent patch.
        txt: text states.
        pooled: pooled text vectors.
        sigmas: noise levels from `FlowSchedule.sigmas`.
        grid: rows and columns of latent patches; rows * columns = i.
        guidance: distilled guidance scales, exactly when the model has a guidance embedder.
        modulations: of all steps, from `flux_modulation.modulations` with `step_times`, in place of
            pooled and guidance; `params` may then be the first tree of `split_modulation`.

    Raises:
        ValueError: when the grid does not have as many patches as `noise` has tokens.
    """
    if grid[0] * grid[1] != noise.shape[1]:
        raise ValueError(
            f"grid {grid[0]} x {grid[1]} does not hold the {noise.shape[1]} tokens of noise"
        )
    ids = image_ids(*grid), text_ids(txt.shape[1])

    def velocity(x, t):
        return model.apply(
            {"params": at_timestep(params, t)}, x, txt, t, pooled, *ids, guidance=guidance
        )

    if modulations is None:
        return flow_euler.sample(velocity, noise, sigmas)

    def step(state, now):
        coefficients, given = now

        def velocity(x, t):
            here = at_timestep(params, t)
            return model.apply({"params": here}, x, txt, None, None, *ids, modulations=given)

        return loop.advance(velocity, state, coefficients), None

    steps = flow_euler.euler_steps(sigmas)
    (x, _), _ = jax.lax.scan(step, loop.start(noise, steps), (steps, modulations))
    return x


def step_times(sigmas: Float32[Array, "steps+1"], batch: int) -> Float32[Array, "steps b"]:
    """The times at which `sample_tokens` asks the model, for `flux_modulation.modulations`."""
    return jnp.broadcast_to(jnp.asarray(sigmas, jnp.float32)[:-1, None], (len(sigmas) - 1, batch))
