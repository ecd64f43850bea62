"""Scanning the layers of a stack without a float32 copy of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def scan_layers(step: Callable[[Any, Any], tuple], carry: Any, stack: Any) -> tuple[Any, Any]:
    """The carry after `step(carry, layer)` for every layer of `stack`, and what each gave beside.

    What `jax.lax.scan` gives, but bfloat16 leaves travel through the loop in its carry. XLA:CPU has
    no bfloat16 slice: it converts the stack to float32 to take one of that, and moves what does not
    change out of the loop. A model would need three times its memory, and reading the copy would
    take longer than multiplying a few tokens. Behind a barrier, nothing is known not to change.

    Args:
        step: (carry, layer) -> (carry, what is stacked along a layer axis).
        carry: what the first layer takes.
        stack: any tree of arrays with a leading layer axis.
    """
    leaves, tree = jax.tree.flatten(stack)
    narrow = [i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.bfloat16]
    if not narrow:
        return jax.lax.scan(step, carry, stack)

    def read_and_step(state, layer):
        carry, stacks = state
        index, leaves = layer
        leaves = list(leaves)
        for i, whole in zip(narrow, stacks, strict=True):
            found = jax.lax.dynamic_index_in_dim(whole, index, keepdims=False)
            leaves[i] = _read(found, leaves[i])
        carry, out = step(carry, jax.tree.unflatten(tree, leaves))
        return jax.lax.optimization_barrier((carry, stacks)), out

    stacks = [jax.lax.stop_gradient(leaves[i]) for i in narrow]
    indices = np.arange(leaves[0].shape[0], dtype=np.int32)
    (carry, _), out = jax.lax.scan(read_and_step, (carry, stacks), (indices, leaves))
    return carry, out


@jax.custom_jvp
def _read(found, leaf):
    """What was found in a constant stack; the derivative is that of `leaf`, unused otherwise."""
    del leaf
    return found


@_read.defjvp
def _read_jvp(primals, tangents):
    return _read(*primals), tangents[1]
