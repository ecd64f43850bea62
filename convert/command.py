"""How the programs of this package end: an exit code, and one line on stderr for what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run_command(name: str, work: Callable[[], None]) -> int:
    """Run `work` and return the exit code: 0 done, 2 for bad input, 130 when interrupted.

    Notes that an error carries, such as where a half-done job lies, are printed with it.

    Args:
        name: of the program.
        work: all of it; `ValueError` and `OSError` are bad input.
    """
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{name}: {'; '.join([str(error), *_notes(error)])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        left = "; ".join(_notes(error) or ["nothing was written"])
        print(f"{name}: interrupted; {left}", file=sys.stderr)
        return 130
    return 0


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])
