"""FLUX's modulations for all steps before the first: 27 % of its weights, read once per picture.

All 76 of FLUX.1-dev's modulation layers and the last one's see one vector per picture and step, of
time, guidance and pooled text: 1,056,768 values a step, 106 MB in bfloat16 for 50 steps. Shape
letters: s steps, b batch, l layers, k width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lowbit_jax.models.flux import FluxTransformer, Modulation, Modulations, condition
from lowbit_jax.models.layers import Linear, MLPEmbedder
from lowbit_jax.models.scan import scan_layers

EMBEDDERS = ("time_in", "guidance_in", "vector_in")
LAYERS = ("img_mod", "txt_mod", "modulation", "adaLN_modulation")


def is_modulation(path: str) -> bool:
    """Whether a parameter of this path, or this end of one, is read by `modulations` alone."""
    return any(key in EMBEDDERS or key in LAYERS for key in path.split("/"))


def split_modulation(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter tree in two: what every step reads, and what only `modulations` does.

    Nothing is copied; drop the second, and the tree it came from, once modulations are there.
    """
    steps: dict[str, Any] = {}
    once: dict[str, Any] = {}
    for key, value in params.items():
        if is_modulation(key):
            once[key] = value
        elif isinstance(value, Mapping) and key != "kernel":
            below = split_modulation(value)
            steps |= {key: below[0]} if below[0] else {}
            once |= {key: below[1]} if below[1] else {}
        else:
            steps[key] = value
    return steps, once


def modulations(
    model: FluxTransformer,
    params: Mapping[str, Any],
    timestep: Float[Array, "s b"],
    pooled: Float[Array, "b vec"],
    guidance: Float[Array, "b"] | None = None,
) -> Modulations:
    """What the model makes of time, guidance and pooled text, for all steps at once.

    One product with s b rows per layer, so each weight is read once. A step's rows are those of a
    forward pass up to the order in which a product of more rows is summed.

    Args:
        model: the module.
        params: its parameters, or the second tree of `split_modulation`; quantised or not.
        timestep: flow times.
        pooled: pooled text vectors.
        guidance: distilled guidance scales, exactly when the model has a guidance embedder.

    Raises:
        ValueError: if guidance is missing or unexpected.
    """
    config, dtype = model.config, model.dtype

    def embed(x, name):
        module = MLPEmbedder(config.hidden_size, dtype)
        return module.apply({"params": params[name]}, x.astype(dtype))

    vec = condition(config, embed, timestep, pooled, guidance)
    rows = vec.reshape(-1, vec.shape[-1])

    def of_stack(stack: str, name: str, count: int) -> list[Float[Array, "s l b k"]]:
        def layer(carry, params):
            return carry, Modulation(count, dtype).apply({"params": params}, rows)

        segments = params.get(stack, {})
        found = [
            scan_layers(layer, (), segments[first][name])[1] for first in sorted(segments, key=int)
        ]
        return [by_step(jnp.concatenate(parts)) for parts in zip(*found, strict=True)]

    def by_step(vectors: Float[Array, "l sb k"]) -> Float[Array, "s l b k"]:
        return jnp.moveaxis(vectors.reshape(-1, *timestep.shape, vectors.shape[-1]), 1, 0)

    last = Linear(2 * config.hidden_size, dtype=dtype)
    final: Any = last.apply({"params": params["final_layer"]["adaLN_modulation"]}, nn.silu(vec))
    return Modulations(
        double=(of_stack("double_blocks", "img_mod", 6), of_stack("double_blocks", "txt_mod", 6)),
        single=of_stack("single_blocks", "modulation", 3),
        final=list(jnp.split(final, 2, axis=-1)),
    )


def modulation_bytes(config: Any, steps: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of the modulations of a picture."""
    vectors = 12 * config.depth + 3 * config.depth_single_blocks + 2
    return vectors * config.hidden_size * steps * batch * itemsize


def step_of(given: Modulations, step: int) -> Modulations:
    """Those of one step."""
    return jax.tree.map(lambda leaf: leaf[step], given)
