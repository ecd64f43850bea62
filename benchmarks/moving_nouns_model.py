"""The small STDiT of moving nouns: sizes, start, loss, sampler, exact evaluation.

Rectified flow with Open-Sora 1.2's sampler (`lowbit_jax.samplers.rectified_flow`): x_t = t noise +
(1 - t) data, the network is told 1000 t and gives the data. A token holds 192 numbers: a velocity,
which has the noise in it, would have to take most of a width of 256 through every block (Li & He
2025, arXiv 2511.13720, show what becomes of that).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from lowbit_jax.evaluation import clip_scores, moving_nouns
from lowbit_jax.evaluation.moving_nouns import FRAMES, PARTS, Scene
from lowbit_jax.models.stdit import STDiTConfig, STDiTTransformer
from lowbit_jax.pipelines.video import sample_latents
from lowbit_jax.samplers.guidance import OPENSORA_1_2
from lowbit_jax.samplers.rectified_flow import RectifiedFlowSchedule

MAX_LEN = 32  # tokens of a caption
TEXT_WIDTH = 384
SIDE = 32  # pixels
SAMPLE_STEPS = 20
GUIDANCE_SCALE = 1.5  # every part and motion is right without, too, and the PSNR falls with it
CAPTION_DROPOUT = 0.1
# Times are shifted towards noise by the ratio of the sides, 32 / 8.
SCHEDULER = {
    "_class_name": "RFLOW",
    "num_timesteps": 1000,
    "use_discrete_timesteps": False,
    "use_timestep_transform": True,
    "ratio": 4.0,
    "prediction_type": "sample",
}
SCHEDULE = RectifiedFlowSchedule.from_json(SCHEDULER)
MIN_TIME = 0.2  # of the loss's weight; the sampler's last time is 0.17

ACCURACIES = (*PARTS, "direction", "speed")
OTHER_SCORES = tuple(name for name in clip_scores.METRICS if name not in ACCURACIES)


def stdit_config(hidden: int = 256, heads: int = 4, depth: int = 4, factor: int = 4) -> STDiTConfig:
    """The small STDiT; pixel-unshuffling by `factor` stands in for a VAE."""
    return STDiTConfig(
        input_size=(FRAMES, SIDE // factor, SIDE // factor),
        in_channels=3 * factor**2,
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        caption_channels=TEXT_WIDTH,
        null_caption_length=MAX_LEN,
        learn_sigma=False,
    )


def pixel_factor(config: STDiTConfig) -> int:
    """Side of the cell of pixels that makes the channels of one latent pixel."""
    return round((config.in_channels / 3) ** 0.5)


def init_params(config: STDiTConfig, seed: int) -> dict[str, Any]:
    """Random float32 parameters; temporal and cross-attention start silent, as in Open-Sora's code,
    and the output starts at zero."""
    model = STDiTTransformer(config)
    shapes = [(1, config.in_channels, *config.input_size), (1,), (1, MAX_LEN, TEXT_WIDTH)]
    example = [jnp.zeros(shape) for shape in shapes]
    params = jax.jit(model.init)(jax.random.key(seed), *example, jnp.ones((1, MAX_LEN), bool))

    def start(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        silent = ("attn_temp/proj/", "cross_attn/proj/", "final_layer/linear/")
        return jnp.zeros_like(leaf) if any(part in name for part in silent) else leaf

    return jax.tree_util.tree_map_with_path(start, params["params"])


def shift_time(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """The schedule's shift of times in [0, 1], by 4."""
    return 4 * u / (1 + 3 * u)


def caption_mask(states: Float[Array, "b s c"]) -> Bool[Array, "b s"]:
    """True for tokens: MiniLM's states are exactly zero where padded, and nowhere else."""
    return (states != 0).any(axis=-1)


def make_loss(config: STDiTConfig, dtype: Any) -> Callable[..., Float[Array, ""]]:
    """`loss(params, key, clips uint8 [b, f, 32, 32, 3], txt [b, s, c])`."""
    model = STDiTTransformer(config, dtype, remat=True)
    factor = pixel_factor(config)

    def loss(params, key: Key[Array, ""], clips, txt):
        """Mean squared error of the velocity (data - x) / t. Times are stratified over the batch:
        less variance. One caption in ten is replaced by the null caption, for guidance."""
        data = moving_nouns.to_latent(clips.astype(jnp.float32) / 127.5 - 1, factor)
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, data.shape)
        b = len(data)
        t = shift_time((jnp.arange(b) + jax.random.uniform(time_key, (b,))) / b)
        at = t[:, None, None, None, None]
        mask = caption_mask(txt)
        drop = jax.random.uniform(drop_key, (b, 1, 1)) < CAPTION_DROPOUT
        txt = jnp.where(drop, params["y_embedder"]["y_embedding"], txt.astype(jnp.float32))
        x = (1 - at) * data + at * noise
        found = model.apply({"params": params}, x, 1000 * t, txt, mask).astype(jnp.float32)
        return jnp.mean(jnp.square((found - data) / jnp.maximum(at, MIN_TIME)))

    return loss


def sample_clips(
    model: STDiTTransformer, params: Any, noise: Any, txt: Any, **options: Any
) -> Float[np.ndarray, "b f 32 32 3"]:
    """Clips in [0, 255] of `sample_states`; arguments as there."""
    return to_clips(model.config, sample_states(model, params, noise, txt, **options))


def sample_states(
    model: STDiTTransformer,
    params: Any,
    noise: Float[Array, "b c f y x"],
    txt: Float[np.ndarray, "b s c"],
    *,
    steps: int = SAMPLE_STEPS,
    scale: float | None = GUIDANCE_SCALE,
) -> Float[np.ndarray, "b c f y x"]:
    """Latents from noise and the states of captions, float or quantised parameters."""
    latents = sample_latents(
        model,
        params,
        noise,
        (jnp.asarray(txt, jnp.float32), caption_mask(txt)),
        SCHEDULE.steps(steps),
        guidance=OPENSORA_1_2,
        scale=scale,
    )
    return np.asarray(latents)


def to_clips(
    config: STDiTConfig, latents: Float[np.ndarray, "b c f y x"]
) -> Float[np.ndarray, "b f 32 32 3"]:
    """Latents as clips in [0, 255]."""
    pixels = moving_nouns.from_latent(latents, pixel_factor(config))
    return np.clip(pixels * 127.5 + 127.5, 0, 255)


def make_noise(config: STDiTConfig, count: int, seed: int) -> Float[Array, "b c f y x"]:
    """Standard normal start of `count` clips."""
    return jax.random.normal(jax.random.key(seed), (count, config.in_channels, *config.input_size))


def evaluate(
    model: STDiTTransformer, params: Any, scene: Scene, attrs: np.ndarray, txt: np.ndarray
) -> tuple[dict[str, float], Float[np.ndarray, "b f 32 32 3"]]:
    """Mean of every score over held-out captions, always from the same noise; and the clips."""
    clips = sample_clips(model, params, make_noise(model.config, len(attrs), 1), txt)
    found = clip_scores.scores(scene, clips, attrs)
    return {name: float(values.mean()) for name, values in found.items()}, clips


def contact_sheet(exact: np.ndarray, found: np.ndarray, across: int = 2) -> np.ndarray:
    """Clips as rows of frames, the exact one above what was generated; `across` clips per row."""
    n, f, h, w, _ = exact.shape
    n = n // across * across
    both = np.stack([exact[:n], np.round(found[:n])]).astype(np.uint8)
    grid = both.reshape(2, n // across, across, f, h, w, 3).transpose(1, 0, 4, 2, 3, 5, 6)
    return grid.reshape(n // across * 2 * h, across * f * w, 3)
