"""LoRA files to updates of our kernels, whatever their keys look like, with nothing lost.

    update = read_lora("style.safetensors", "flux", config)   # by layer path, scale folded in
    params = attach(params, update)                           # lowbit_jax.quant.lora

A key names a linear of the published model, in one of the layouts of `convert.registry`, and what
it is of it. Written for FLUX.1 by diffusers ("transformer.transformer_blocks.0.attn.to_q.lora_A"),
in Black Forest Labs' names ("double_blocks.0.img_attn.qkv.lora_A"), and by kohya's and others'
trainers, with dots as underscores ("lora_unet_double_blocks_0_img_attn_qkv.lora_down"). Where we
fuse what the source has apart, the update of the whole has the ranks of its parts side by side.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.errors import CheckpointError
from convert.registry import SOURCES
from convert.safetensors import TensorFile
from convert.safetensors_header import quote
from convert.table import FLOATS, Layout, Leaf, expand, swap_halves
from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.lora import LowRank

# Before the name of a linear: of the trainers that keep its dots, and of those that do not.
DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
UNDERSCORED = ("lora_unet_", "lora_transformer_")
DOWN = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight")
UP = ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight")
PARTS = dict.fromkeys(DOWN, "down") | dict.fromkeys(UP, "up") | {"alpha": "alpha"}
# What the names of other updates end in, and what they are.
FOREIGN = {
    "dora_scale": "DoRA's magnitudes: such an update depends on the weights",
    "lora_magnitude_vector": "DoRA's magnitudes: such an update depends on the weights",
    "lora_mid.weight": "a Tucker core of a convolution",
    "lora_B.bias": "a trained bias",
    "diff": "a full difference",
    "diff_b": "a difference of a bias",
}
METADATA = "lora_adapter_metadata"  # diffusers' JSON of the adapter's config, keys "transformer.*"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file to merge.

    Attributes:
        path: the file.
        strength: factor of its updates.
        skip: keys to leave out, see `read_lora`.
        sha256: of the file, for manifests.
    """

    path: Path
    strength: float = 1.0
    skip: str | None = None
    sha256: str

    @staticmethod
    def parse(text: str, skip: str | None = None) -> Lora:
        """ "style.safetensors", or "style.safetensors=0.8" with a strength; digests the file.

        Raises:
            ValueError: a strength that is no finite number. CheckpointError: no such file.
        """
        name, sign, number = text.rpartition("=")
        path, strength = (name, number) if sign else (text, "1")
        try:
            factor = float(strength)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ValueError(f"--lora {text}: strength '{strength}' is not a number")
        with TensorFile(path) as file:
            digest = file.sha256()
        return Lora(path=Path(path), strength=factor, skip=skip, sha256=digest)

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        entry = {"file": self.path.name, "sha256": self.sha256, "strength": self.strength}
        return entry | ({} if self.skip is None else {"skip": self.skip})


def parse_loras(texts: Sequence[str], skip: str | None) -> list[Lora]:
    """The files of the option --lora, and --lora-skip for all of them.

    Raises:
        ValueError: keys to skip and no file; see also `Lora.parse`.
    """
    if skip is not None and not texts:
        raise ValueError("--lora-skip leaves out keys of --lora, and none is given")
    return [Lora.parse(text, skip) for text in texts]


def merging(loras: Sequence[Lora], updates: Mapping[str, LowRank]) -> list[str]:
    """A line for people about files that will be merged; none where there are none."""
    if not loras:
        return []
    files = ", ".join(f"{lora.path.name} x {lora.strength:g}" for lora in loras)
    rank = max(update.down.shape[1] for update in updates.values())
    return [f"merging {files}: {len(updates)} linears, rank up to {rank}"]


def read_loras(loras: Sequence[Lora], model: str, config: Any) -> dict[str, LowRank]:
    """The sum of several files: of updates of one linear the ranks lie side by side.

    Raises:
        As `read_lora`.
    """
    total: dict[str, LowRank] = {}
    for lora in loras:
        for path, (down, up) in read_lora(lora.path, model, config, skip=lora.skip).items():
            update = LowRank(down, lora.strength * up)
            if path in total:
                first = total[path]
                update = LowRank(
                    np.concatenate([first.down, update.down], axis=1),
                    np.concatenate([first.up, update.up]),
                )
            total[path] = update
    return total


@dataclass
class _Update:
    """What a file says of one linear of the source."""

    parts: dict[str, np.ndarray] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_lora(
    path: str | os.PathLike[str], model: str, config: Any, *, skip: str | None = None
) -> dict[str, LowRank]:
    """Read a LoRA file as updates by layer path; a key that is not understood is an error.

    The scale is alpha / rank. Alpha is the linear's own tensor, else what diffusers' metadata say
    (`lora_alpha`, `alpha_pattern`; with `use_rslora` over the root of the rank), else the rank.

    Args:
        path: a .safetensors file.
        model: name of the network in `lowbit_jax.models.registry`.
        config: its config.
        skip: keys to leave out, as a regular expression for all of a key: those of a text encoder
            ("lora_te.*"), say. One that leaves out nothing is an error.

    Raises:
        CheckpointError: keys of no linear of the model, of another kind of update or without their
            counterpart, shapes that do not fit, NaN or inf; all at once.
        ValueError: an unknown model, or `skip` is no regular expression.
    """
    if model not in SOURCES:
        raise ValueError(f"model '{model}' is none of: {', '.join(SOURCES)}")
    with TensorFile(path) as file:
        names = _without(file, skip)
        layout = _best_layout(model, config, names)
        found, problems = _collect(file, names, layout)
        scales = _Scales(file.metadata or {}, problems)
        updates: dict[str, LowRank] = {}
        for leaf, mine in _by_leaf(layout.leaves, found):
            problems += [line for update in mine.values() for line in update.problems]
            if not any(update.problems for update in mine.values()):
                updates[leaf.layer_path] = _fuse(leaf, mine, scales)
        if not (names or problems):
            problems.append("holds no update")
        if problems:
            raise CheckpointError(file.path, problems)
    return updates


@dataclass(frozen=True)
class _Names:
    """A layout for one config: its leaves, and how trainers write the names of their linears."""

    layout: Layout
    leaves: list[Leaf]
    linears: Mapping[str, str]  # as written, without a prefix -> source tensor ("x.weight")

    def of(self, key: str) -> tuple[str, str] | None:
        """(source tensor, part) that a key is of; None where this layout has no such linear."""
        for end, part in PARTS.items():
            if key.endswith(f".{end}"):
                source = self.source(key.removesuffix(f".{end}"))
                return None if source is None else (source, part)
        return None

    def source(self, module: str) -> str | None:
        """The tensor of a module of a trainer's naming."""
        for prefix in UNDERSCORED:
            if module.startswith(prefix):
                return self.linears.get(module.removeprefix(prefix))
        for prefix in DOTTED:
            module = module.removeprefix(prefix)
        return self.linears.get(module)


def _best_layout(model: str, config: Any, names: list[str]) -> _Names:
    """The layout that knows most of the keys; a key that it does not is reported later."""
    abstract = NETWORKS[model].abstract_params(config, jnp.bfloat16)
    shapes = {
        part: {p: x.shape for p, x in leaves.items()} for part, leaves in iter_parts(abstract)
    }
    layouts = []
    for layout in SOURCES[model].layouts:
        leaves = [leaf for leaf in expand(layout, config, shapes) if leaf.is_kernel]
        sources = [source for leaf in leaves for source in leaf.sources]
        linears = {source.removesuffix(".weight"): source for source in sources}
        linears |= {name.replace(".", "_"): source for name, source in linears.items()}
        layouts.append(_Names(layout, leaves, linears))
    return max(layouts, key=lambda layout: sum(layout.of(name) is not None for name in names))


def _without(file: TensorFile, skip: str | None) -> list[str]:
    if skip is None:
        return list(file.names)
    try:
        left = [name for name in file.names if not re.fullmatch(skip, name)]
    except re.error as error:
        raise ValueError(f"skip '{skip}' is not a regular expression: {error}") from None
    if len(left) == len(file.names):
        example = f"; they look like {quote(file.names[0])}" if file.names else ""
        raise CheckpointError(file.path, f"no key is skipped by '{skip}'{example}")
    return left


def _collect(
    file: TensorFile, names: list[str], layout: _Names
) -> tuple[dict[str, _Update], list[str]]:
    """Everything of every linear, by source tensor, and the keys that are of none."""
    found: dict[str, _Update] = {}
    problems = []
    for name in names:
        key = layout.of(name)
        if key is None:
            problems.append(_unknown(name, layout.layout))
            continue
        source, part = key
        update = found.setdefault(source, _Update())
        if part in update.parts:
            update.problems.append(f"tensor {quote(name)}: a second '{part}' of {source}")
        if str(file.info(name).dtype) not in FLOATS:
            update.problems.append(f"tensor {quote(name)} is {file.info(name).dtype}, not a float")
        update.parts[part] = file.read(name).astype(np.float32)
        if not np.isfinite(update.parts[part]).all():
            update.problems.append(f"tensor {quote(name)} holds NaN or inf")
    return found, problems


def _unknown(name: str, layout: Layout) -> str:
    for end, what in FOREIGN.items():
        if name.endswith(f".{end}"):
            return f"tensor {quote(name)} is {what}; only low-rank updates of linears are known"
    if name.startswith(("lora_te", "text_encoder")):
        return f"tensor {quote(name)} is of a text encoder; skip those with 'lora_te.*|text_enc.*'"
    return f"tensor {quote(name)} is of no linear of the model ({layout.name} layout)"


def _by_leaf(
    leaves: list[Leaf], found: Mapping[str, _Update]
) -> Iterator[tuple[Leaf, dict[str, _Update]]]:
    """(leaf, {source: update}) of every leaf that has any; checks each update's shapes."""
    for leaf in leaves:
        mine = {source: found[source] for source in leaf.sources if source in found}
        for source, update in mine.items():
            _check_shapes(source, update, leaf.source_shapes()[source])
        if mine:
            yield leaf, mine


def _check_shapes(source: str, update: _Update, shape: tuple[int, ...]) -> None:
    linear = source.removesuffix(".weight")
    missing = [part for part in ("down", "up") if part not in update.parts]
    if missing:
        update.problems.append(f"{linear}: no '{missing[0]}' matrix")
        return
    down, up = update.parts["down"], update.parts["up"]
    if down.ndim != 2 or up.ndim != 2 or len(shape) != 2:
        update.problems.append(f"{linear}: down {down.shape}, up {up.shape}, weight {shape}")
    elif (up.shape[0], down.shape[1]) != shape or down.shape[0] != up.shape[1]:
        update.problems.append(
            f"{linear}: up {up.shape} times down {down.shape} is no update of a weight {shape}"
        )
    alpha = update.parts.get("alpha")
    if alpha is not None and alpha.size != 1:
        update.problems.append(f"{linear}: alpha has shape {alpha.shape}, not one number")


class _Scales:
    """alpha / rank of every linear; what diffusers' metadata say, or nothing."""

    def __init__(self, metadata: Mapping[str, str], problems: list[str]):
        self.config: dict[str, Any] = {}
        text = metadata.get(METADATA)
        if text is None:
            return
        try:
            packed = json.loads(text)
            items = {k.removeprefix("transformer."): v for k, v in packed.items()}
            self.config = items
            if items.get("use_dora"):
                problems.append(f"metadata '{METADATA}' says DoRA; only plain LoRA is known")
            self.of("", 1, None)
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"metadata '{METADATA}' is not a LoRA config: {error}")
            self.config = {}

    def of(self, linear: str, rank: int, alpha: np.ndarray | None) -> float:
        """What the product up @ down is multiplied with."""
        if alpha is not None:
            return float(alpha.reshape(())) / rank
        patterns = (self.config.get("alpha_pattern") or {}).items()
        # the first that matches, as PEFT reads them
        matching = (value for key, value in patterns if re.fullmatch(rf"(.*\.)?({key})", linear))
        value = next(matching, self.config.get("lora_alpha"))
        if value is None:
            return 1.0
        return float(value) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _fuse(leaf: Leaf, mine: Mapping[str, _Update], scales: _Scales) -> LowRank:
    """One update of a kernel from those of its sources, which lie along its outputs."""
    downs, ups, start = [], [], 0
    for source, size in zip(leaf.sources, leaf.sizes, strict=True):
        if source in mine:
            parts = mine[source].parts
            rank = parts["down"].shape[0]
            scale = scales.of(source.removesuffix(".weight"), rank, parts.get("alpha"))
            up = np.zeros((leaf.shape[0], rank), np.float32)
            up[start : start + size] = scale * parts["up"]
            downs.append(parts["down"])
            ups.append(up)
        start += size
    up = np.concatenate(ups, axis=1)
    return LowRank(np.concatenate(downs).T, (swap_halves(up) if leaf.swap_halves else up).T)
