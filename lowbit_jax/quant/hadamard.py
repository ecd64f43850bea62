"""Hadamard rotations of any size that factors, and the signs that make them random.

A rotation of block size s is `x @ blockdiag(R, R, ...)` with R orthogonal of size s, all of whose
entries are +-1 / sqrt(s); s = k rotates the whole row. R is a Kronecker product of small Hadamard
matrices, Sylvester's for powers of two and Paley's for 12, 20, 28, 36, 44, ...: FLUX's width of
3072 is 12 x 16 x 16, DiT's 1152 is 12 x 12 x 8. So a row costs k times the sum of the factors, no
table is stored, and every entry is known from the size alone.

Sources: Paley 1933, "On orthogonal matrices"; QuIP# (Tseng et al. 2024) and QuaRot (Ashkboos et al.
2024) for products H_m x H_(2^p) as rotations. They take the first m of a list that divides the
size, and fail on 13824 = 2^9 27; here all factorisations are looked at.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels import reference_rows
from pallas_kernels.reference_rows import ROTATIONS

LARGEST_PALEY = 148
LARGEST_SYLVESTER = 16  # of one factor; larger powers of two are products


def rotate(
    x: Float[Array, "... k"], size: int, *, inverse: bool = False
) -> Float32[Array, "... k"]:
    """`x @ blockdiag(R, R, ...)`, or by the transpose of R, in float32.

    For the powers of two it is what the kernels of `pallas_kernels` do to rows.

    Args:
        x: rows.
        size: of R; divides k, see `factors`.
        inverse: undo it.

    Raises:
        ValueError: no rotation of this size, or one that does not divide k.
    """
    k, parts = x.shape[-1], factors(size)
    if parts is None or k % size:
        raise ValueError(f"no rotation of size {size} for rows of {k}: {advice(k)}")
    lead, axis = x.shape[:-1], x.ndim
    blocks = x.astype(jnp.float32) * jnp.float32(size**-0.5)
    for part in parts:  # each product moves its axis to the end: after all, they are in order again
        matrix = hadamard(part)
        blocks = jax.lax.dot_general(
            blocks.reshape(*lead, k // size, part, size // part),
            matrix.T if inverse else matrix,
            (((axis,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
    return blocks.reshape(x.shape)


def rotation_size(k: int, rotation: int | str, layer: str) -> int:
    """The block size that a rule's `rotation` means for rows of k.

    Args:
        k: in-features.
        rotation: a block size; "full" for k itself; "auto" for the largest of 256, 128 and 64 that
            divides k, which the kernels do in the pass that quantises, else "full".
        layer: layer path, for the message.

    Raises:
        ValueError: there is none; names the layer and the sizes that would do.
    """
    size = rotation if isinstance(rotation, int) else k
    if rotation == "auto":
        size = next((size for size in sorted(ROTATIONS, reverse=True) if k % size == 0), k)
    if size < 1 or k % size or factors(size) is None:
        raise ValueError(f"{layer}: rotation {rotation!r} of {k} channels: {advice(k)}")
    return size


def advice(k: int) -> str:
    """Which block sizes would do for rows of k."""
    sizes = [s for s in range(k, 1, -1) if k % s == 0 and factors(s) is not None]
    if not sizes:
        return "no block size divides it and is a product of Hadamard sizes; do not rotate it"
    largest = "" if sizes[0] == k else "it does not factor into Hadamard sizes as a whole; "
    return f"{largest}block sizes that would do are {', '.join(map(str, sizes[:8]))}"


def signs(seed: int, layer: str, k: int) -> Float32[np.ndarray, "k"]:
    """The random signs of a layer, +-1: the bits of SHAKE-256 of the seed and the layer path.

    So they depend on no order of drawing and no library's generator (ViDiT-Q's do).
    """
    stream = hashlib.shake_256(f"{seed}:{layer}".encode()).digest(-(-k // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=k)
    return 1 - 2 * bits.astype(np.float32)


@functools.cache
def factors(size: int) -> tuple[int, ...] | None:
    """Hadamard sizes whose product is `size`, of the least sum; None if there are none."""
    if size < 1:
        return None
    twos = (size & -size).bit_length() - 1
    found = [(*paley, *_powers(left)) for paley, left in _paley_parts(size >> twos, twos)]
    return min(found, key=lambda parts: (sum(parts), parts), default=None)


def _paley_parts(odd: int, twos: int, most: int = LARGEST_PALEY) -> Iterator[tuple[tuple, int]]:
    """(Paley sizes, twos that are left) of every way to take all of `odd`, largest size first."""
    if odd == 1:
        yield (), twos
        return
    for size in range(min(most, LARGEST_PALEY), 11, -4):
        part = size >> 2
        if size % 4 or part % 2 == 0 or odd % part or twos < 2 or _paley(size) is None:
            continue
        for rest, left in _paley_parts(odd // part, twos - 2, size):
            yield (size, *rest), left


def _powers(twos: int) -> tuple[int, ...]:
    """2^twos as factors of nearly equal size, at most `LARGEST_SYLVESTER`."""
    count = math.ceil(twos / math.log2(LARGEST_SYLVESTER))
    return tuple(2 ** (twos // count + (i < twos % count)) for i in range(count))


@functools.cache
def hadamard(size: int) -> Float32[np.ndarray, "s s"]:
    """The +-1 matrix with orthogonal rows of one factor: Sylvester's or Paley's.

    Raises:
        ValueError: neither has this size.
    """
    if size & (size - 1) == 0:
        return reference_rows.hadamard(size)
    matrix = _paley(size)
    if matrix is None:
        raise ValueError(
            f"no Hadamard matrix of size {size} by Sylvester's or Paley's construction"
        )
    return matrix


@functools.cache
def _paley(size: int) -> Float32[np.ndarray, "s s"] | None:
    """Of q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4; None for others."""
    q = size // 2 - 1
    if size % 2 == 0 and q % 4 == 1 and _is_prime(q):
        conference = np.pad(_characters(q), (1, 0), constant_values=1)
        conference[0, 0] = 0
        first, second = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return (np.kron(conference, first) + np.kron(np.eye(q + 1), second)).astype(np.float32)
    q = size - 1
    if q % 4 == 3 and _is_prime(q):
        skew = np.pad(_characters(q), (1, 0), constant_values=1)
        skew[0, 0], skew[1:, 0] = 0, -1
        return (skew + np.eye(q + 1)).astype(np.float32)
    return None


def _characters(q: int) -> np.ndarray:
    """chi(i - j) mod q: 1 for squares, -1 for others, 0 for 0."""
    character = np.full(q, -1)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    index = np.arange(q)
    return character[(index[:, None] - index) % q]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))
