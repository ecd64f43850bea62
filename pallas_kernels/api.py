"""The ops, each on the backend that `implementation` asks for; see `dispatch` for the choice."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from pallas_kernels import matmul as matmul_kernel
from pallas_kernels import quantize_rows as rows_kernel
from pallas_kernels import reference, reference_rows, tiles
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.operands import prepare
from pallas_kernels.rows import QuantizedRows


def quantize_rows(
    x: Float[Array, "... k"],
    bits: int = 8,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
    *,
    implementation: Implementation | None = None,
) -> QuantizedRows:
    """Symmetric dynamic quantisation, one scale per row; see `reference_rows.quantize_rows`.

    Args:
        x: floating [..., k]; the kernel takes bfloat16 and float32.
        bits: 2 to 8.
        mask: float32[k], multiplies the channels.
        rotation: 64, 128 or 256: the block size of a Hadamard rotation after the mask.
        implementation: which backend; None chooses.

    Raises:
        ValueError: see `reference_rows.check_rows`; an unknown implementation.
        NotImplementedError: the backend cannot: not on this platform, an empty array, this dtype,
            2^31 values or more.
    """
    return _rows("quantize_rows", x, bits, mask, rotation, implementation)


def gelu_quantize_rows(
    x: Float[Array, "... k"],
    bits: int = 8,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
    *,
    implementation: Implementation | None = None,
) -> QuantizedRows:
    """`quantize_rows(gelu(x))` in one op; see `reference_rows.gelu_quantize_rows`.

    Arguments and errors are those of `quantize_rows`.
    """
    return _rows("gelu_quantize_rows", x, bits, mask, rotation, implementation)


def modulate_quantize_rows(
    x: Float[Array, "b t k"],
    shift: Float[Array, "b k"],
    scale: Float[Array, "b k"],
    bits: int = 8,
    *,
    eps: float = 1e-6,
    mask: Float32[Array, "k"] | None = None,
    rotation: int | None = None,
    implementation: Implementation | None = None,
) -> QuantizedRows:
    """AdaLN and `quantize_rows` in one op; see `reference_rows.modulate_quantize_rows`.

    Args:
        x: floating [b, t, k]; the kernel takes bfloat16 and float32.
        shift: floating [b, k], likewise.
        scale: floating [b, k], likewise.
        bits: 2 to 8.
        eps: added to the variance.
        mask: float32[k], multiplies the channels after AdaLN.
        rotation: 64, 128 or 256: the block size of a Hadamard rotation after the mask.
        implementation: which backend; None chooses.

    Raises:
        ValueError: see `reference_rows.check_modulate`; and as for `quantize_rows`.
        NotImplementedError: as for `quantize_rows`.
    """
    reference_rows.check_modulate(x, shift, scale)
    reference_rows.check_rows(x, bits, mask, rotation)

    def plain(x, shift, scale, mask):
        return reference_rows.modulate_quantize_rows(
            x, shift, scale, bits, eps=eps, mask=mask, rotation=rotation
        )

    def kernel(x, shift, scale, mask, interpret):
        _refuse_dtypes(x, shift, scale)
        return rows_kernel.modulate_quantize_rows(
            x, shift, scale, bits, eps=eps, mask=mask, rotation=rotation, interpret=interpret
        )

    return dispatch(kernel, plain, implementation, x, shift, scale, mask)


def quantize_split_rows(
    x: Float[Array, "... k/d"],
    bits: int,
    axis_name: str,
    mask: Float32[Array, "k/d"] | None = None,
    rotation: int | None = None,
) -> QuantizedRows:
    """`quantize_rows` of rows split over devices; see `reference_rows.quantize_split_rows`.

    On every platform in plain XLA: a kernel's one pass cannot wait for the other devices.
    """
    return reference_rows.quantize_split_rows(x, bits, axis_name, mask, rotation)


def _rows(op, x, bits, mask, rotation, implementation) -> QuantizedRows:
    reference_rows.check_rows(x, bits, mask, rotation)

    def plain(x, mask):
        return getattr(reference_rows, op)(x, bits, mask, rotation)

    def kernel(x, mask, interpret):
        _refuse_dtypes(x)
        tiles.refuse_empty(x)
        rows = x.reshape(-1, x.shape[-1])
        found = getattr(rows_kernel, op)(rows, bits, mask, rotation, interpret=interpret)
        return QuantizedRows(*(part.reshape(*x.shape[:-1], part.shape[-1]) for part in found))

    return dispatch(kernel, plain, implementation, x, mask)


def _refuse_dtypes(*arrays: jax.Array) -> None:
    for array in arrays:
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"the kernel takes bfloat16 and float32, not {array.dtype}")


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
        functools.partial(matmul_kernel.matmul, out_dtype=out_dtype),
        functools.partial(reference.matmul, out_dtype=out_dtype),
        implementation,
        operands,
    )


int8_matmul = functools.partial(matmul, format="int8")
int6_matmul = functools.partial(matmul, format="int6")
int4_matmul = functools.partial(matmul, format="int4")
ternary_matmul = functools.partial(matmul, format="ternary")
