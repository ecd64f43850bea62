"""Folding masks into what comes before: one factor less online, exactly.

* Into AdaLN: m ((1 + scale) x + shift) = (1 + scale') x + shift' with shift' = m shift and
  scale' = m (1 + scale) - 1, which the linear that makes shift and scale gives with its columns
  times m, its bias of the shift times m, and its bias of the scale as m (1 + bias) - 1.
* Into values: attention mixes tokens and not channels, so the mask of the projection after it is
  one of the values, that is of columns of the linear that makes them and of its bias.

What cannot be: a mask after a GELU (fc2); where one linear makes the modulation of all blocks
(PixArt, STDiT, STDiT3, Latte-1: a mask is a block's own); FLUX's attention (two streams whose
values are mixed, with a mask each); values that are normalised after (PixArt's compression). A
rotation stays online: it does not pass a modulation that depends on the time.

Worth little where kernels do the rest: a mask is k floats that a program reads once for its rows,
in a pass that is there anyway. So it is a transform of its own, and no recipe does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.quant.lora import LoraKernel
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel
from lowbit_jax.quant.ranged import RangedKernel
from lowbit_jax.quant.stacks import Tree

# (linear that makes them, linear after AdaLN): which of its parts is the shift, which the scale, of
MODULATED = {
    ("adaLN_modulation", "attn/qkv"): (0, 1, 6),
    ("adaLN_modulation", "mlp/fc1"): (3, 4, 6),
    ("img_mod/lin", "img_attn/qkv"): (0, 1, 6),
    ("img_mod/lin", "img_mlp/in_layer"): (3, 4, 6),
    ("txt_mod/lin", "txt_attn/qkv"): (0, 1, 6),
    ("txt_mod/lin", "txt_mlp/in_layer"): (3, 4, 6),
    ("modulation/lin", "linear1"): (0, 1, 3),
}
# (linear that makes them, projection after attention): which of its parts are the values, of
VALUES = {
    ("attn/qkv", "attn/proj"): (2, 3),
    ("attn_temp/qkv", "attn_temp/proj"): (2, 3),
    ("cross_attn/kv_linear", "cross_attn/proj"): (1, 2),
}


def fold(params: Tree) -> dict[str, Any]:
    """Every mask that the linear before can take, moved there; the other masks stay online.

    After `balance` and `rotate`, and before `quantize` by a recipe that does neither: statistics
    are of the inputs as they were.

    Args:
        params: parameter tree of any model here. A linear that is quantised takes no mask.
    """
    out = {key: fold(node) if isinstance(node, Mapping) else node for key, node in params.items()}
    for (before, after), (shift, scale, parts) in MODULATED.items():
        _move(out, before, after, {shift: 0.0, scale: 1.0}, parts)
    for (before, after), (values, parts) in VALUES.items():
        if "sr" not in out.get("attn", {}):
            _move(out, before, after, {values: 0.0}, parts)
    return out


def _move(block: dict[str, Any], before: str, after: str, offsets: dict[int, float], parts: int):
    """Move the mask of `after` into parts of `before`, in place.

    A part p with an offset o becomes m (o + p) - o.
    """
    source, target = _find(block, before), _find(block, after)
    if source is None or target is None:
        return
    masked = target["kernel"]
    if not isinstance(masked, TransformedKernel) or masked.mask is None:
        return
    kernel = source["kernel"]
    base = kernel.kernel if isinstance(kernel, TransformedKernel) else kernel
    if isinstance(base, QTensor | RangedKernel | LoraKernel) or "bias" not in source:
        return
    mask = masked.mask
    width = mask.shape[-1]
    if base.shape[-1] != parts * width:
        return
    ones = jnp.ones((*mask.shape[:-1], parts * width), jnp.float32)
    factor, offset = ones, 0 * ones
    for part, value in offsets.items():
        here = slice(part * width, (part + 1) * width)
        factor = factor.at[..., here].set(mask)
        offset = offset.at[..., here].set(value)
    changed = (base * factor[..., None, :]).astype(base.dtype)
    if isinstance(kernel, TransformedKernel):
        changed = TransformedKernel(changed, kernel.mask, kernel.rotation)
    bias = factor * (offset + source["bias"]) - offset
    _put(block, before, source | {"kernel": changed, "bias": bias.astype(source["bias"].dtype)})
    rest: Any = masked.kernel
    if masked.rotation is not None:
        rest = TransformedKernel(masked.kernel, None, masked.rotation)
    _put(block, after, target | {"kernel": rest})


def _find(block: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    node: Any = block
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node if isinstance(node, Mapping) and "kernel" in node else None  # type: ignore[return-value]


def _put(block: dict[str, Any], path: str, value: Mapping[str, Array]) -> None:
    *parents, last = path.split("/")
    for key in parents:
        block[key] = dict(block[key])
        block = block[key]
    block[last] = dict(value)
