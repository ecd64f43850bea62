"""Chooses a backend for each op: `implementation=None | "triton" | "xla" | "interpret"`.

* ``"xla"``: the plain-jnp form of `reference`, on every platform.
* ``"triton"``: the Pallas-Triton kernel, on CUDA only. No kernel has run on a GPU yet.
* ``"interpret"``: the kernel's body as plain JAX, for tests.
* ``None``: "xla", on every platform, for as long as no kernel has been checked on a GPU.

"This backend cannot do that" is `NotImplementedError`; "the caller is wrong" is `ValueError`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from pallas_kernels import int8_matmul as int8_kernel
from pallas_kernels import packing, reference
from pallas_kernels import quantize_rows as quantize_kernel
from pallas_kernels import ternary_matmul as ternary_kernel

Implementation = Literal["triton", "xla", "interpret"]
IMPLEMENTATIONS = ("triton", "xla", "interpret")


def quantize_rows(
    x: Float[Array, "... k"], bits: int = 8, *, implementation: Implementation | None = None
) -> tuple[Int8[Array, "... k"], Float32[Array, "... 1"]]:
    """Symmetric dynamic quantisation, one scale per row; see `reference.quantize_rows`.

    Args:
        x: floating [..., k]; the kernel takes bfloat16 and float32.
        bits: 2 to 8.
        implementation: which backend; None chooses.

    Raises:
        ValueError: x is not a floating array, bits outside 2..8, an unknown implementation.
        NotImplementedError: the backend cannot: not on this platform, an empty array, this dtype.
    """
    backend = _backend(implementation)
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a floating array of rows, got {x.dtype} of shape {x.shape}")
    if backend == "xla":
        return reference.quantize_rows(x, bits)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel takes bfloat16 and float32, not {x.dtype}")
    if x.size == 0:
        raise NotImplementedError(f"the kernels take no empty array, got shape {x.shape}")
    codes, scale = quantize_kernel.quantize_rows(
        x.reshape(-1, x.shape[-1]), bits, interpret=backend == "interpret"
    )
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


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
