"""Text-to-video sampling (Latte-1, STDiT, STDiT3): text states and noise in, latents out."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key

from lowbit_jax.models.latte_t2v import LatteT2VTransformer
from lowbit_jax.models.stdit import STDiTTransformer
from lowbit_jax.models.stdit3 import STDiT3Transformer
from lowbit_jax.pipelines import captions
from lowbit_jax.quant.ranged import at_timestep
from lowbit_jax.samplers import loop
from lowbit_jax.samplers.guidance import Guidance

VideoTransformer = LatteT2VTransformer | STDiTTransformer | STDiT3Transformer


class Shot(NamedTuple):
    """What STDiT3 is told of a video beside its caption.

    Attributes:
        fps: frames per second. Open-Sora gives 120 for a picture.
        height: in pixels.
        width: in pixels.
    """

    fps: Float[Array, ""] | float
    height: Float[Array, ""] | float
    width: Float[Array, ""] | float


@partial(jax.jit, static_argnames=("model", "guidance"))
def sample_latents(
    model: VideoTransformer,
    params: Any,
    noise: Float[Array, "b c f y x"],
    caption: captions.Caption,
    steps: loop.Steps,
    *,
    guidance: Guidance,
    scale: Float[Array, ""] | float | None = 7.0,
    negative: captions.Caption | None = None,
    shot: Shot | None = None,
    made: Bool[Array, "b f"] | None = None,
    key: Key[Array, ""] | None = None,
    step_noise: Float[Array, "n b c f y x"] | None = None,
) -> Float32[Array, "b c f y x"]:
    """Denoise `noise` into latents; compiled once per shape, sampler and kernel formats.

    | network | steps of | guidance |
    |---|---|---|
    | Latte-1 | `ddim.DIT_SCHEDULE` | `LATTE_1` |
    | STDiT | `ddpm.DIT_SCHEDULE`, at `space_timesteps(1000, "100")` | `OPENSORA_1_0` |
    | STDiT3 | `rectified_flow.OPENSORA_1_2_SCHEDULE` | `OPENSORA_1_2` |

    Args:
        model: the module; its dtype is the dtype of the computation.
        params: its parameters, float or quantised in any mix.
        noise: standard normal start; where `made` is False, the latents of given frames.
        caption: states of the text encoder and their mask (True or 1: no padding).
        steps: of a sampler.
        guidance: of `lowbit_jax.samplers.guidance`, as published.
        scale: of classifier-free guidance, which doubles the batch; None for one forward of b.
        negative: what guidance leads away from; see `captions.double`.
        shot: rate and size of the videos; for STDiT3 only.
        made: False for frames (of patches) that are given and stay as they are, such as the first
            one of a video made from a picture; for STDiT3 only.
        key: source of the noise added in every step, for steps that add any.
        step_noise: that noise itself, in place of `key`.

    Raises:
        ValueError: a shot that is missing, or a shot or given frames that the network does not
            take; guidance without a negative caption; see also `lowbit_jax.samplers.loop.sample`.
    """
    batch = len(noise) * (1 if scale is None else 2)
    conditions = shot_conditions(model, batch, shot, given_frames=made is not None)
    if scale is not None:
        caption = captions.double(guidance, caption, negative, params)
    if made is not None:
        conditions["frame_mask"] = made if scale is None else guidance.double(made, made)

    def denoise(x, timestep):
        return model.apply(
            {"params": at_timestep(params, timestep)}, x, timestep, *caption, **conditions
        )

    denoiser = denoise if scale is None else guidance.guide(denoise, scale)
    if made is not None:
        assert isinstance(model, STDiT3Transformer)
        denoiser = _still(denoiser, jnp.repeat(made, model.config.patch_size[0], axis=1))
    return loop.sample(denoiser, noise, steps, key=key, step_noise=step_noise)


def shot_conditions(
    model: VideoTransformer, batch: int, shot: Shot | None, *, given_frames: bool = False
) -> dict[str, Any]:
    """What a network is told of a video beside its caption, float32 of `batch` entries each.

    Raises:
        ValueError: a shot that is missing, or a shot or given frames that the network does not
            take.
    """
    takes_shot = isinstance(model, STDiT3Transformer)
    if (shot is not None) != takes_shot or (given_frames and not takes_shot):
        given = [name for name, of in (("shot", shot), ("made", given_frames)) if of]
        raise ValueError(
            f"{type(model).__name__} was given {' and '.join(given) or 'no shot'}: STDiT3 needs "
            "`shot` and may have `made`, the others take neither"
        )
    numbers = {} if shot is None else shot._asdict()
    return {name: jnp.full(batch, value, jnp.float32) for name, value in numbers.items()}


def _still(denoiser: loop.Denoiser, made: Bool[Array, "b f"]) -> loop.Denoiser:
    """A denoiser whose velocity is 0 in the frames that are not made."""

    def denoise(x, timestep):
        moves = made[:, None, : x.shape[2], None, None]
        return jnp.where(moves, denoiser(x, timestep), 0)

    return denoise
