"""Tables from source tensor names to our parameter paths, and what they expand to for one model.

One `Row` per linear or norm scale. A row's sources are concatenated along the output axis (fused
matrices); the same rows, read backwards, split a tree into source tensors for the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote

FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where one linear (weight and bias) or one vector comes from; `{i}` stands for the layer.

    Attributes:
        target: our path, without "kernel"/"bias" for a linear.
        sources: source names, without ".weight"/".bias" for a linear; concatenated in this order.
        sizes: output rows of each source, from the config; None when there is one source.
        swap_halves: the two halves along the output axis trade places (weight and bias).
        vector: the row is a single tensor with its full name, not a linear.
    """

    target: str
    sources: tuple[str, ...]
    sizes: Callable[[Any], Sequence[int]] | None = None
    swap_halves: bool = False
    vector: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One naming of a model's tensors.

    Attributes:
        name: what messages call it.
        marker: a tensor that only this layout has.
        rows: the table.
        stacks: our stack -> the config field with its number of layers.
        skip_row: rows absent under a config (a schnell checkpoint has no guidance embedder).
    """

    name: str
    marker: str
    rows: tuple[Row, ...]
    stacks: Mapping[str, str]
    skip_row: Callable[[Row, Any], bool] = lambda row, config: False


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter and the source tensors it is made of.

    Attributes:
        part: "outer" or "stack/layer", as in `lowbit_jax.checkpoint`.
        path: path inside the part.
        sources: source tensor names, in order along the output axis.
        sizes: output rows of each source.
        shape: shape in the source's orientation: (n, k) for a kernel, (n,) otherwise.
        swap_halves: see `Row`.
    """

    part: str
    path: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    swap_halves: bool

    @property
    def is_kernel(self) -> bool:
        """Whether this is the matrix of a linear."""
        return self.path.rsplit("/", 1)[-1] == "kernel"

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """Expected shape of every source tensor."""
        return {
            name: (size, *self.shape[1:])
            for name, size in zip(self.sources, self.sizes, strict=True)
        }


def expand(layout: Layout, config: Any, shapes: Mapping[str, Mapping[str, tuple]]) -> list[Leaf]:
    """All leaves of a model, part by part.

    Args:
        layout: the naming to use.
        config: the model's config.
        shapes: {part: {path: shape of the Flax parameter}}, see `part_shapes`.
    """
    leaves: list[Leaf] = []
    for part, paths in shapes.items():
        stack, _, layer = part.partition("/")
        prefix = f"{stack}/{{i}}/" if layer else ""
        for row in layout.rows:
            if row.target.startswith(prefix) and bool(layer) == ("{i}" in row.target):
                if not layout.skip_row(row, config):
                    leaves += _row_leaves(
                        row, row.target.removeprefix(prefix), part, layer, config, paths
                    )
        covered = {leaf.path for leaf in leaves if leaf.part == part}
        if covered != set(paths):
            missing = sorted(set(paths) ^ covered)
            raise AssertionError(f"table '{layout.name}' and model disagree on {part}: {missing}")
    return leaves


def _row_leaves(
    row: Row, target: str, part: str, layer: str, config: Any, paths: Mapping
) -> Iterator[Leaf]:
    sources = tuple(source.format(i=layer) for source in row.sources)
    kinds = [("", "")] if row.vector else [("/kernel", ".weight"), ("/bias", ".bias")]
    for suffix, source_suffix in kinds:
        shape = paths[target + suffix]
        shape = shape[::-1]  # Flax (k, n) to (n, k); vectors are their own reverse
        sizes = tuple(row.sizes(config)) if row.sizes else (shape[0],)
        yield Leaf(
            part=part,
            path=target + suffix,
            sources=tuple(source + source_suffix for source in sources),
            sizes=sizes,
            shape=shape,
            swap_halves=row.swap_halves,
        )


def check(checkpoint: Checkpoint, leaves: Sequence[Leaf], what: str) -> None:
    """Compare names, shapes and dtypes with what a model needs.

    Raises:
        CheckpointError: every unknown, missing and mis-shaped tensor and foreign dtype, at once.
    """
    expected = {name: shape for leaf in leaves for name, shape in leaf.source_shapes().items()}
    names = set(checkpoint.names)
    problems = [
        f"missing tensor '{n}' {s} of {what}" for n, s in sorted(expected.items()) if n not in names
    ]
    problems += [
        f"unknown tensor {quote(name)}, not part of {what}"
        for name in sorted(names - set(expected))
    ]
    for name in sorted(names & set(expected)):
        info = checkpoint.info(name)
        if tuple(info.shape) != expected[name]:
            problems.append(
                f"tensor '{name}' has shape {tuple(info.shape)}, {what} needs {expected[name]}"
            )
        if str(info.dtype) not in FLOATS:
            problems.append(
                f"tensor '{name}' is {info.dtype}, not one of {', '.join(FLOATS)}; "
                "give the unquantised checkpoint"
            )
    if problems:
        raise CheckpointError(checkpoint.source, problems)


def read_leaf(checkpoint: Checkpoint, leaf: Leaf) -> np.ndarray:
    """A leaf in the source's orientation and dtype; a view of the file where nothing moves."""
    pieces = [checkpoint.read(name) for name in leaf.sources]
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)
    return swap_halves(array) if leaf.swap_halves else array


def release_leaf(checkpoint: Checkpoint, leaf: Leaf) -> None:
    """Let go of the file pages a leaf was read from."""
    for name in leaf.sources:
        checkpoint.release(name)


def split_leaf(leaf: Leaf, array: np.ndarray) -> dict[str, np.ndarray]:
    """Inverse of `read_leaf`: source tensors of a leaf given in the source's orientation."""
    if leaf.swap_halves:
        array = swap_halves(array)
    stops = np.cumsum(leaf.sizes)[:-1]
    return dict(zip(leaf.sources, np.split(array, stops, axis=0), strict=True))


def swap_halves(array: np.ndarray) -> np.ndarray:
    """Exchange the two halves of axis 0."""
    half = array.shape[0] // 2
    return np.concatenate([array[half:], array[:half]], axis=0)
