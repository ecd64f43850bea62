"""The way back: a converted model to the source ecosystem's files, usually diffusers'.

`export_diffusers DIR --out FOLDER` for a folder that convert_and_quantize wrote.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from convert.command import run_command
from convert.registry import ALL_SOURCES
from convert.safetensors import TensorSpec, write_sharded
from convert.table import Layout, Leaf, expand, split_leaf
from lowbit_jax.checkpoint import OutputError, iter_parts, load
from lowbit_jax.checkpoint_parts import leaf_at
from lowbit_jax.models.registry import MODELS, read_config
from lowbit_jax.quant.qtensor import QTensor, TransformedKernel


def export_diffusers(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    model: str,
    config: Any,
    *,
    layout: str | None = None,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = 10 * 10**9,
) -> Path:
    """Write `config.json` and `diffusion_pytorch_model*.safetensors`, loadable by diffusers.

    Text encoders go into `model*.safetensors`, loadable by transformers.

    A layout other than diffusers' has the names and shapes of another publication, in the same
    kind of file; its `config.json` says what no tensor tells.

    Quantised kernels are written as the floating-point matrices they stand for: the pictures are
    those of the quantised weights, the file is as large as an unquantised one. One tensor at a time
    is made and written.

    Args:
        folder: where to write; must not exist, or be empty.
        params: parameter tree, float or quantised.
        model: name of the network.
        config: its config.
        layout: name of a layout of `ALL_SOURCES[model].exports`; None for the first.
        dtype: dtype of the tensors.
        max_shard_bytes: a larger model is split, with an index.

    Returns:
        The folder.

    Raises:
        OutputError: the folder holds something. ValueError: the layout has no such configuration.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: is not empty; choose another folder")
    source = ALL_SOURCES[model]
    naming = source.export_layout(layout)
    document = json.dumps(source.exports[naming.name](config), indent=2) + "\n"
    tensors = source_tensors(params, model, config, naming, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if naming.name == "transformers" else "diffusion_pytorch_model"
    write_sharded(folder, tensors, max_shard_bytes, stem, metadata={"format": "pt"})
    (folder / "config.json").write_text(document)
    return folder


def source_tensors(
    params: Mapping[str, Any], model: str, config: Any, layout: Layout, dtype: Any
) -> dict[str, TensorSpec]:
    """All tensors of a layout, by name; each is made when its turn to be written comes."""
    abstract = iter_parts(MODELS[model].abstract_params(config))
    shapes = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in abstract}
    tensors = {
        name: TensorSpec(
            shape=shape, dtype=dtype, make=partial(_source_tensor, params, leaf, name, dtype)
        )
        for leaf in expand(layout, config, shapes)
        for name, shape in leaf.source_shapes().items()
    }
    for constant in layout.constants:
        value = np.asarray(constant.value(config))
        if value.dtype.kind == "i":  # a buffer of indices, which no publisher writes any more
            continue
        value = value.astype(dtype)
        tensors[constant.source] = TensorSpec(
            shape=value.shape, dtype=dtype, make=partial(np.asarray, value)
        )
    return dict(sorted(tensors.items()))


def _source_tensor(params: Mapping[str, Any], leaf: Leaf, name: str, dtype: Any) -> np.ndarray:
    # a fused matrix is made anew for each of its sources: time for memory
    value = leaf_at(params, leaf.part, leaf.path)
    return split_leaf(leaf, _to_source(value, leaf.is_kernel, dtype))[name]


def _to_source(value: Any, is_kernel: bool, dtype: Any) -> np.ndarray:
    if isinstance(value, QTensor):
        return np.asarray(value.dequantize(dtype))
    if isinstance(value, TransformedKernel):
        value = value.restore(jnp.float32)
    array = jnp.asarray(value, dtype)
    return np.asarray(array.T if is_kernel else array)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a converted model as its publishers do; quantised matrices become floating point."""

    folder: tyro.conf.Positional[Path]
    """A folder written by convert_and_quantize."""
    out: Path
    """Folder to write; must not exist, or be empty."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Of the tensors."""
    layout: str | None = None
    """Names and shapes; diffusers' where there is one. DiT and PixArt also: original."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, see `run_command`."""
    arguments = tyro.cli(Arguments, args=argv, prog="export_diffusers")
    return run_command("export_diffusers", lambda: export(arguments))


def export(arguments: Arguments) -> None:
    """Load, write, say what was written.

    Raises:
        ValueError: a folder that is no model, or an output that may not be written. OSError: one
            that cannot be.
    """
    dtype = {"bf16": jnp.bfloat16, "f32": jnp.float32}[arguments.dtype]
    saved = load(arguments.folder)
    config = read_config(saved.model, saved.config)
    layout = ALL_SOURCES[saved.model].export_layout(arguments.layout).name
    export_diffusers(arguments.out, saved.params, saved.model, config, layout=layout, dtype=dtype)
    print(f"{arguments.out}: {saved.model}, recipe '{saved.recipe.name}', in {layout} layout")


if __name__ == "__main__":
    sys.exit(main())
