"""The ops, each on the backend that `implementation` asks for; see `dispatch` for the choice."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from pallas_kernels import matmul as kernels
from pallas_kernels import reference
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.operands import prepare
from pallas_kernels.rows import QuantizedRows


def matmul(
    x: QuantizedRows | Float[Array, "m k"],
    w: Int8[Array, "n k"] | UInt8[Array, "n p"],
    scale: Float32[Array, "n g"],
    zero: Int8[Array, "n g"] | None = None,
    *,
    format: str,
    group: int | None = None,
    bias: Float[Array, "n"] | None = None,
    gate: Float[Array, "b n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    out_dtype=jnp.float32,
    implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
    """`residual + gate * (x @ (scale * (codes(w) - zero)).T + bias)`.

    Integer activations are summed exactly in int32 (under "xla" on CPU exact below 2^24 only,
    `reference.matmul_codes`); everything after the sum is float32.

    Args:
        x: quantised rows (int8 codes, scales, sums), or floating [m, k] for weight-only formats.
        w: stored codes: int8[n, k], or uint8[n, p] as `formats.pack_codes` packs them.
        scale: float32[n, g], one per group of `group` inputs; [n, 1] or [1, 1] where all share one.
        zero: int8 zero points shaped like scale, in the numbers of the signed codes; None for 0.
        format: key of `formats.FORMATS`.
        group: inputs that share a scale; None, or k, where all do.
        bias: [n].
        gate: [b, n]; row i of x takes entry i // (m / b).
        residual: [m, n].
        out_dtype: float32 or bfloat16.
        implementation: which backend; None chooses.

    Raises:
        ValueError: a wrong dtype, shape or group, an unknown implementation.
        NotImplementedError: the backend cannot; never with implementation None.
    """
    operands = prepare(
        x,
        w,
        scale,
        zero,
        format=format,
        group=group,
        bias=bias,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
    )
    return dispatch(
        functools.partial(kernels.matmul, out_dtype=out_dtype),
        functools.partial(reference.matmul, out_dtype=out_dtype),
        implementation,
        operands,
    )


int8_matmul = functools.partial(matmul, format="int8")
int6_matmul = functools.partial(matmul, format="int6")
int4_matmul = functools.partial(matmul, format="int4")
ternary_matmul = functools.partial(matmul, format="ternary")
