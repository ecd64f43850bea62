"""Parameters in two: what is trained and what is not, each a flat dict by name.

A name is a leaf's path, "double_blocks/0/img_attn/qkv/kernel/weight". Gradients and an optimiser's
state exist for the first dict only.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

# Of quantised linears: how far their scales have moved, or the scales themselves; biases and norms
# beside them, that stay in floating point anyhow. `SCALES` never matches a latent weight.
SCALES = r"[a-z_]*blocks/.*(/kernel/(growth|scale)|/bias|_norm/scale)"
CODES = r"[a-z_]*blocks/.*(/kernel/(growth|weight)|/bias|_norm/scale)"

Leaves = dict[str, Any]


class Split(NamedTuple):
    """A tree taken apart.

    Attributes:
        structure: of the tree.
        names: of its leaves, in order.
        trained: leaves whose name matched.
        frozen: the others.
    """

    structure: Any
    names: tuple[str, ...]
    trained: Leaves
    frozen: Leaves

    def join(self, trained: Leaves, frozen: Leaves) -> Any:
        """The tree of these leaves; the dicts may hold tracers."""
        return join(self.structure, self.names, trained, frozen)


def join(structure: Any, names: tuple[str, ...], trained: Leaves, frozen: Leaves) -> Any:
    """See `Split.join`."""
    return structure.unflatten(
        [trained[name] if name in trained else frozen[name] for name in names]
    )


def split(tree: Any, trained: str) -> Split:
    """Take a tree apart.

    Args:
        tree: any.
        trained: regular expression for the whole name of the leaves that are trained.

    Raises:
        ValueError: one that matches none.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
    chosen = {name: x for name, x in leaves.items() if re.fullmatch(trained, name)}
    if not chosen:
        raise ValueError(f"nothing matches {trained!r}; leaves are named like {list(leaves)[-1]!r}")
    rest = {name: x for name, x in leaves.items() if name not in chosen}
    return Split(structure, tuple(leaves), chosen, rest)
