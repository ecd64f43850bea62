"""Tokenisers of text encoders, from the files of a checkpoint, by the package `tokenizers`.

The package is wanted when a tokeniser is made, not before: `pip install lowbit-jax[pipeline]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from lowbit_jax.pipelines.folder import PipelineError

# words, contractions, single digits, runs of other signs (Radford et al. 2021; OpenAI's CLIP)
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_START, _END = "<|startoftext|>", "<|endoftext|>"
# an embedding table may be padded up to a multiple of this: T5's has 32,128 rows for 32,100 tokens
_TABLE_MULTIPLE = 128


class Tokens(NamedTuple):
    """Texts as token ids.

    Attributes:
        ids: all padded to one length.
        dropped: of each text, what was cut off its end to fit; "" where nothing was.
    """

    ids: Int32[np.ndarray, "b t"]
    dropped: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """Texts -> ids, truncated and padded to a length. Made by `clip_tokenizer` or `t5_tokenizer`.

    Attributes:
        tokenizer: of the package, with its start and end tokens.
        pad: id that fills up a text.
    """

    tokenizer: Any
    pad: int

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        """Encode to `length` tokens each, the end-of-text token last of what is not padding."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)
        ids = np.full((len(texts), length), self.pad, np.int32)
        dropped = []
        for row, encoding in enumerate(self.tokenizer.encode_batch(list(texts))):
            ids[row, : len(encoding.ids)] = encoding.ids
            rest = [number for more in encoding.overflowing for number in more.ids]
            dropped.append(self.tokenizer.decode(rest).replace("</w>", " ").strip())
        return Tokens(ids, tuple(dropped))


def clip_tokenizer(folder: Path, vocab_size: int, eos_token_id: int | None) -> TextTokenizer:
    """CLIP's: lower-cased byte-level BPE between start and end tokens.

    Args:
        folder: with `vocab.json` and `merges.txt`, or with `tokenizer.json`.
        vocab_size: of the encoder.
        eos_token_id: of the encoder; None where it takes the largest id for it.

    Raises:
        PipelineError: not CLIP's files, or not those of this encoder.
        ModuleNotFoundError: the package is not installed.
    """
    parts = _package()
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _read(folder, lambda: _clip_from_files(parts, folder))
    else:
        tokenizer = _read(folder, lambda: _from_json(parts, folder))
    size = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id(_END)
    if tokenizer.token_to_id(_START) is None or end is None or size != vocab_size:
        raise PipelineError(
            f"{folder}: not the tokeniser of this CLIP text encoder: it has {size} tokens (with "
            f"{_START}: {tokenizer.token_to_id(_START) is not None}, {_END}: {end is not None}), "
            f"the encoder {vocab_size}"
        )
    wanted = size - 1 if eos_token_id is None else eos_token_id
    if end != wanted:
        raise PipelineError(
            f"{folder}: {_END} is token {end}, the text encoder takes {wanted} for a text's end"
        )
    return TextTokenizer(tokenizer, _pad(folder, tokenizer, _END))


def t5_tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    """T5's: a unigram model, the end-of-text token at the end.

    Args:
        folder: with `tokenizer.json`.
        vocab_size: of the encoder, whose table may have some unused rows.

    Raises:
        PipelineError: not T5's files, or not those of this encoder.
        ModuleNotFoundError: the package is not installed.
    """
    parts = _package()
    if not (folder / "tokenizer.json").is_file() and (folder / "spiece.model").is_file():
        raise PipelineError(
            f"{folder}: only spiece.model is there, which takes another package to read; add "
            "tokenizer.json: transformers writes it by "
            "T5TokenizerFast.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = _read(folder, lambda: _from_json(parts, folder))
    size = tokenizer.get_vocab_size()
    special = {name: tokenizer.token_to_id(name) for name in ("</s>", "<pad>")}
    if None in special.values() or not size <= vocab_size <= size + _TABLE_MULTIPLE:
        raise PipelineError(
            f"{folder}: not the tokeniser of this T5 encoder: it has {size} tokens ("
            f"{', '.join(f'{name} is {number}' for name, number in special.items())}), the encoder "
            f"{vocab_size}"
        )
    return TextTokenizer(tokenizer, _pad(folder, tokenizer, "<pad>"))


def _package() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "prompts need the package tokenizers: pip install 'lowbit-jax[pipeline]'"
        ) from error
    return tokenizers


def _read(folder: Path, make: Any) -> Any:
    try:
        return make()
    except Exception as error:  # the package raises plain Exception for a malformed file
        raise PipelineError(f"{folder}: no readable tokeniser ({error})") from error


def _from_json(parts: Any, folder: Path) -> Any:
    return parts.Tokenizer.from_file(str(folder / "tokenizer.json"))


def _clip_from_files(parts: Any, folder: Path) -> Any:
    """As transformers' CLIPTokenizer puts it together."""
    model = parts.models.BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        end_of_word_suffix="</w>",
        unk_token=_END,
    )
    tokenizer = parts.Tokenizer(model)
    normal, words = parts.normalizers, parts.pre_tokenizers
    tokenizer.normalizer = normal.Sequence(
        [normal.NFC(), normal.Replace(parts.Regex(r"\s+"), " "), normal.Lowercase()]
    )
    split = words.Split(parts.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = words.Sequence([split, words.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = parts.decoders.ByteLevel()
    tokenizer.add_special_tokens([_START, _END])
    start, end = (tokenizer.token_to_id(token) for token in (_START, _END))
    tokenizer.post_processor = parts.processors.RobertaProcessing(
        (_END, end), (_START, start), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _pad(folder: Path, tokenizer: Any, usual: str) -> int:
    """Id of the padding token: what the publisher's files say, else the usual one."""
    name: Any = usual
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            document = _read(folder, lambda file=file: json.loads((folder / file).read_text()))
            found = document.get("pad_token") or name
            name = found.get("content") if isinstance(found, dict) else found
    number = tokenizer.token_to_id(str(name))
    if number is None:
        raise PipelineError(f"{folder}: the padding token {name!r} is not in the vocabulary")
    return number
