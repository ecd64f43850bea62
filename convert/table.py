"""Tables from source tensor names to our parameter paths, and what they expand to for one model.

One `Row` per linear, table or norm scale. A row's sources are concatenated along the output axis
(fused matrices); the same rows, read backwards, split a tree into source tensors for the way back.
A `Constant` is a tensor of the source that is no parameter here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint_files import Checkpoint
from convert.errors import CheckpointError
from convert.safetensors_header import quote

FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where one linear (weight and bias) or one vector comes from; `{i}` stands for the layer.

    Where a source numbers pairs of blocks through, `{even}` and `{odd}` are the blocks of layer i.

    Attributes:
        target: our path, without "kernel"/"bias" for a linear.
        sources: source names, without ".weight"/".bias" for a linear; concatenated in this order.
        sizes: output rows of each source, from the config; None when there is one source.
        swap_halves: the two halves along the output axis trade places (weight and bias).
        vector: the row is a single tensor with its full name, not a linear.
        kernel_tail: shape of one output row of the source's weight where it is not flat: a
            convolution over patches that is our linear.
        repeated: a stack; the source is stored once in each of its layers (`{i}`), all equal. One
            is kept, see `check_copies`; the way back writes all of them.
        optional: some configs have no such parameter, or not in every layer (FLUX.1-schnell has no
            guidance embedder); the row is then left out.
        bias: whether the linear has one.
        aliases: other names that publishers give the only source. Where a checkpoint has several,
            they must be equal; the way back writes the source.
    """

    target: str
    sources: tuple[str, ...]
    sizes: Callable[[Any], Sequence[int]] | None = None
    swap_halves: bool = False
    vector: bool = False
    kernel_tail: Callable[[Any], tuple[int, ...]] | None = None
    repeated: str | None = None
    optional: bool = False
    bias: bool = True
    aliases: tuple[str, ...] = ()

    def parameters(self) -> dict[str, str]:
        """Suffixes of the target's parameters, with those of the sources."""
        if self.vector:
            return {"": ""}
        return {"/kernel": ".weight"} | ({"/bias": ".bias"} if self.bias else {})


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A tensor of the source that our model computes: compared, not kept; an export writes it.

    Attributes:
        source: its name.
        value: the numbers it must have, in its shape, from the config; none larger than 1, or
            integers.
        optional: some publishers leave it out of their files.
    """

    source: str
    value: Callable[[Any], Any]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One naming of a model's tensors.

    Attributes:
        name: what messages call it.
        marker: a tensor that only this layout has.
        rows: the table.
        stacks: our stack -> the config field with its number of layers.
        constants: what the source stores and our model computes, as fixed position tables.
        without: a tensor that another network's layout has besides the marker.
        more: further rows, from the config: of networks whose blocks are all different.
    """

    name: str
    marker: str
    rows: tuple[Row, ...]
    stacks: Mapping[str, str]
    constants: tuple[Constant, ...] = ()
    without: str | None = None
    more: Callable[[Any], tuple[Row, ...]] = lambda config: ()

    def matches(self, names: Collection[str]) -> bool:
        """Whether tensors of these names look like this layout."""
        return self.marker in names and self.without not in names


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
        tail: shape of one output row in the source.
        copies: further tensors of the source, equal to its only one.
    """

    part: str
    path: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    swap_halves: bool
    tail: tuple[int, ...]
    copies: tuple[str, ...] = ()

    @property
    def is_kernel(self) -> bool:
        """Whether this is the matrix of a linear."""
        return self.path.rsplit("/", 1)[-1] == "kernel"

    @property
    def layer_path(self) -> str:
        """Of the linear this belongs to, such as "double_blocks/3/img_attn/qkv"."""
        linear = self.path.rsplit("/", 1)[0]
        return f"{self.part}/{linear}" if "/" in self.part else linear

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """Expected shape of every source tensor, copies too."""
        shapes = {
            name: (size, *self.tail) for name, size in zip(self.sources, self.sizes, strict=True)
        }
        return shapes | dict.fromkeys(self.copies, (self.sizes[0], *self.tail))


def expand(
    layout: Layout,
    config: Any,
    shapes: Mapping[str, Mapping[str, tuple]],
    names: Collection[str] = (),
) -> list[Leaf]:
    """All leaves of a model, part by part.

    Args:
        layout: the naming to use.
        config: the model's config.
        shapes: {part: {path: shape of the Flax parameter}}, see `part_shapes`.
        names: tensors of the checkpoint, which tell which of a row's aliases it has.
    """
    rows = (*layout.rows, *layout.more(config))
    leaves: list[Leaf] = []
    for part, paths in shapes.items():
        stack, _, layer = part.partition("/")
        prefix = f"{stack}/{{i}}/" if layer else ""
        for row in rows:
            if row.target.startswith(prefix) and bool(layer) == ("{i}" in row.target):
                target = row.target.removeprefix(prefix)
                if row.optional and not any(target + end in paths for end in row.parameters()):
                    continue
                repeats = getattr(config, layout.stacks[row.repeated]) if row.repeated else 1
                leaves += _row_leaves(row, target, part, layer, repeats, config, paths, names)
        covered = {leaf.path for leaf in leaves if leaf.part == part}
        if covered != set(paths):
            missing = sorted(set(paths) ^ covered)
            raise AssertionError(f"table '{layout.name}' and model disagree on {part}: {missing}")
    return leaves


def _numbered(name: str, layer: int) -> str:
    return name.format(i=layer, even=2 * layer, odd=2 * layer + 1)


def _row_leaves(
    row: Row,
    target: str,
    part: str,
    layer: str,
    repeats: int,
    config: Any,
    paths: Mapping[str, tuple],
    present: Collection[str],
) -> Iterator[Leaf]:
    for suffix, source_suffix in row.parameters().items():
        shape = paths[target + suffix]
        tail = shape[1:]
        if suffix == "/kernel":
            shape = shape[::-1]  # Flax (k, n) to (n, k)
            tail = row.kernel_tail(config) if row.kernel_tail else shape[1:]
        sizes = tuple(row.sizes(config)) if row.sizes else (shape[0],)
        names = [source + source_suffix for source in row.sources]
        sources = [_numbered(name, int(layer or 0)) for name in names]
        copies = [_numbered(name, i) for i in range(1, repeats) for name in names]
        if row.aliases:
            called = [
                *sources,
                *(_numbered(a + source_suffix, int(layer or 0)) for a in row.aliases),
            ]
            sources, copies = _told_apart(called, present)
        yield Leaf(
            part=part,
            path=target + suffix,
            sources=tuple(sources),
            sizes=sizes,
            shape=shape,
            swap_halves=row.swap_halves,
            tail=tail,
            copies=tuple(copies),
        )


def _told_apart(called: list[str], present: Collection[str]) -> tuple[list[str], list[str]]:
    """Of the names of one tensor, the first that is present (else the first) and the others."""
    found = [name for name in called if name in present] or called[:1]
    return found[:1], found[1:]


def check(
    checkpoint: Checkpoint,
    leaves: Sequence[Leaf],
    what: str,
    constants: Mapping[Constant, np.ndarray],
) -> None:
    """Compare names, shapes and dtypes with what a model needs.

    Raises:
        CheckpointError: every unknown, missing and mis-shaped tensor and foreign dtype, at once.
    """
    expected = {name: shape for leaf in leaves for name, shape in leaf.source_shapes().items()}
    names = set(checkpoint.names)
    expected |= {
        constant.source: value.shape
        for constant, value in constants.items()
        if constant.source in names or not constant.optional
    }
    integers = {constant.source for constant, value in constants.items() if value.dtype.kind == "i"}
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
        if str(info.dtype) not in FLOATS and name not in integers:
            problems.append(
                f"tensor '{name}' is {info.dtype}, not one of {', '.join(FLOATS)}; "
                "give the unquantised checkpoint"
            )
    if problems:
        raise CheckpointError(checkpoint.source, problems)


def check_copies(checkpoint: Checkpoint, leaves: Sequence[Leaf]) -> None:
    """Compare, byte by byte, the tensors that a source stores more than once.

    Raises:
        CheckpointError: every copy that differs from the first, at once.
    """
    problems = []
    for leaf in leaves:
        if leaf.copies:
            first = _bytes(checkpoint, leaf.sources[0])
            for name in leaf.copies:
                if not np.array_equal(first, _bytes(checkpoint, name)):
                    problems.append(
                        f"tensor '{name}' differs from '{leaf.sources[0]}'; "
                        f"the model has one '{leaf.path}' for all layers"
                    )
                checkpoint.release(name)
    if problems:
        raise CheckpointError(checkpoint.source, problems)


def check_constants(checkpoint: Checkpoint, constants: Mapping[Constant, np.ndarray]) -> None:
    """Compare the tensors that our model computes, to 1e-6 or half a step of their own dtype;
    integers exactly.

    Raises:
        CheckpointError: every one that differs, or holds NaN, at once.
    """
    problems = []
    for constant, value in constants.items():
        name = constant.source
        if name in checkpoint.names:
            stored = checkpoint.read(name)
            exact = stored.dtype.kind in "iu"
            bound = 0.0 if exact else max(1e-6, float(ml_dtypes.finfo(stored.dtype).eps) / 2)
            error = np.abs(stored.astype(np.float64) - value).max(initial=0)
            if not error <= bound:  # NaN too
                problems.append(
                    f"tensor '{name}' differs by {error:.3g} from what the model computes in its "
                    f"place, by more than {bound:.3g}: another model, or a trained table"
                )
            checkpoint.release(name)
    if problems:
        raise CheckpointError(checkpoint.source, problems)


def _bytes(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return np.ascontiguousarray(checkpoint.read(name)).reshape(-1).view(np.uint8)


def read_leaf(checkpoint: Checkpoint, leaf: Leaf) -> np.ndarray:
    """A leaf in the source's orientation and dtype; a view of the file where nothing moves."""
    pieces = [checkpoint.read(name).reshape(-1, *leaf.shape[1:]) for name in leaf.sources]
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)
    return swap_halves(array) if leaf.swap_halves else array


def release_leaf(checkpoint: Checkpoint, leaf: Leaf) -> None:
    """Let go of the file pages a leaf was read from."""
    for name in leaf.sources:
        checkpoint.release(name)


def split_leaf(leaf: Leaf, array: np.ndarray) -> dict[str, np.ndarray]:
    """Inverse of `read_leaf`: source tensors (and copies) of a leaf in the source's orientation."""
    if leaf.swap_halves:
        array = swap_halves(array)
    pieces = np.split(array, np.cumsum(leaf.sizes)[:-1], axis=0)
    pieces = [piece.reshape(-1, *leaf.tail) for piece in pieces]
    return dict(zip(leaf.sources, pieces, strict=True)) | dict.fromkeys(leaf.copies, pieces[0])


def swap_halves(array: np.ndarray) -> np.ndarray:
    """Exchange the two halves of axis 0."""
    half = array.shape[0] // 2
    return np.concatenate([array[half:], array[:half]], axis=0)
