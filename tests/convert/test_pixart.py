"""PixArt files in diffusers' layout and the original: tree, config, export, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import pixart
from convert.checkpoint_files import open_checkpoint
from convert.job import plan, run
from convert.table import expand
from lowbit_jax.checkpoint import assemble, iter_parts
from lowbit_jax.models.pixart import (
    PIXART_ALPHA_512,
    PIXART_ALPHA_1024_MS,
    PIXART_SIGMA_1024_MS,
    PixArtTransformer,
    abstract_params,
)
from lowbit_jax.quant.recipe import RECIPES
from tests.references.pixart_files import (
    TINY,
    diffusers_shapes,
)

TOLERANCE = 5e-5  # see tests/models/test_pixart.py


def ported(path, recipe="float", dtype=jnp.float32):
    """(job, tree) of a checkpoint, converted leaf by leaf."""
    parts = []
    with open_checkpoint(path) as checkpoint:
        job = plan(checkpoint, RECIPES[recipe], dtype=dtype)
        run(job, lambda name, part: parts.append((name, part)))
    return job, assemble(parts)


def assert_same(found, expected):
    """Equal in structure, static fields, dtypes, shapes and every bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def reference():
    """The module with diffusers' side and the original's."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import tests.references.pixart as reference

    return reference


def test_what_diffusers_saves_gives_its_tree_and_its_output(tmp_path, reference):
    theirs = reference.random_diffusers(TINY)
    theirs.save_pretrained(tmp_path / "file")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    job, params = ported(tmp_path / "file")
    assert (job.model, job.layout.name, job.config) == ("pixart", "diffusers", TINY)
    assert_same(ported(tmp_path / "shards")[1], params)
    state = reference.original_names(theirs.state_dict(), TINY)  # by a mapping of its own
    assert_same(params, jax.tree.map(jnp.asarray, reference.pixart_params(state, TINY)))
    inputs = reference.pixart_inputs(TINY, grid=(3, 5))
    out = jax.jit(PixArtTransformer(TINY).apply)({"params": params}, **inputs)
    exact = reference.run_diffusers(theirs, inputs)
    assert np.abs(out - exact).max() < TOLERANCE * np.abs(exact).max()


PUBLISHED = [PIXART_ALPHA_512, PIXART_ALPHA_1024_MS, PIXART_SIGMA_1024_MS]


@pytest.mark.parametrize("config", [*PUBLISHED, TINY], ids=["512", "1024", "sigma", "tiny"])
def test_the_table_names_the_published_tensors_with_their_shapes(config, reference):
    import torch

    found = [i for leaf in leaves(pixart.DIFFUSERS, config) for i in leaf.source_shapes().items()]
    with torch.device("meta"):
        theirs = reference.diffusers_model(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(found) == len(expected) == 15 + 8 * config.micro_conditions + 21 * config.depth
    assert dict(found) == expected == diffusers_shapes(config)


def leaves(layout, config):
    """A layout's table, written out for a model."""
    parts = iter_parts(abstract_params(config))
    paths = {part: {p: leaf.shape for p, leaf in leaves.items()} for part, leaves in parts}
    return expand(layout, config, paths)
