"""`QTensor` and `TransformedKernel`: matrices as pytree nodes. Sizes come from shapes.

Both may be balanced and rotated: what is stored is `(w / mask) @ R`, and rows of the input become
`(x * mask) @ R` online, which is the same product (R is orthogonal, see `quant.hadamard`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int8, UInt8

from lowbit_jax.quant import hadamard
from pallas_kernels.formats import unpack_codes
from pallas_kernels.rows import QuantizedRows

LAYOUT_VERSION = 1  # of the byte layouts in pallas_kernels/packing.py


def _static(default=None):
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A quantised matrix, `w[n, k] ~ scale * (codes - zero)`; layer axes lead, in the leaves only.

    Stored (out, in) = (n, k), k contiguous, as PyTorch's files and integer tensor cores have it;
    the kernel it replaces is (k, n).

    Attributes:
        codes: int8[..., n, k] (int8) or packed uint8[..., n, bytes], see `pallas_kernels.packing`.
        scale: float32[..., n, g], or [..., 1, 1] for one scale per tensor.
        zero: integer zero point, int8, shaped like `scale`; None for symmetric codes.
        format: key of `pallas_kernels.formats.FORMATS`.
        shape: logical (n, k) of ONE layer.
        group: inputs that share a scale; k itself for per-channel and per-tensor scales.
        act_bits: bits of the activations this matrix is multiplied with, quantised per token when
            it runs; None keeps them in floating point.
        layout_version: version of the byte layout.
        mask: multiplies the channels of the input before anything else: a balance, and in its signs
            those of a randomised rotation; None for neither.
        rotation: block size of the rotation of the input after the mask; None for none.
        act_scale: one scale for all rows of the input, whatever they hold; None for one of each.
        act_symmetric: False gives each row of the input a zero point too, see `quant.asymmetric`.
    """

    codes: Int8[Array, "... n k"] | UInt8[Array, "... n bytes"]
    scale: Float32[Array, "... n g"]
    zero: Int8[Array, "... n g"] | None = None
    format: str = _static("int8")
    shape: tuple[int, int] = _static((0, 0))
    group: int = _static(0)
    act_bits: int | None = _static()
    layout_version: int = _static(LAYOUT_VERSION)
    mask: Float32[Array, "... k"] | None = None
    rotation: int | None = _static()
    act_scale: Float32[Array, "..."] | None = None
    act_symmetric: bool = _static(True)

    @property
    def layers(self) -> int:
        """Number of stacked layers (1 without leading axes)."""
        return math.prod(self.codes.shape[:-2])

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes with padding, scales, zero points and the mask."""
        return tree_bytes(self)

    def unpacked(self) -> Int8[Array, "... n k"]:
        """The signed integer codes."""
        return unpack_codes(self.codes, self.format, self.shape[1])

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "... n k"]:
        """The matrix this stands for, (n, k), computed in float32 and cast to `dtype`.

        For inputs as they are: the mask and the rotation are undone.
        """
        weight = self.dequantize_stored(jnp.float32)
        return untransform(weight, self.mask, self.rotation).astype(dtype)

    def dequantize_stored(self, dtype=jnp.float32) -> Float[Array, "... n k"]:
        """The matrix as its codes have it, for inputs that are masked and rotated."""
        n, k = self.shape
        codes = self.unpacked().astype(jnp.float32)
        if self.zero is not None:
            codes = codes - spread(self.zero.astype(jnp.float32), self.group, k)
        return (codes * spread(self.scale, self.group, k)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransformedKernel:
    """A floating kernel that is balanced or rotated and not quantised.

    `ops.linear` gives the product of the kernel it was made of: `(x * mask) @ R @ kernel`.

    Attributes:
        kernel: (k, n), as Flax has kernels.
        mask: see `QTensor`.
        rotation: see `QTensor`.
    """

    kernel: Float[Array, "... k n"]
    mask: Float32[Array, "... k"] | None = None
    rotation: int | None = _static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel, layer axes too."""
        return self.kernel.shape

    @property
    def dtype(self):
        """Of the kernel."""
        return self.kernel.dtype

    def restore(self, dtype=None) -> Float[Array, "... k n"]:
        """The kernel for inputs as they are."""
        weight = jnp.swapaxes(self.kernel, -1, -2)
        weight = untransform(weight, self.mask, self.rotation)
        return jnp.swapaxes(weight, -1, -2).astype(dtype or self.dtype)


def transform_rows(
    x: Float[Array, "... k"], mask: Float32[Array, "k"] | None, rotation: int | None
) -> Float32[Array, "... k"]:
    """`(x * mask) @ R` in float32: what happens to the input of a transformed matrix."""
    x = x.astype(jnp.float32)
    if mask is not None:
        x = x * mask
    return x if rotation is None else hadamard.rotate(x, rotation)


def static_rows(
    x: Float32[Array, "... k"],
    bits: int,
    scale: Float32[Array, ""],
    finite: Bool[Array, "... 1"],
) -> QuantizedRows:
    """Rows by a scale that was fixed before: what is beyond the largest code is clipped.

    Rows that are not `finite` get a scale of NaN: damage shows, as it does per token.
    """
    qmax = 2 ** (bits - 1) - 1
    codes = jnp.clip(jnp.round(x / scale), -qmax, qmax).astype(jnp.int8)
    sums = jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32)
    return QuantizedRows(codes, jnp.where(finite, scale, jnp.nan), sums)


def untransform(
    weight: Float[Array, "... n k"], mask: Float32[Array, "... k"] | None, rotation: int | None
) -> Float[Array, "... n k"]:
    """The matrix for inputs as they are, of one for inputs that are masked and rotated."""
    if rotation is not None:
        weight = hadamard.rotate(weight, rotation, inverse=True)
    return weight if mask is None else weight * mask[..., None, :]


def spread(values: Array, group: int, k: int) -> Array:
    """One value per group, (..., g), to one per input, (..., k); a single group stays (..., 1)."""
    if values.shape[-1] == 1:
        return values
    return jnp.repeat(values, group, axis=-1)[..., :k]


def tree_bytes(tree) -> int:
    """Bytes of all leaves (arrays or shapes) of a tree, by shape; no dtype here is sub-byte."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def is_qtensor(value) -> bool:
    """Whether a tree node is a `QTensor` (the `is_leaf` of most tree maps here)."""
    return isinstance(value, QTensor)


def is_kernel(value) -> bool:
    """Whether a tree node is a `QTensor` or a `TransformedKernel`."""
    return isinstance(value, QTensor | TransformedKernel)
