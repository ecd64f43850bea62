"""A picture with the settings it was made with, and its file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from lowbit_jax.checkpoint_store import OutputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        pixels: red, green, blue.
        settings: what it was made with; written into the file as text, name by name.
    """

    pixels: UInt8[np.ndarray, "Y X 3"]
    settings: Mapping[str, str]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a PNG: whole or not at all, and over another file only if told to.

        The settings are its text chunks: `PIL.Image.open(path).text`.

        Raises:
            OutputError: another name than *.png, a file that is there, or one that cannot be
                written.
            ModuleNotFoundError: Pillow is not installed.
        """
        path = Path(path)
        check_picture(path, overwrite)
        try:
            from PIL import Image, PngImagePlugin
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "pictures need the package Pillow: pip install 'lowbit-jax[pipeline]'"
            ) from error
        info = PngImagePlugin.PngInfo()
        for name, value in self.settings.items():
            info.add_text(name, value)
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".part", dir=path.parent
            )
            try:
                with os.fdopen(handle, "wb") as file:
                    Image.fromarray(self.pixels).save(file, "PNG", pnginfo=info)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(name, 0o666 & ~_umask())
                if not overwrite:
                    os.link(name, path)  # fails if another process was faster
                else:
                    os.replace(name, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        except FileExistsError:
            check_picture(path, overwrite)
            raise
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_picture(path: Path, overwrite: bool) -> None:
    """Raise `OutputError` when a picture may not be written to `path`."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    if path.exists() and not (overwrite and path.is_file()):
        raise OutputError(f"{path}: exists already; choose another --out or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")


def to_bytes(pixels: Float[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    """Numbers in [-1, 1] as bytes, rounded as diffusers does; what lies outside is clipped."""
    return np.round(np.clip(np.asarray(pixels, np.float32) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
