"""One published forward pass of every network of the registry, as shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.models import dit, flux, latte, latte_t2v, pixart, stdit, stdit3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One forward pass.

    Attributes:
        network: key of the registry.
        config: the network's config.
        inputs: shapes and dtypes of what `apply` takes behind the parameters.
        title: what a table of it is called.
    """

    network: str
    config: Any
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    title: str


def flux_workload(config: flux.FluxConfig, pixels: int, text: int = 512) -> Workload:
    """FLUX at `pixels` x `pixels`, one picture: its guidance is an input, so the batch is 1."""
    image = (pixels // 16) ** 2
    inputs = [_bf16(1, image, config.in_channels), _bf16(1, text, config.context_in_dim)]
    inputs += [_f32(1), _bf16(1, config.vec_in_dim), _f32(image, 3), _f32(text, 3)]
    if config.guidance_embed:
        inputs.append(_f32(1))
    title = f"FLUX.1-dev, {pixels} x {pixels} ({image} + {text} tokens), batch 1"
    return Workload(network="flux", config=config, inputs=tuple(inputs), title=title)


def guided(
    network: str, config: Any, latents: tuple[int, ...], *rest: jax.ShapeDtypeStruct, title: str
) -> Workload:
    """One picture or video with classifier-free guidance, so the batch is 2; steps are integers."""
    inputs = _bf16(2, *latents), jax.ShapeDtypeStruct((2,), jnp.int32), *rest
    return Workload(network=network, config=config, inputs=inputs, title=f"{title}, batch 2")


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _caption(tokens: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """States of T5-XXL and their mask."""
    return _bf16(2, tokens, 4096), jax.ShapeDtypeStruct((2, tokens), jnp.bool_)


_LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)

WORKLOADS = {
    work.network: work
    for work in (
        flux_workload(flux.FLUX_DEV, 1024),
        guided("dit", dit.DIT_XL_2_512, (4, 64, 64), _LABELS, title="DiT-XL/2, 512 x 512"),
        guided(
            "pixart",
            pixart.PIXART_SIGMA_1024_MS,
            (4, 128, 128),
            *_caption(300),
            title="PixArt-Sigma, 1024 x 1024",
        ),
        guided(
            "latte",
            latte.LATTE_XL_2_UCF101,
            latte.LATTE_XL_2_UCF101.latents,
            _LABELS,
            title="Latte-XL/2, 16 frames of 256 x 256",
        ),
        guided(
            "latte-t2v",
            latte_t2v.LATTE_1,
            (4, 16, 64, 64),
            *_caption(120),
            title="Latte-1, 16 frames of 512 x 512",
        ),
        guided(
            "stdit",
            stdit.STDIT_XL_2_16X512,
            (4, 16, 64, 64),
            *_caption(120),
            title="STDiT-XL/2 (Open-Sora 1.0), 16 frames of 512 x 512",
        ),
        guided(
            "stdit3",
            stdit3.STDIT3_XL_2,
            (4, 30, 60, 106),
            *_caption(300),
            *(_f32(2),) * 3,
            title="STDiT3-XL/2 (Open-Sora 1.2), 102 frames of 480 x 848",
        ),
    )
}
