"""One forward that also gives what every linear was given, summed up per channel.

Nothing in a model knows of it: Flax's `intercept_methods` puts a reading beside every `Linear`
while the forward is traced, and `BlockStack` hands readings out of its scan. A forward that is not
observed is the program it always was.

Shape letters: e entries of the forward's batch, l layers of a stack, k channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float32, Int32

from lowbit_jax.models.layers import BlockStack, Linear
from lowbit_jax.quant.stacks import is_stack
from lowbit_jax.sharding.parts import join

NAME = "calibration"  # under which a Linear's readings are sown


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """What one call of a linear was given; of stacked layers with a leading axis l.

    Attributes:
        absmax: largest magnitude.
        total: sum over rows.
        squares: sum of the squares.
        count: rows (tokens) of each entry.
        gram: X^T X over all rows of all entries; None where it was not asked for.
    """

    absmax: Float32[Array, "*l e k"]
    total: Float32[Array, "*l e k"]
    squares: Float32[Array, "*l e k"]
    count: Int32[Array, "*l"]
    gram: Float32[Array, "*l k k"] | None = None


def observe(
    model: nn.Module, params: Any, *, entries: int, grams: str | None = None
) -> tuple[Callable[..., Array], Callable[[], Mapping[str, Any]]]:
    """`apply` and `readings`: call the first with the model's inputs, then the second.

    A reading is of the input of the product: after its `before` (AdaLN, GELU), in float32 from the
    layer's input on, as the kernels that quantise rows compute it. Padding of captions is read as
    any other token: the quantiser is given it too.

    Args:
        model: any whose first axis of every linear's input is the batch, or the batch times
            something, entry by entry.
        params: its parameters, float or quantised.
        entries: e, the batch of the forward.
        grams: regular expression for the whole layer path of linears whose X^T X is wanted. Of a
            stack it is computed for all layers if one of them matches, as they are one program.

    Returns:
        `apply(*inputs) -> outputs`, and `readings() -> tree` like the parameters', a tuple of
        `Reading`s (one for each call) at every linear, under `NAME`.
    """
    found: dict[str, Any] = {}
    stacks: list[tuple[str, int]] = []  # those whose layers are being traced

    def wanted(path: str) -> bool:
        return grams is not None and any(re.fullmatch(grams, p) for p in _layers(stacks, path))

    def interceptor(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Linear | BlockStack):
            return call(*args, **kwargs)
        path = "/".join(module.path)
        if isinstance(module, Linear):
            seen = _input(module, *args, **kwargs)
            module.sow("intermediates", NAME, _read(path, seen, entries, wanted(path)))
            return call(*args, **kwargs)
        stacks.append((path, module.length))
        try:
            return call(*args, **kwargs)
        finally:
            stacks.pop()

    def apply(*inputs: Any, **named: Any) -> Array:
        with nn.intercept_methods(interceptor):
            out, state = model.apply(
                {"params": params}, *inputs, mutable=["intermediates"], **named
            )
        found.clear()
        found.update(state["intermediates"])
        return out

    return apply, lambda: dict(found)


def iter_readings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Reading]]]:
    """(layer path, the readings of its calls) of every linear; layers of stacks one by one."""
    for key in sorted(tree):
        value = tree[key]
        if key == NAME:
            yield prefix.removesuffix("/"), list(value)
        elif is_stack(value):
            for first in sorted(value, key=int):
                yield from _unstacked(value[first], f"{prefix}{key}/", int(first))
        else:
            yield from iter_readings(value, f"{prefix}{key}/")


def _unstacked(segment: Mapping[str, Any], prefix: str, first: int):
    for path, calls in iter_readings(segment):
        for index in range(len(calls[0].count)):
            layer = [jax.tree.map(lambda leaf, i=index: leaf[i], call) for call in calls]
            yield f"{prefix}{first + index}/{path}", layer


def _layers(stacks: list[tuple[str, int]], path: str) -> list[str]:
    """Layer paths of the linear `path` of the blocks of the stacks that are being traced."""
    paths = [path]
    for stack, length in reversed(stacks):
        paths = [f"{stack}/{layer}/{p}" for layer in range(length) for p in paths]
    return paths


def _input(module: Linear, x, *, before=None, **after):
    """What `module` would quantise: all in float32 but for what its dtype did to `x` before."""
    x = join(x).astype(module.dtype).astype(jnp.float32)
    if before is None:
        return x
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), before)(x)


def _read(path: str, x: Array, entries: int, gram: bool) -> Reading:
    if x.shape[0] % entries:
        raise ValueError(
            f"{path}: its input has shape {x.shape}; the first axis is no multiple of the "
            f"{entries} entries of the batch, so that it is unknown which rows are whose"
        )
    rows = x.reshape(entries, -1, x.shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    return Reading(
        absmax=jnp.max(jnp.abs(rows), axis=1),
        total=jnp.sum(rows, axis=1),
        squares=jnp.sum(jnp.square(rows), axis=1),
        count=jnp.int32(rows.shape[1]),
        gram=jnp.dot(flat.T, flat, precision="highest") if gram else None,
    )
