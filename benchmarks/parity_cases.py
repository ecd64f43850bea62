"""What `benchmarks.parity` compares: one entry per network and checkpoint layout.

An entry says how to build the independent reference with random weights, how its owner writes it to
disk, what to feed both with, and which sampler to run. A network is added with one entry per layout
(see docs/adding-a-model.md); its reference and inputs are those of its tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.safetensors import write_safetensors
from lowbit_jax.models.dit import DIT_XL_2_256
from lowbit_jax.models.flux import FLUX_DEV
from lowbit_jax.models.latte import LATTE_XL_2_UCF101
from lowbit_jax.models.latte_t2v import LATTE_1
from lowbit_jax.models.pixart import PIXART_SIGMA_1024_MS
from lowbit_jax.models.stdit import STDIT_XL_2_16X256
from lowbit_jax.models.stdit3 import STDIT3_XL_2
from tests.references import (
    dit,
    dit_files,
    dit_original,
    flux,
    flux_files,
    latte,
    latte_files,
    latte_t2v,
    latte_t2v_files,
    pixart,
    pixart_files,
    stdit,
    stdit3,
    stdit3_files,
    stdit_files,
)

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network in one checkpoint layout.

    Attributes:
        model: key of `lowbit_jax.models.registry.NETWORKS`.
        layout: name of one of the layouts of `convert.registry.SOURCES[model]`.
        small: a small config.
        full: a config of the published width, cut in depth to fit a few GB.
        cut: how many of the published model's blocks `full` has, for people.
        reference: a config -> the reference with random weights.
        run: (reference, inputs) -> its output, from NumPy arrays.
        inputs: a config -> inputs, named as the arguments of our module.
        write: (folder, reference) writes its checkpoint there.
        sampler: key of `benchmarks.parity_samplers.RUNS`.
        state: the input that a sampler integrates; the times are "timestep".
    """

    model: str
    layout: str
    small: Any
    full: Any
    cut: str
    reference: Callable[[Any], Any]
    run: Callable[[Any, Inputs], np.ndarray]
    inputs: Callable[[Any], Inputs]
    write: Callable[[Path, Any], Any]
    sampler: str
    state: str = "x"


def save_pretrained(folder: Path, reference: Any) -> None:
    """As diffusers writes its models."""
    reference.save_pretrained(folder)


def save_bfl(folder: Path, reference: Any) -> None:
    """As Black Forest Labs writes FLUX: one file and no config."""
    tensors = flux_files.to_bfl(reference.state_dict())
    write_safetensors(folder / "flux.safetensors", tensors)


def save_torch(
    folder: Path, state: dict[str, Any], heads: int, field: str = "num_attention_heads"
) -> None:
    """As the original programs write theirs: one .pt file, beside it what it does not say."""
    torch.save(state, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({field: heads}))


def save_stdit3(folder: Path, reference: Any) -> None:
    """As Open-Sora 1.2 is published: one safetensors file and its config."""
    write_safetensors(folder / "model.safetensors", stdit3.state_arrays(reference))
    config = stdit3_files.published_config(reference.config)
    (folder / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class OriginalPixArt:
    """The original PixArt, which `tests.references.pixart` runs from its state."""

    state: dict[str, torch.Tensor]
    config: Any

    @staticmethod
    def random(config: Any) -> OriginalPixArt:
        """With random weights."""
        shapes = pixart_files.original_shapes(config)
        return OriginalPixArt(pixart.random_original(shapes), config)

    def run(self, inputs: Inputs) -> np.ndarray:
        """Its output."""
        return pixart.run_original(self.state, self.config, inputs)

    def save(self, folder: Path) -> None:
        """As PixArt's training program writes it, positions included."""
        positions = torch.tensor(pixart_files.position_table(self.config)[None])
        save_torch(folder, self.state | {"pos_embed": positions}, self.config.num_heads)


def video_inputs(config: Any, size: tuple[int, ...], tokens: int = 7) -> Inputs:
    """Two videos of `size` latents (frames, rows, columns), with captions of 4 and all tokens."""
    rng = np.random.default_rng(1)
    return {
        "x": rng.standard_normal((2, config.in_channels, *size), np.float32),
        "timestep": np.array([503, 3], np.int32),
        "caption": rng.standard_normal((2, tokens, config.caption_channels), np.float32),
        "caption_mask": np.arange(tokens) < np.array([[4], [tokens]]),
    }


def stdit3_inputs(config: Any) -> Inputs:
    """Of odd sizes, which are padded; with the rate and the pixels of each video."""
    numbers = {"fps": [24, 8], "height": [240, 144], "width": [426, 256]}
    inputs = video_inputs(config, (5, 7, 11))
    return inputs | {name: np.array(value, np.float32) for name, value in numbers.items()}


def latte_inputs(config: Any) -> Inputs:
    """Two videos, the second without a class."""
    inputs = video_inputs(replace(LATTE_1, in_channels=config.in_channels), config.latents[1:])
    labels = np.array([3, config.num_classes], np.int32)
    return {"x": inputs["x"], "timestep": inputs["timestep"], "labels": labels}


_FLUX = Case(
    model="flux",
    layout="diffusers",
    small=flux_files.TINY,
    full=replace(FLUX_DEV, depth=1, depth_single_blocks=1),
    cut="1+1 of 19+38",
    reference=flux.diffusers_flux,
    run=flux.run_flux,
    inputs=flux.flux_inputs,
    write=save_pretrained,
    sampler="flow-euler",
    state="img",
)
_FACEBOOK = {"time_shift": 0, "mlp_norm_eps": 1e-6}

CASES = (
    _FLUX,
    # a file without a config has heads of 128, as published
    replace(_FLUX, layout="Black Forest Labs", small=flux_files.PUBLISHED_HEADS, write=save_bfl),
    Case(
        model="dit",
        layout="diffusers",
        small=dit_files.TINY,
        full=replace(DIT_XL_2_256, depth=2),
        cut="2 of 28",
        reference=dit.diffusers_dit,
        run=dit.run_dit,
        inputs=dit.dit_inputs,
        write=save_pretrained,
        sampler="ddpm",
    ),
    Case(
        model="dit",
        layout="original",
        small=replace(dit_files.TINY, **_FACEBOOK),
        full=replace(DIT_XL_2_256, depth=2, **_FACEBOOK),
        cut="2 of 28",
        reference=dit_original.original_dit,
        run=dit_original.run_original,
        inputs=dit.dit_inputs,
        write=lambda folder, model: save_torch(
            folder, model.state_dict(), model.blocks[0].attn.heads
        ),
        sampler="ddpm",
    ),
    Case(
        model="pixart",
        layout="diffusers",
        small=pixart_files.TINY,
        full=replace(PIXART_SIGMA_1024_MS, depth=2),
        cut="2 of 28",
        reference=pixart.random_diffusers,
        run=pixart.run_diffusers,
        inputs=partial(pixart.pixart_inputs, grid=(4, 6)),
        write=save_pretrained,
        sampler="dpm-solver++",
    ),
    Case(
        model="pixart",
        layout="original",
        small=pixart_files.TINY_ORIGINAL,
        full=replace(
            pixart_files.PUBLISHED_ORIGINALS["sigma-1024-compressed"],
            depth=2,
            compressed_layers=(1,),
        ),
        cut="2 of 28",
        reference=OriginalPixArt.random,
        run=OriginalPixArt.run,
        inputs=partial(pixart.pixart_inputs, grid=(4, 6)),
        write=lambda folder, model: model.save(folder),
        sampler="dpm-solver++",
    ),
    Case(
        model="latte-t2v",
        layout="diffusers",
        small=latte_t2v_files.TINY,
        full=replace(LATTE_1, pairs=1, num_frames=5),  # of diffusers, exactly so many
        cut="1 of 28 pairs",
        reference=latte_t2v.diffusers_latte,
        run=latte_t2v.run,
        # diffusers' model is built for a number of frames
        inputs=lambda config: video_inputs(config, (config.num_frames, 8, 12)),
        write=save_pretrained,
        sampler="ddim",
    ),
    Case(
        model="latte",
        layout="original",
        small=latte_files.TINY,
        full=replace(LATTE_XL_2_UCF101, depth=2, num_frames=4, sample_size=8),
        cut="2 of 28",
        reference=latte.torch_latte,
        run=latte.run,
        inputs=latte_inputs,
        write=lambda folder, model: save_torch(
            folder, {"ema": model.state_dict()}, model.config.num_heads
        ),
        sampler="ddpm",
    ),
    Case(
        model="stdit",
        layout="Open-Sora 1.0",
        small=stdit_files.TINY,
        full=replace(STDIT_XL_2_16X256, depth=1, input_size=(4, 16, 16)),
        cut="1 of 28",
        reference=lambda config: stdit.torch_stdit(config, config.input_size),
        run=stdit.run,
        inputs=lambda config: video_inputs(config, config.input_size),
        write=lambda folder, model: save_torch(
            folder, model.state_dict(), model.blocks[0].attn.heads, "num_heads"
        ),
        sampler="ddpm",
    ),
    Case(
        model="stdit3",
        layout="Open-Sora 1.2",
        small=stdit3_files.TINY,
        full=replace(STDIT3_XL_2, pairs=1),
        cut="1 of 28 pairs",
        reference=stdit3.torch_stdit3,
        run=stdit3.run,
        inputs=stdit3_inputs,
        write=save_stdit3,
        sampler="rectified-flow",
    ),
)
