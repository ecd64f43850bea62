"""What to sample, from a file: prompts as text, prompts that are encoded already, or class labels.

A text file has one a line; its text is encoded by MiniLM, or by a FLUX.1's own encoders (see
`convert.flux_prompts`). A safetensors file has `txt` [p, t, k] and, as the model takes them,
`pooled` [p, v]; it may have `mask` [p, t] (1: no padding), and for guidance of models that store no
null caption `negative` [t, k] with `negative_mask` [t].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from convert.minilm import load_minilm
from convert.safetensors import TensorFile

MINILM_TOKENS = 32
OPTIONAL = ("mask", "negative", "negative_mask")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Encoded prompts.

    Attributes:
        txt: states of the text encoder.
        mask: False where `txt` is padding.
        pooled: a vector of the whole prompt; None for models that take none.
        negative: states and mask of what guidance leads away from; None where the file has none,
            and of text for models that take a pooled vector.
    """

    txt: Float32[np.ndarray, "p t k"]
    mask: Bool[np.ndarray, "p t"]
    pooled: Float32[np.ndarray, "p v"] | None = None
    negative: tuple[Float32[np.ndarray, "1 t k"], Bool[np.ndarray, "1 t"]] | None = None

    def __len__(self) -> int:
        return len(self.txt)


class PromptEncoder(NamedTuple):
    """What text is encoded by.

    Attributes:
        encode: texts -> states [p, t, k], pooled vectors [p, v].
        width: k and v; None where they are known to be the model's.
    """

    encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
    width: int | None = None


def minilm(tokens: int = MINILM_TOKENS) -> PromptEncoder:
    """MiniLM, which the small models of this project are trained with; states of `tokens`."""
    loaded = cache(load_minilm)  # when it is first called, and not before
    return PromptEncoder(lambda texts: loaded()(texts, tokens), width=384)


def read_prompts(
    path: Path, *, context: int, pooled: int | None = None, encoder: PromptEncoder
) -> Prompts:
    """Read prompts; text is encoded, and "" for `negative` where the model takes no pooled vector.

    Args:
        path: the file, see the module.
        context: k, width of the model's text states.
        pooled: v, width of its pooled vector; None if it takes none.
        encoder: of text.

    Raises:
        ValueError: none in it, or none that the model takes: says what is wrong with which.
        OSError: no such file.
    """
    if path.suffix == ".safetensors":
        found = _read_encoded(path, pooled is not None)
    else:
        found = _encode(path, context, pooled, encoder)
    _check(path, found, context, pooled)
    return found


def read_labels(path: Path, classes: int) -> Int32[np.ndarray, "p"]:
    """Class labels, one a line.

    Args:
        path: a text file.
        classes: of the model; 0 for an unconditional one, whose only label is 0.

    Raises:
        ValueError: none in it, a line that is no integer, or a label that the model does not have.
        OSError: no such file.
    """
    labels = []
    for number, line in _lines(path, "class labels"):
        try:
            label = int(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: {line!r} is no class label") from None
        if not 0 <= label < max(1, classes):
            raise ValueError(
                f"{path}, line {number}: label {label}; the model has 0 to {max(1, classes) - 1}"
            )
        labels.append(label)
    return np.array(labels, np.int32)


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no {what}")
    return lines


def _encode(path: Path, context: int, pooled: int | None, encoder: PromptEncoder) -> Prompts:
    lines = [line for _, line in _lines(path, "prompts")]
    widths = [width for width in (context, pooled) if width is not None]
    if encoder.width is not None and any(width != encoder.width for width in widths):
        raise ValueError(
            f"{path}: this model's text states are {' and '.join(map(str, widths))} wide; only "
            f"MiniLM ({encoder.width}) is run here, and FLUX.1's own encoders where they are in "
            "the checkpoint's pipeline: model_index.json, text_encoder, text_encoder_2, tokenizer "
            "and tokenizer_2 beside it. Give those, or a safetensors file of encoded prompts: "
            f"txt [p, t, k]{'' if pooled is None else ', pooled [p, k]'}"
        )
    txt, vectors = (np.asarray(x, np.float32) for x in encoder.encode(lines))
    # MiniLM's states are exactly zero where padded, and nowhere else
    mask = (txt != 0).any(axis=-1)
    if pooled is not None:  # FLUX, whose guidance is distilled and whose padding is attended to
        return Prompts(txt=txt, mask=mask, pooled=vectors)
    empty = np.asarray(encoder.encode([""])[0], np.float32)
    return Prompts(txt=txt, mask=mask, negative=(empty, (empty != 0).any(axis=-1)))


def _read_encoded(path: Path, takes_pooled: bool) -> Prompts:
    needed = ["txt", *["pooled"] * takes_pooled]
    with TensorFile(path) as file:
        missing = [name for name in needed if name not in file.names]
        unknown = [name for name in file.names if name not in ("txt", "pooled", *OPTIONAL)]
        if missing or unknown:
            raise ValueError(f"{path}: missing tensors {missing}, unknown tensors {unknown}")
        read = {name: np.array(file.read(name), np.float32) for name in file.names}
    txt = read["txt"]
    mask = read.get("mask", np.ones(txt.shape[:2])) != 0
    negative = None
    if "negative" in read:
        whole = np.ones(read["negative"].shape[:1])
        negative = read["negative"][None], read.get("negative_mask", whole)[None] != 0
    elif "negative_mask" in read:
        raise ValueError(f"{path}: negative_mask without negative")
    return Prompts(
        txt=txt, mask=mask, pooled=read["pooled"] if takes_pooled else None, negative=negative
    )


def _check(path: Path, found: Prompts, context: int, pooled: int | None) -> None:
    """Shapes and values, all that is wrong at once."""
    if found.txt.ndim != 3 or found.txt.shape[2] != context or 0 in found.txt.shape:
        raise ValueError(f"{path}: txt is {found.txt.shape}; the model takes (p, t, {context})")
    count, tokens, _ = found.txt.shape
    wanted: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {"mask": (found.mask, (count, tokens))}
    if found.pooled is not None and pooled is not None:
        wanted["pooled"] = found.pooled, (count, pooled)
    if found.negative is not None:
        wanted["negative"] = found.negative[0][0], (tokens, context)
        wanted["negative_mask"] = found.negative[1][0], (tokens,)
    problems = [
        f"{name} is {array.shape}, not {shape}"
        for name, (array, shape) in wanted.items()
        if array.shape != shape
    ]
    for name, array in (("txt", found.txt), ("pooled", found.pooled)):
        rows = () if array is None else array.reshape(count if len(array) == count else 1, -1)
        bad = [i for i, row in enumerate(rows) if not np.isfinite(row).all()]
        if bad:
            problems.append(f"{name} of prompt(s) {', '.join(map(str, bad))} holds NaN or infinity")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
