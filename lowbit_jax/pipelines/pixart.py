"""PixArt sampling: text states and noise in, latents out, in one compiled loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lowbit_jax.models.pixart import PixArtTransformer
from lowbit_jax.pipelines import captions
from lowbit_jax.quant.ranged import at_timestep
from lowbit_jax.samplers import loop
from lowbit_jax.samplers.guidance import PIXART

PIXELS = 8  # rows and columns of pixels of one latent, of the autoencoders of alpha and Sigma


@partial(jax.jit, static_argnames=("model",))
def sample_latents(
    model: PixArtTransformer,
    params: Any,
    noise: Float[Array, "b c y x"],
    caption: captions.Caption,
    steps: loop.Steps,
    *,
    scale: Float[Array, ""] | float | None = 4.5,
    negative: captions.Caption | None = None,
) -> Float32[Array, "b c y x"]:
    """Denoise `noise` into latents; compiled once per shape and kernel formats.

    A model with micro-conditions is told the size in pixels of the whole picture.

    Args:
        model: the module; its dtype is the dtype of the computation.
        params: its parameters, float or quantised in any mix.
        noise: standard normal start; of any size in whole patches.
        caption: states of the text encoder and their mask (True or 1: no padding).
        steps: of `lowbit_jax.samplers.dpm_solver.PIXART_SCHEDULE`.
        scale: of classifier-free guidance, which doubles the batch; None for one forward of b.
        negative: what guidance leads away from, of the caption's shape; diffusers' pipeline takes
            the text encoder's states of "". None for the null caption that the original checkpoints
            store, seen through the caption's mask, as the published code does.

    Raises:
        ValueError: guidance without a negative caption of the caption's shape; see also
            `lowbit_jax.samplers.loop.sample`.
    """
    if scale is not None:
        caption = captions.double(PIXART, caption, negative, params)
    conditions = size_conditions(model, len(caption[0]), noise.shape[2:])

    def denoise(x, timestep):
        return model.apply(
            {"params": at_timestep(params, timestep)}, x, timestep, *caption, *conditions
        )

    denoiser = denoise if scale is None else PIXART.guide(denoise, scale)
    return loop.sample(denoiser, noise, steps)


def size_conditions(
    model: PixArtTransformer, batch: int, size: tuple[int, ...]
) -> tuple[Array, ...]:
    """Resolution and aspect ratio of latents of `size`, for a model that is told them; or nothing.

    Args:
        model: see `sample_latents`.
        batch: of the forward.
        size: rows and columns of latents.
    """
    if not model.config.micro_conditions:
        return ()
    height, width = (PIXELS * side for side in size)
    resolution = jnp.tile(jnp.array([height, width], jnp.float32), (batch, 1))
    return resolution, jnp.full(batch, height / width, jnp.float32)
