"""The linears of MiniLM (all-MiniLM-L6-v2) and what sentences give each of them.

Six BERT blocks of width 384, normalised after each sum, trained by others on text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from convert.minilm import LINEARS, TextEncoder, load_minilm
from lowbit_jax.models.bert import BertEncoder
from lowbit_jax.models.layers import Linear
from lowbit_jax.quant.stacks import iter_layers

TOKENS = 64  # of a sentence, at most
BATCH = 16  # sentences at a time
INPUT = "input"  # under which inputs are sown


def layers(paths: Sequence[Path], count: int) -> tuple[Mapping[str, jax.Array], Any, Any]:
    """Kernels (k, n) by layer path; inputs (rows, k) of `count` sentences, and of `count` others.

    Args:
        paths: files and folders of .md files the sentences are taken from.
        count: sentences whose inputs are judged; as many others are to calibrate on.

    Raises:
        SystemExit: too few sentences.
        FileNotFoundError: the weights are not installed, with the command that does.
    """
    texts = sentences(paths)
    if len(texts) < 2 * count:
        raise SystemExit(f"{len(texts)} sentences in {paths}, {2 * count} are needed")
    encode = load_minilm()
    calibration, judged = texts[0 : 2 * count : 2], texts[1 : 2 * count : 2]
    kernels = {layer: k if i is None else k[i] for layer, k, i in iter_layers(encode.params)}
    return kernels, inputs(encode, judged), inputs(encode, calibration)


def sentences(paths: Sequence[Path]) -> list[str]:
    """Lines of prose of at least eight words, tables and code left out, each once."""
    files = [f for p in paths for f in (sorted(p.rglob("*.md")) if p.is_dir() else [p])]
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    prose = (line for line in lines if line and line[0].isalpha() and "|" not in line)
    return list(dict.fromkeys(line for line in prose if len(re.findall(r"\w+", line)) >= 8))


def inputs(encode: TextEncoder, texts: Sequence[str]) -> dict[str, Float[np.ndarray, "rows k"]]:
    """What every linear was given, by layer path, padding left out."""
    ids, mask = encode.tokens(texts, TOKENS)
    found: dict[str, list[np.ndarray]] = {}
    model = BertEncoder(encode.config)
    for start in range(0, len(texts), BATCH):
        batch = ids[start : start + BATCH], mask[start : start + BATCH]
        for layer, x in _watched(encode.params, model, *batch).items():
            found.setdefault(layer, []).append(x[np.asarray(batch[1])])
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def _watched(params: Any, model: BertEncoder, ids: Any, mask: Any) -> dict[str, np.ndarray]:
    def interceptor(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            context.module.sow("intermediates", INPUT, args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        _, state = model.apply({"params": params}, ids, mask, mutable=["intermediates"])
    blocks = state["intermediates"]["blocks"]["0"]
    layers = len(jax.tree.leaves(blocks)[0])
    return {
        f"blocks/{layer}/{name}": np.asarray(blocks[name][INPUT][0][layer])
        for layer in range(layers)
        for name in LINEARS
    }
