"""Where benchmarks print."""

from rich.console import Console

TABLE_WIDTH = 200  # columns where the output is a file or a pipe, which has none of its own


def wide_console() -> Console:
    """Without markup; wide enough for every table where the output is a file or a pipe."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(markup=False, width=TABLE_WIDTH)
