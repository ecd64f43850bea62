"""What the tests of every network's conversion need: write a source, port it, compare trees."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.checkpoint_files import open_checkpoint
from convert.job import plan, run
from convert.registry import ALL_SOURCES
from convert.safetensors import write_sharded
from convert.table import expand
from lowbit_jax.checkpoint import assemble, iter_parts
from lowbit_jax.models.registry import MODELS
from lowbit_jax.quant.hadamard import rotation_size
from lowbit_jax.quant.recipe import RECIPES
from tests.references.flux_files import random_tensors


def write_checkpoint(
    folder, shapes, config=None, *, dtype=ml_dtypes.bfloat16, max_shard_bytes=10**9, **changes
):
    """Write random tensors of these shapes, and `config.json`; returns the folder.

    `changes` replace tensors ({name: array}); None leaves one out.
    """
    tensors = random_tensors(shapes, dtype) | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    write_sharded(folder, tensors, max_shard_bytes)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def ported(path, recipe="float", dtype=jnp.float32, model="auto"):
    """(job, tree) of a checkpoint, converted leaf by leaf."""
    parts = []
    with open_checkpoint(path) as checkpoint:
        job = plan(checkpoint, RECIPES[recipe], dtype=dtype, model=model)
        run(job, lambda name, part, bad: parts.append((name, part)))
    return job, assemble(parts)


def assert_same(found, expected):
    """Equal in structure, static fields, dtypes, shapes and every bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def assert_same_files(a, b):
    """The same tensors, bit by bit, in two checkpoints."""
    with open_checkpoint(a) as a, open_checkpoint(b) as b:
        assert a.names == b.names
        for name in a.names:
            assert a.info(name).dtype == b.info(name).dtype, name
            assert a.info(name).shape == b.info(name).shape, name
            assert a.read(name).tobytes() == b.read(name).tobytes(), name


def source_shapes(model, config, layout):
    """Name -> shape of every tensor that a table makes of a config."""
    parts = iter_parts(MODELS[model].abstract_params(config))
    paths = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in parts}
    found = [
        item for leaf in expand(layout, config, paths) for item in leaf.source_shapes().items()
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def linears(model, config):
    """Layer path -> (n, k) of every matrix of a network."""
    found = {}
    for part, leaves in iter_parts(MODELS[model].abstract_params(config)):
        for path, leaf in leaves.items():
            if path.endswith("/kernel"):
                layer = path.removesuffix("/kernel")
                found[f"{part}/{layer}" if "/" in part else layer] = leaf.shape[::-1]
    return found


# named recipe -> (format of the weights, bits of the activations)
TREATMENT = {
    "float": None,
    "w8a8": ("int8", 8),
    "w4a8": ("int4", 8),
    "w8a16": ("int8", None),
    "w4a16": ("int4", None),
    "flux-1.58bit": ("ternary", None),
    "flux-1.58bit-a8": ("ternary", 8),
}


def assert_recipes(model, config, in_blocks, outside):
    """Every linear of a network by name, and what each recipe does to it.

    Args:
        model: name of the network.
        config: of the size that was published.
        in_blocks: linear inside a layer of "blocks" -> (n, k). Quantised.
        outside: linear outside -> (n, k). Kept.
    """
    depth = getattr(config, ALL_SOURCES[model].export_layout().stacks["blocks"])
    quantised = {
        f"blocks/{i}/{name}": shape for i in range(depth) for name, shape in in_blocks.items()
    }
    found = linears(model, config)
    assert found == quantised | outside
    for name, recipe in RECIPES.items():
        rules = {layer: rule for layer, rule in recipe.assign(list(found)).items() if rule}
        if name in TREATMENT:
            assert set(rules) == (set(quantised) if TREATMENT[name] else set())
            treatments = {(rule.weights.format, rule.act_bits) for rule in rules.values()}
            assert treatments == ({TREATMENT[name]} if TREATMENT[name] else set())
        elif re.fullmatch(METHODS, name):
            assert_method(name, rules, quantised)


METHODS = r"(viditq|viditq-v1|naive|smoothquant|quarot|qdit)-w(\d)a(\d)(-mp)?"


def assert_method(name, rules, shapes):
    """No linear of a block stays in floating point; modulations have floating inputs.

    Args:
        name: of a recipe of `METHODS`.
        rules: layer path -> its rule.
        shapes: layer path -> (n, k) of every linear of a block.
    """
    method, bits, act_bits, mixed = re.fullmatch(METHODS, name).groups()
    assert set(rules) == set(shapes)
    for layer, rule in rules.items():
        if "adaLN_modulation" in layer or "mod/lin" in layer or "modulation/lin" in layer:
            assert (rule.weights.format, rule.weights.granularity) == (f"int{bits}", 128)
            assert rule.act_bits is rule.balance is rule.rotation is None
            continue
        more = mixed and ("/0/" in layer or "mlp" in layer)
        assert rule.weights.format == ("int8" if more else f"int{bits}")
        assert rule.act_bits == int(act_bits)
        assert rule.act_static == (method == "naive")
        assert (rule.balance is not None) == (method in ("viditq", "viditq-v1", "smoothquant"))
        assert (rule.rotation is not None) == (method in ("viditq", "quarot"))
        assert rule.weights.granularity == (128 if method == "qdit" else "channel")
        if rule.rotation is not None:
            rotation_size(shapes[layer][1], rule.rotation, layer)  # raises if it cannot be
