"""What `benchmarks.parity` compares: one entry per network and checkpoint layout.

An entry says how to build the independent reference with random weights, how its owner writes it to
disk, what to feed both with, and which sampler to run. A network is added with one entry per layout
(see docs/adding-a-model.md); its reference and inputs are those of its tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.safetensors import write_safetensors
from lowbit_jax.models.dit import DIT_XL_2_256
from lowbit_jax.models.flux import FLUX_DEV
from tests.references import dit, dit_files, flux, flux_files

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
)
