"""Files inside installed packages: weights and pictures are read, the packages' code is not run."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def installed_file(distribution: str, ending: str, missing: str) -> Path:
    """The first file of an installed package whose path ends so.

    Args:
        distribution: name of the package as pip knows it.
        ending: of the file's path, such as "data/coffee.png".
        missing: what is said where it is not there, with the command that installs it.

    Raises:
        FileNotFoundError: the package is not installed or has no such file.
    """
    try:
        files = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(missing)
