"""The small FLUX for 32x32 pictures: sizes, start, loss, sampler.

Rectified flow: x_t = (1 - t) x0 + t noise, target noise - x0 (Liu et al. 2022; Esser et al. 2024,
equation 4, and the timestep shift of its section 5.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from lowbit_jax.evaluation import nouns
from lowbit_jax.models.flux import FluxConfig, FluxTransformer, image_ids, text_ids
from lowbit_jax.samplers import flow_euler

SHIFT = 3.0
SCHEDULER = {  # what diffusers is told of it
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.32.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": SHIFT,
    "use_dynamic_shifting": False,
}
TOKENS = 32  # of text in the example that parameters are made with; no shape depends on it
SAMPLE_STEPS = 20
TEXT_WIDTH = 384


def flux_config(hidden: int = 256, heads: int = 4, depth: int = 2, single: int = 4) -> FluxConfig:
    """The small FLUX; axes_dim (16, 24, 24) at head dim 64, in that proportion at others."""
    head = hidden // heads
    side = 2 * (head * 3 // 16)
    return FluxConfig(
        in_channels=48,
        vec_in_dim=TEXT_WIDTH,
        context_in_dim=TEXT_WIDTH,
        hidden_size=hidden,
        mlp_ratio=4.0,
        num_heads=heads,
        depth=depth,
        depth_single_blocks=single,
        axes_dim=(head - 2 * side, side, side),
        guidance_embed=False,
    )


def make_velocity(config: FluxConfig, dtype: Any) -> Callable[..., Float[Array, "b 64 48"]]:
    """`velocity(params, x [b, 64, 48], t [b], txt [b, t, k], pooled [b, k])` of a model."""
    model = FluxTransformer(config, dtype, remat=True)  # a third faster to train on a CPU

    def velocity(params, x, t, txt, pooled):
        ids = image_ids(8, 8), text_ids(txt.shape[1])
        return model.apply({"params": params}, x, txt, t, pooled, *ids).astype(jnp.float32)

    return velocity


def init_params(config: FluxConfig, seed: int) -> dict[str, Any]:
    """Random float32 parameters with adaLN-Zero (Peebles & Xie 2023, section 3.2): every gate and
    the last projection start at zero, so each block starts as the identity."""
    sizes = [(1, 64, 48), (1, TOKENS, TEXT_WIDTH), (1,), (1, TEXT_WIDTH)]
    example = [jnp.zeros(size) for size in sizes]
    init = jax.jit(FluxTransformer(config).init)
    params = init(jax.random.key(seed), *example, image_ids(8, 8), text_ids(TOKENS))["params"]

    def zero(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_zero = "mod" in name or "adaLN" in name or name.startswith("final_layer/linear")
        return jnp.zeros_like(leaf) if is_zero else leaf

    return jax.tree_util.tree_map_with_path(zero, params)


def shift_time(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """FLUX's timestep shift: s u / (1 + (s - 1) u) with s = 3."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def flow_loss(velocity, params, key, images, txt, pooled) -> Float[Array, ""]:
    """Mean squared error of the velocity. Times are stratified over the batch: less variance."""
    x0 = nouns.to_latent(images.astype(jnp.float32) / 127.5 - 1)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    b = len(x0)
    t = shift_time((jnp.arange(b) + jax.random.uniform(time_key, (b,))) / b)
    at = t[:, None, None]
    found = velocity(params, (1 - at) * x0 + at * noise, t, txt, pooled)
    return jnp.mean(jnp.square(found - (noise - x0)))


def make_sampler(velocity, steps: int = SAMPLE_STEPS):
    """`sample(params, noise [b, 64, 48], txt, pooled)`: Euler steps of the shifted schedule."""
    sigmas = flow_euler.FlowSchedule.from_json(SCHEDULER).sigmas(steps, 64)

    @jax.jit
    def sample(params, noise, txt, pooled):
        return flow_euler.sample(lambda x, t: velocity(params, x, t, txt, pooled), noise, sigmas)

    return sample


def to_pixels(tokens: Float[Array, "b 64 48"]) -> Float[np.ndarray, "b 32 32 3"]:
    """Latent tokens to pictures in [0, 255]."""
    return np.clip(np.asarray(nouns.from_latent(tokens)) * 127.5 + 127.5, 0, 255)


def comparison_sheet(
    targets: UInt8[np.ndarray, "n 32 32 3"], pictures: Num[np.ndarray, "n 32 32 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of up to 16 nouns, the target above what was generated."""
    n = min(64, len(pictures) // 16 * 16) or len(pictures)
    both = np.stack([targets[:n], pictures[:n].round()]).astype(np.uint8)
    across = min(16, n)
    grid = both.reshape(2, n // across, across, 32, 32, 3).transpose(1, 0, 3, 2, 4, 5)
    return grid.reshape(n // across * 2 * 32, across * 32, 3)
