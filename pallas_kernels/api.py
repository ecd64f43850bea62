"""Chooses a backend for each op: `implementation=None | "triton" | "xla" | "interpret"`.

* ``"xla"``: the plain-jnp form of `reference` and `reference_rows`, on every platform.
* ``"triton"``: the Pallas-Triton kernel, on CUDA only. No kernel has run on a GPU yet.
* ``"interpret"``: the kernel's body as plain JAX, for tests.
* ``None``: "xla", on every platform, for as long as no kernel has been checked on a GPU.

"This backend cannot do that" is `NotImplementedError`; "the caller is wrong" is `ValueError`.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from pallas_kernels import int8_matmul as int8_kernel
from pallas_kernels import packing, reference, reference_rows
from pallas_kernels import quantize_rows as rows_kernel
from pallas_kernels import ternary_matmul as ternary_kernel
from pallas_kernels.rows import QuantizedRows

Implementation = Literal["triton", "xla", "interpret"]
IMPLEMENTATIONS = ("triton", "xla", "interpret")


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
    backend = _backend(implementation)
    reference_rows.check_modulate(x, shift, scale)
    reference_rows.check_rows(x, bits, mask, rotation)
    if backend == "xla":
        op = reference_rows.modulate_quantize_rows
    else:
        _refuse_dtypes(x, shift, scale)
        op = functools.partial(rows_kernel.modulate_quantize_rows, interpret=backend == "interpret")
    return op(x, shift, scale, bits, eps=eps, mask=mask, rotation=rotation)


def _rows(op, x, bits, mask, rotation, implementation) -> QuantizedRows:
    backend = _backend(implementation)
    reference_rows.check_rows(x, bits, mask, rotation)
    if backend == "xla":
        return getattr(reference_rows, op)(x, bits, mask, rotation)
    _refuse_dtypes(x)
    rows = x.reshape(x.size // x.shape[-1] if x.size else 0, x.shape[-1])
    found = getattr(rows_kernel, op)(rows, bits, mask, rotation, interpret=backend == "interpret")
    return QuantizedRows(*(part.reshape(*x.shape[:-1], part.shape[-1]) for part in found))


def _refuse_dtypes(*arrays: jax.Array) -> None:
    for array in arrays:
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"the kernel takes bfloat16 and float32, not {array.dtype}")


def int8_matmul(
    x: Int8[Array, "m k"],
    w: Int8[Array, "n k"],
    x_scale: Float32[Array, "m 1"],
    w_scale: Float32[Array, "n"],
    bias: Float[Array, "n"] | None = None,
    *,
    out_dtype=jnp.float32,
    implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
    """`(x @ w.T) * x_scale * w_scale + bias`; see `int8_matmul.int8_matmul` for the arguments.

    The sum is exact in int32, but on CPU under "xla", where it is exact below 2^24 only
    (`reference.matmul_codes`).

    Raises:
        ValueError: a wrong dtype or shape, an unknown implementation.
        NotImplementedError: the backend cannot: not on this platform, an empty operand.
    """
    backend = _backend(implementation)
    if backend != "xla":
        return int8_kernel.int8_matmul(
            x, w, x_scale, w_scale, bias, out_dtype=out_dtype, interpret=backend == "interpret"
        )
    int8_kernel.check_int8_matmul(x, w, x_scale, w_scale, bias, out_dtype)
    return _scaled(reference.matmul_codes(x, w), x_scale, w_scale, bias, out_dtype)


def ternary_matmul(
    x: Int8[Array, "m k"],
    w: UInt8[Array, "n p"],
    x_scale: Float32[Array, "m 1"],
    w_scale: Float32[Array, "n"],
    bias: Float[Array, "n"] | None = None,
    *,
    out_dtype=jnp.float32,
    implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
    """`(x @ (codes(w) - 1).T) * x_scale * w_scale + bias`; see `ternary_matmul.ternary_matmul`.

    Exact as `int8_matmul` is.

    Raises:
        ValueError: a wrong dtype or shape, an unknown implementation.
        NotImplementedError: the backend cannot: not on this platform, an empty operand.
    """
    backend = _backend(implementation)
    if backend != "xla":
        return ternary_kernel.ternary_matmul(
            x, w, x_scale, w_scale, bias, out_dtype=out_dtype, interpret=backend == "interpret"
        )
    ternary_kernel.check_ternary_matmul(x, w, x_scale, w_scale, bias, out_dtype)
    codes = packing.unpack(w, 2, x.shape[1]).astype(jnp.int8) - jnp.int8(1)
    return _scaled(reference.matmul_codes(x, codes), x_scale, w_scale, bias, out_dtype)


def _backend(implementation: str | None) -> str:
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "triton":
        _refuse_other_than_cuda()
    return implementation


def _refuse_other_than_cuda() -> None:
    platform = jax.default_backend()
    if platform != "gpu":
        raise NotImplementedError(f'"triton" needs a CUDA device; the platform is {platform}')
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    major = capability.split(".")[0]
    if not major.isdigit() or int(major) < 8:  # "gfx..." on ROCm; before 8.0 XLA has no Triton
        raise NotImplementedError(
            f'"triton" needs compute capability 8.0 or more; the device has {capability}'
        )


def _scaled(total, x_scale, w_scale, bias, out_dtype):
    y = total * x_scale * w_scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)
