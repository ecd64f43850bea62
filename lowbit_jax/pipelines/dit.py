"""DiT and Latte sampling: class labels and noise in, latents out, in one compiled loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key

from lowbit_jax.models.dit import DiTTransformer
from lowbit_jax.models.latte import LatteTransformer
from lowbit_jax.quant.ranged import at_timestep
from lowbit_jax.samplers import loop
from lowbit_jax.samplers.guidance import DIT_PUBLISHED, Guidance


@partial(jax.jit, static_argnames=("model", "guidance"))
def sample_latents(
    model: DiTTransformer | LatteTransformer,
    params: Any,
    noise: Float[Array, "b c ..."],
    labels: Int[Array, "b"],
    steps: loop.Steps,
    *,
    scale: Float[Array, ""] | float | None = None,
    guidance: Guidance = DIT_PUBLISHED,
    key: Key[Array, ""] | None = None,
    step_noise: Float[Array, "n b c ..."] | None = None,
) -> Float32[Array, "b c ..."]:
    """Denoise `noise` into latents; compiled once per shape, sampler and kernel formats.

    Args:
        model: the module; its dtype is the dtype of the computation.
        params: its parameters, float or quantised in any mix.
        noise: standard normal start.
        labels: classes; one out of range makes its picture or video NaN.
        steps: from a schedule of `lowbit_jax.samplers.ddpm` or `.ddim`.
        scale: of classifier-free guidance, which doubles the batch; None for one forward of b.
        guidance: which channels it guides: `DIT_PUBLISHED` (facebook: the first three),
            `DIT_DIFFUSERS` or `LATTE` (all).
        key: source of the noise added in every step, for steps that add any.
        step_noise: that noise itself, in place of `key`.

    Raises:
        ValueError: see `lowbit_jax.samplers.loop.sample`.
    """
    if scale is not None:
        labels = guidance.double(labels, jnp.full_like(labels, model.config.num_classes))

    def denoise(x, timestep):
        return model.apply({"params": at_timestep(params, timestep)}, x, timestep, labels)

    denoiser = denoise if scale is None else guidance.guide(denoise, scale)
    return loop.sample(denoiser, noise, steps, key=key, step_noise=step_noise)
