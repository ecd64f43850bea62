"""What one call takes on a device, without a profiler and without its dispatch.

`n` calls run as one program, a loop in which every call waits for the one before. Two numbers of
calls are timed, and their difference is the calls' alone: dispatch, synchronisation and the loop's
own start are the same in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

FEW = 2  # calls of the shorter run


def seconds_per_call(run: Callable[[int], Any], *, spend: float = 0.05, tries: int = 5) -> float:
    """Seconds a call takes on the device.

    Args:
        run: `run(n)` runs n calls as one program and returns its arrays; n is no static argument.
        spend: seconds that the calls of the longer run should take together.
        tries: each run is timed so often; the shortest counts.

    Raises:
        ValueError: more calls took no longer than fewer, so the time is not to be had this way.
    """

    def best(n: int) -> float:
        found = []
        for _ in range(tries):
            start = time.perf_counter()
            jax.block_until_ready(run(n))
            found.append(time.perf_counter() - start)
        return min(found)

    jax.block_until_ready(run(FEW))  # compiles
    few = best(FEW)
    rough = max((best(FEW + 10) - few) / 10, 1e-6)
    calls = min(max(int(spend / rough), 10), 20_000)
    seconds = (best(FEW + calls) - few) / calls
    if seconds <= 0:
        raise ValueError(f"{FEW + calls} calls took no longer than {FEW}: the timing is disturbed")
    return seconds


def looped(step: Callable[..., Any], carry: Any, *constants: Any) -> Callable[[int], Any]:
    """`run(n)` for `seconds_per_call`: carry = step(carry, *constants), n times in one program."""

    @jax.jit
    def run(n, carry, *constants):
        return jax.lax.fori_loop(0, n, lambda _, carry: step(carry, *constants), carry)

    return lambda n: run(n, carry, *constants)
