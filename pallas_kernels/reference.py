"""Plain-jnp form of every op: what a kernel must equal, and the backend where there is none.

Shape letters: m rows (tokens), k contraction, n output channels, g groups along k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

_LAST = (((1,), (1,)), ((), ()))  # contract the last axis of both operands: (m, k) x (n, k)


def matmul_int32(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes, summed exactly in int32, returned as float32."""
    total = jax.lax.dot_general(x, w, _LAST, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32)


def matmul_bf16(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes as a bfloat16 product accumulated in float32.

    Codes up to 256 in size are exact in bfloat16 and every product is exact in float32; the sum is
    exact below 2^24 and rounded to float32 precision above.
    """
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, w, _LAST, preferred_element_type=jnp.float32)


def matmul_codes(x: Int8[Array, "m k"], w: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """`x @ w.T` of integer codes by the platform's fastest pure-XLA form.

    XLA's CPU backend has no VNNI path: its bfloat16 product is faster than its int8 one.
    """
    return jax.lax.platform_dependent(x, w, cpu=matmul_bf16, default=matmul_int32)


def grouped_matmul_codes(
    x: Int8[Array, "m k"], w: Int8[Array, "n k"], scale: Float32[Array, "n g"], group: int
) -> Float32[Array, "m n"]:
    """`sum_g scale[:, g] * (x_g @ w_g.T)` for scales that change every `group` inputs.

    One group's partial product at a time: the (m, g, n) tensor is never formed.
    """
    groups = scale.shape[-1]
    pad = ((0, 0), (0, groups * group - x.shape[-1]))
    x_groups = jnp.pad(x, pad).reshape(x.shape[0], groups, group).swapaxes(0, 1)
    w_groups = jnp.pad(w, pad).reshape(w.shape[0], groups, group).swapaxes(0, 1)

    def add_group(total, part):
        x_g, w_g, scale_g = part
        return total + matmul_codes(x_g, w_g) * scale_g, None

    start = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
    total, _ = jax.lax.scan(add_group, start, (x_groups, w_groups, scale.T))
    return total
