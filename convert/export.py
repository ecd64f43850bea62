"""The way back: a parameter tree to the source ecosystem's files (diffusers layout)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.registry import SOURCES
from convert.safetensors import write_sharded
from convert.table import expand, split_leaf
from lowbit_jax.checkpoint import OutputError, iter_parts
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.quant.qtensor import QTensor


def export_diffusers(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    model: str,
    config: Any,
    *,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = 10 * 10**9,
) -> Path:
    """Write `config.json` and `diffusion_pytorch_model*.safetensors`, loadable by diffusers.

    Quantised kernels are written as the floating-point matrices they stand for: the pictures are
    those of the quantised weights, the file is as large as an unquantised one.

    Args:
        folder: where to write; must not exist, or be empty.
        params: parameter tree, float or quantised.
        model: name of the network.
        config: its config.
        dtype: dtype of the tensors.
        max_shard_bytes: a larger model is split, with an index.

    Returns:
        The folder.

    Raises:
        OutputError: the folder holds something. ValueError: diffusers has no such configuration.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: is not empty; choose another folder")
    source = SOURCES[model]
    document = json.dumps(source.to_json(config), indent=2) + "\n"
    tensors = source_tensors(params, model, config, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_sharded(folder, tensors, max_shard_bytes, metadata={"format": "pt"})
    (folder / "config.json").write_text(document)
    return folder


def source_tensors(
    params: Mapping[str, Any], model: str, config: Any, dtype: Any
) -> dict[str, np.ndarray]:
    """All tensors of the export layout, by name, in the source's orientation."""
    source, network = SOURCES[model], NETWORKS[model]
    abstract = iter_parts(network.abstract_params(config))
    shapes = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in abstract}
    parts = dict(iter_parts(params))
    tensors: dict[str, np.ndarray] = {}
    for leaf in expand(source.export_layout, config, shapes):
        value = parts[leaf.part][leaf.path]
        tensors |= split_leaf(leaf, _to_source(value, leaf.is_kernel, dtype))
    return dict(sorted(tensors.items()))


def _to_source(value: Any, is_kernel: bool, dtype: Any) -> np.ndarray:
    if isinstance(value, QTensor):
        return np.asarray(value.dequantize(dtype))
    array = jnp.asarray(value, dtype)
    return np.asarray(array.T if is_kernel else array)
