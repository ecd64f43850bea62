"""Models by name: what a saved one needs to be built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lowbit_jax.models import (
    autoencoder_kl,
    clip_text,
    dit,
    flux,
    latte,
    latte_t2v,
    pixart,
    stdit,
    stdit3,
    t5,
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model that can be converted, saved and built again.

    Attributes:
        config: its config class.
        module: builds the Flax module: `module(config, dtype)`.
        abstract_params: `(config, dtype) -> tree of jax.ShapeDtypeStruct`.
        title: what people call it.
    """

    config: type
    module: Callable[..., nn.Module]
    abstract_params: Callable[..., Any]
    title: str


@dataclass(frozen=True, kw_only=True)
class Network(Component):
    """One network that denoises.

    Attributes:
        samplers: keys of `lowbit_jax.samplers.registry.SAMPLERS` that it is sampled with, its
            publishers' usual one first.
    """

    samplers: tuple[str, ...]


NETWORKS = {
    "flux": Network(
        config=flux.FluxConfig,
        module=flux.FluxTransformer,
        abstract_params=flux.abstract_params,
        title="FLUX.1 dev, schnell",
        samplers=("flow-euler",),
    ),
    "dit": Network(
        config=dit.DiTConfig,
        module=dit.DiTTransformer,
        abstract_params=dit.abstract_params,
        title="DiT",
        samplers=("ddpm", "ddim"),
    ),
    "pixart": Network(
        config=pixart.PixArtConfig,
        module=pixart.PixArtTransformer,
        abstract_params=pixart.abstract_params,
        title="PixArt-alpha, PixArt-Sigma",
        samplers=("dpm-solver++",),
    ),
    "latte": Network(
        config=latte.LatteConfig,
        module=latte.LatteTransformer,
        abstract_params=latte.abstract_params,
        title="Latte",
        samplers=("ddpm", "ddim"),
    ),
    "latte-t2v": Network(
        config=latte_t2v.LatteT2VConfig,
        module=latte_t2v.LatteT2VTransformer,
        abstract_params=latte_t2v.abstract_params,
        title="Latte-1",
        samplers=("ddim",),
    ),
    "stdit": Network(
        config=stdit.STDiTConfig,
        module=stdit.STDiTTransformer,
        abstract_params=stdit.abstract_params,
        title="STDiT (Open-Sora 1.0)",
        samplers=("ddpm", "rectified-flow"),
    ),
    "stdit3": Network(
        config=stdit3.STDiT3Config,
        module=stdit3.STDiT3Transformer,
        abstract_params=stdit3.abstract_params,
        title="STDiT3 (Open-Sora 1.2)",
        samplers=("rectified-flow",),
    ),
}

# what stands before and after a network in a pipeline
COMPONENTS = {
    "t5": Component(
        config=t5.T5Config,
        module=t5.T5Encoder,
        abstract_params=t5.abstract_params,
        title="T5 v1.1 encoder",
    ),
    "clip-text": Component(
        config=clip_text.ClipTextConfig,
        module=clip_text.ClipTextEncoder,
        abstract_params=clip_text.abstract_params,
        title="CLIP text encoder",
    ),
    "autoencoder-kl": Component(
        config=autoencoder_kl.AutoencoderConfig,
        module=autoencoder_kl.AutoencoderKL,
        abstract_params=autoencoder_kl.abstract_params,
        title="AutoencoderKL",
    ),
}

MODELS: dict[str, Component] = {**NETWORKS, **COMPONENTS}


def read_config(name: str, fields: Mapping[str, Any]) -> Any:
    """The config object of a model from JSON-able fields, as a manifest has them.

    Raises:
        ValueError: an unknown model.
    """
    if name not in MODELS:
        raise ValueError(f"model '{name}' is none of: {', '.join(MODELS)}")
    # JSON has no tuples
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return MODELS[name].config(**values)


def build(name: str, config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The module of a saved model, from the `model` and `config` of its manifest.

    Raises:
        ValueError: an unknown model.
    """
    fields = read_config(name, config)
    return MODELS[name].module(fields, dtype)
