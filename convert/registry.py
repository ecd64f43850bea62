"""Which checkpoints can be converted: one entry per model, found by its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert import (
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
from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.table import Layout


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one model's checkpoints are read.

    Attributes:
        layouts: the namings that are understood.
        read_config: the model's config from a checkpoint in a layout.
        exports: namings that can be written, the usual one first: name -> the `config.json` that
            goes with a config. It raises ValueError for one that the naming has no place for.
    """

    layouts: tuple[Layout, ...]
    read_config: Callable[[Checkpoint, Layout], Any]
    exports: Mapping[str, Callable[[Any], dict[str, Any]]]

    def export_layout(self, name: str | None = None) -> Layout:
        """The naming to export in; None for the usual one.

        Raises:
            ValueError: a naming that cannot be written.
        """
        name = name or next(iter(self.exports))
        if name not in self.exports:
            raise ValueError(f"layout '{name}' is none of: {', '.join(self.exports)}")
        return next(layout for layout in self.layouts if layout.name == name)


SOURCES = {
    "flux": Source(
        layouts=flux.LAYOUTS,
        read_config=flux.read_config,
        exports={"diffusers": flux.to_diffusers_config},
    ),
    "dit": Source(
        layouts=dit.LAYOUTS,
        read_config=dit.read_config,
        exports={"diffusers": dit.to_diffusers_config, "original": dit.to_original_config},
    ),
    "pixart": Source(
        layouts=pixart.LAYOUTS,
        read_config=pixart.read_config,
        exports={
            "diffusers": pixart.to_diffusers_config,
            "original": pixart.to_original_config,
        },
    ),
    "latte": Source(
        layouts=latte.LAYOUTS,
        read_config=latte.read_config,
        exports={latte.ORIGINAL.name: latte.to_config},
    ),
    "latte-t2v": Source(
        layouts=latte_t2v.LAYOUTS,
        read_config=latte_t2v.read_config,
        exports={"diffusers": latte_t2v.to_diffusers_config},
    ),
    "stdit": Source(
        layouts=stdit.LAYOUTS,
        read_config=stdit.read_config,
        exports={stdit.ORIGINAL.name: stdit.to_config},
    ),
    "stdit3": Source(
        layouts=stdit3.LAYOUTS,
        read_config=stdit3.read_config,
        exports={stdit3.ORIGINAL.name: stdit3.to_config},
    ),
}

# what stands before and after a network in a pipeline
COMPONENT_SOURCES = {
    "t5": Source(
        layouts=t5.LAYOUTS,
        read_config=t5.read_config,
        exports={"transformers": t5.to_transformers_config},
    ),
    "clip-text": Source(
        layouts=clip_text.LAYOUTS,
        read_config=clip_text.read_config,
        exports={"transformers": clip_text.to_transformers_config},
    ),
    "autoencoder-kl": Source(
        layouts=autoencoder_kl.LAYOUTS,
        read_config=autoencoder_kl.read_config,
        exports={"diffusers": autoencoder_kl.to_diffusers_config},
    ),
}

ALL_SOURCES = SOURCES | COMPONENT_SOURCES


def recognise(checkpoint: Checkpoint, model: str = "auto") -> tuple[str, Layout]:
    """Name and layout of the model a checkpoint holds.

    Raises:
        CheckpointError: none that is known, or not the one asked for.
        ValueError: an unknown `model`.
    """
    if model != "auto" and model not in ALL_SOURCES:
        raise ValueError(f"--model {model} is neither 'auto' nor one of: {', '.join(ALL_SOURCES)}")
    names = set(checkpoint.names)
    for name in ALL_SOURCES if model == "auto" else (model,):
        for layout in ALL_SOURCES[name].layouts:
            if layout.matches(names):
                return name, layout
    wanted = (
        f"a {model} checkpoint" if model != "auto" else f"a known model ({', '.join(ALL_SOURCES)})"
    )
    example = (
        f"its tensors look like {quote(checkpoint.names[0])}" if checkpoint.names else "it is empty"
    )
    raise CheckpointError(checkpoint.source, f"not {wanted}: {example}")
