"""The compiled programs of `FluxPipeline`, in the order in which a picture goes through them.

Shape letters: b batch, s steps, t text tokens, i image tokens, c channels of one, y rows and x
columns of latents, z latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from lowbit_jax.models.autoencoder_kl import restore
from lowbit_jax.models.flux import FluxTransformer, Modulations, image_ids, text_ids
from lowbit_jax.models.flux_modulation import modulations, step_of
from lowbit_jax.quant.ranged import at_timestep, has_ranges
from lowbit_jax.samplers import loop

PATCH = 2  # rows and columns of latents of one token


@partial(jax.jit, static_argnames="model")
def pooled_vector(model, params, ids: Int[Array, "b t"]) -> Float[Array, "b k"]:
    """CLIP's vector of each text."""
    return model.apply({"params": params}, ids)[1]


@partial(jax.jit, static_argnames="model")
def text_states(model, params, ids: Int[Array, "b t"]) -> Float[Array, "b t k"]:
    """T5's states of each text, padding attended to."""
    return model.apply({"params": params}, ids)


@partial(jax.jit, static_argnames="model")
def step_modulations(
    model: FluxTransformer,
    once: Mapping[str, Any],
    times: Float32[Array, "s"],
    pooled: Float[Array, "b vec"],
    guidance: Float[Array, "b"] | None,
) -> Modulations:
    """The modulations of all steps of a picture.

    Args:
        model: the module.
        once: the second tree of `flux_modulation.split_modulation`.
        times: of the steps, see `Steps.timestep`.
        pooled: CLIP's vector.
        guidance: distilled guidance scale, for FLUX.1-dev.
    """

    def at(times: Float32[Array, "s"], params: Mapping[str, Any]) -> Modulations:
        rows = jnp.broadcast_to(times[:, None], (len(times), len(pooled)))
        return modulations(model, params, rows, pooled, guidance)

    if not has_ranges(once):
        return at(times, once)
    # kernels differ between timesteps: a product for each of them
    return jax.lax.map(lambda t: step_of(at(t[None], at_timestep(once, t)), 0), times)


@partial(jax.jit, static_argnames=("model", "grid"))
def sampler_step(
    model: FluxTransformer,
    params: Mapping[str, Any],
    x: Float32[Array, "b i c"],
    states: Float[Array, "b t k"],
    now: loop.Steps,
    given: Modulations,
    *,
    grid: tuple[int, int],
) -> Float32[Array, "b i c"]:
    """One step of the sampler, compiled once for all of them.

    Args:
        model: the module.
        params: the first tree of `flux_modulation.split_modulation`.
        x: tokens.
        states: of T5.
        now: coefficients of the step.
        given: its modulations.
        grid: rows and columns of tokens.
    """
    ids = image_ids(*grid), text_ids(states.shape[1])

    def velocity(x, t):
        here = {"params": at_timestep(params, t)}
        return model.apply(here, x, states, None, None, *ids, modulations=given)

    return loop.advance(velocity, (x, None), now)[0]


@partial(jax.jit, static_argnames=("model", "grid"))
def decoded(model, params, tokens, *, grid):
    """The pixels, about in [-1, 1], of tokens on a grid, float32."""
    latents = restore(model.config, unpack(tokens, grid))
    return model.apply({"params": params}, latents, method="decode").astype(jnp.float32)


def unpack(tokens: Float[Array, "b i c"], grid: tuple[int, int]) -> Float[Array, "b y x z"]:
    """Latents of tokens, "z row column" inside each: inverse of `patches`, channels last."""
    b, rows, columns = len(tokens), *grid
    cut = tokens.reshape(b, rows, columns, -1, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    return cut.reshape(b, rows * PATCH, columns * PATCH, -1)
