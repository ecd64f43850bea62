"""The errors of `convert`."""

from __future__ import annotations

import os
from collections.abc import Sequence

MAX_LISTED = 20


class CheckpointError(ValueError):
    """Everything that is wrong with one checkpoint file or folder, collected and raised once.

    Args:
      source: the file or folder.
      problems: one line each, or a single line.

    Attributes: `source` (str) and `problems` (tuple of str, all of them). The message is one line
    for one problem; otherwise one line each for the first `MAX_LISTED`, then "and N more".
    """

    def __init__(self, source: str | os.PathLike[str], problems: str | Sequence[str]):
        self.source = os.fspath(source)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.source, self.problems)  # both in args, so that it pickles

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        lines = [f"{self.source}: {len(self.problems)} problems"]
        lines += [f"  - {problem}" for problem in self.problems[:MAX_LISTED]]
        if len(self.problems) > MAX_LISTED:
            lines.append(f"  and {len(self.problems) - MAX_LISTED} more")
        return "\n".join(lines)
