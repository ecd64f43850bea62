"""Networks by name: what a saved model needs to be built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lowbit_jax.models import dit, flux, latte, latte_t2v, pixart, stdit, stdit3


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network.

    Attributes:
        config: its config class.
        module: builds the Flax module: `module(config, dtype)`.
        abstract_params: `(config, dtype) -> tree of jax.ShapeDtypeStruct`.
        title: what people call it.
        samplers: keys of `lowbit_jax.samplers.registry.SAMPLERS` that its publishers sample it
            with, the usual one first.
    """

    config: type
    module: Callable[..., nn.Module]
    abstract_params: Callable[..., Any]
    title: str
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
        samplers=("ddpm",),
    ),
    "stdit3": Network(
        config=stdit3.STDiT3Config,
        module=stdit3.STDiT3Transformer,
        abstract_params=stdit3.abstract_params,
        title="STDiT3 (Open-Sora 1.2)",
        samplers=("rectified-flow",),
    ),
}


def read_config(name: str, fields: Mapping[str, Any]) -> Any:
    """The config object of a network from JSON-able fields, as a manifest has them.

    Raises:
        ValueError: an unknown network.
    """
    if name not in NETWORKS:
        raise ValueError(f"model '{name}' is none of: {', '.join(NETWORKS)}")
    # JSON has no tuples
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return NETWORKS[name].config(**values)


def build(name: str, config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The module of a saved model, from the `model` and `config` of its manifest.

    Raises:
        ValueError: an unknown network.
    """
    fields = read_config(name, config)
    return NETWORKS[name].module(fields, dtype)
