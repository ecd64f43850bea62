"""Silences what XLA's plugin writes past Python when it finds no driver. Imports no jax itself."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def quiet():
    """Holds back what is written straight to file descriptor 2; shows it if the block fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def prepare() -> None:
    """Readies a process for compiling: jax on the CPU, so that it looks for no device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with quiet():
        import pallas_kernels.audit.examine  # noqa: F401  (loads the plugin)
