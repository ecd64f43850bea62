"""Which backend runs an op: `implementation=None | "triton" | "xla" | "interpret"`.

* ``"xla"``: the plain-jnp form, on every platform.
* ``"triton"``: the Pallas-Triton kernel, on CUDA only.
* ``"interpret"``: the kernel's body as plain JAX, for tests.
* ``None``: the kernel where the program is lowered for CUDA and the kernel can do the shape, the
  plain form elsewhere. One trace serves both: a program traced on a CPU and compiled for a GPU
  gets the kernels.

"This backend cannot do that" is `NotImplementedError`; "the caller is wrong" is `ValueError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

Implementation = Literal["triton", "xla", "interpret"]
IMPLEMENTATIONS = ("triton", "xla", "interpret")
OLDEST = (8, 0)  # compute capability: before, XLA has no Triton
DEFAULT_GENERATION = "sm_80"


def dispatch(
    kernel: Callable, plain: Callable, implementation: Implementation | None, *operands
) -> Any:
    """Runs `kernel(*operands)` or `plain(*operands)`.

    Args:
        kernel: takes `interpret=`; raises NotImplementedError for what it cannot do.
        plain: the same function in plain jnp.
        implementation: see the module; None never raises NotImplementedError.
        operands: pytrees of arrays.

    Raises:
        ValueError: an unknown implementation.
        NotImplementedError: the backend asked for cannot.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "xla":
        return plain(*operands)
    if implementation == "interpret":
        return kernel(*operands, interpret=True)
    if implementation == "triton":
        _refuse_other_than_cuda()
        return kernel(*operands, interpret=False)
    if jax.default_backend() == "gpu" and not _new_enough():
        return plain(*operands)

    def on_cuda(*operands):
        try:
            return kernel(*operands, interpret=False)
        except NotImplementedError:
            return plain(*operands)

    return jax.lax.platform_dependent(*operands, cuda=on_cuda, default=plain)


def generation() -> str:
    """The GPU generation to choose tiles for: this process's GPU, or the A100's without one."""
    found = _capability() if jax.default_backend() == "gpu" else None
    return DEFAULT_GENERATION if found is None else f"sm_{found[0]}{found[1]}"


def _capability() -> tuple[int, int] | None:
    """(major, minor) of the first device; None where it is not NVIDIA's ("gfx..." on ROCm)."""
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else None


def _new_enough() -> bool:
    found = _capability()
    return found is not None and found >= OLDEST


def _refuse_other_than_cuda() -> None:
    platform = jax.default_backend()
    if platform != "gpu":
        raise NotImplementedError(f'"triton" needs a CUDA device; the platform is {platform}')
    if not _new_enough():
        found = getattr(jax.devices()[0], "compute_capability", "unknown")
        raise NotImplementedError(
            f'"triton" needs compute capability 8.0 or more; the device has {found}'
        )
