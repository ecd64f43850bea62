"""The T5 encoder against transformers', in float32 and bfloat16."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models import t5
from lowbit_jax.models.t5 import T5_XXL, T5Config, T5Encoder
from lowbit_jax.quant import RECIPES, quantize
from lowbit_jax.quant.stacks import layer_paths

transformers = pytest.importorskip("transformers", reason="the reference is transformers")
from tests.references import text_encoders as reference  # noqa: E402

TINY = reference.TINY_T5
LENGTHS, TOKENS = (30, 3, 17), 30  # beyond the reach of the buckets


@pytest.fixture(scope="module")
def model():
    return reference.transformers_t5(TINY)


def relative(found, expected):
    return np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max()


def test_equals_transformers_with_and_without_a_mask(model):
    """Padding is attended to where there is no mask, as FLUX.1 has it."""
    ids = reference.texts(TINY, LENGTHS, TOKENS, end=1, pad=0)
    params = reference.t5_params(model, TINY)
    apply = jax.jit(T5Encoder(TINY).apply)
    expected = reference.run_t5(model, ids)
    assert relative(apply({"params": params}, ids), expected) < 1e-5
    mask = np.arange(TOKENS) < np.array(LENGTHS)[:, None]
    masked = reference.run_t5(model, ids, mask)
    found = np.asarray(apply({"params": params}, ids, mask))
    assert relative(found[mask], masked[mask]) < 1e-5
    assert relative(masked[mask], expected[mask]) > 0.05


def test_every_bucket_is_that_of_transformers():
    """Published buckets and odd ones, up to distances beyond their reach."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, reach, tokens in ((32, 128, 400), (8, 12, 40), (4, 3, 9), (64, 500, 600)):
        positions = torch.arange(tokens)
        theirs = T5Attention._relative_position_bucket(
            positions[None] - positions[:, None], True, buckets, reach
        )
        found = t5.relative_buckets(tokens, buckets, reach)
        np.testing.assert_array_equal(found, theirs.numpy())
        assert found.max() == buckets - 1


@pytest.mark.slow
def test_equals_transformers_at_the_width_of_xxl():
    """One block of T5-XXL with a short vocabulary: 0.8 GB."""
    config = replace(T5_XXL, num_layers=1, vocab_size=64)
    model = reference.transformers_t5(config)
    ids = reference.texts(config, (40, 9), 40, end=1, pad=0)
    expected = reference.run_t5(model, ids)
    params = reference.t5_params(model, config)
    found = jax.jit(T5Encoder(config).apply)({"params": params}, ids)
    assert found.shape == (2, 40, 4096)
    assert relative(found, expected) < 1e-4


def test_bfloat16_is_no_coarser_than_transformers(model):
    import torch

    ids = reference.texts(TINY, LENGTHS, TOKENS, end=1, pad=0)
    exact = reference.run_t5(model, ids)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16), reference.t5_params(model, TINY)
    )
    found = jax.jit(T5Encoder(TINY, jnp.bfloat16).apply)({"params": params}, ids)
    assert found.dtype == jnp.bfloat16
    theirs = reference.run_t5(reference.transformers_t5(TINY).to(torch.bfloat16), ids)
    rms = lambda x: float(np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)))  # noqa: E731
    assert 0 < rms(found) < 1.2 * rms(theirs)


def test_the_published_number_of_parameters():
    """Counted by transformers' own class of the same sizes, without memory."""
    import torch

    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(reference.t5_config(T5_XXL))
    count = sum(leaf.size for leaf in jax.tree.leaves(t5.abstract_params(T5_XXL)))
    assert count == 4_762_310_656 == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "w8a8", "flux-1.58bit"])
def test_no_linear_is_left_out_by_a_recipe(recipe):
    """All seven of all 24 blocks; there is no other, the embeddings are tables."""
    layers = layer_paths(t5.abstract_params(T5_XXL))
    names = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
    assert sorted(layers) == sorted(f"blocks/{i}/{name}" for i in range(24) for name in names)
    assert all(RECIPES[recipe].assign(layers).values())


@pytest.mark.parametrize(("recipe", "bound"), [("w8a16", 0.03), ("w4a16", 0.5)])
def test_quantised_is_near_the_float_encoder(model, recipe, bound):
    """Of random weights, where every error goes through: 8 bits leave 1 %, 4 bits a third."""
    ids = reference.texts(TINY, LENGTHS, TOKENS, end=1, pad=0)
    params = jax.tree.map(jnp.asarray, reference.t5_params(model, TINY))
    low = jax.jit(partial(quantize, recipe=RECIPES[recipe]))(params)
    found = jax.jit(T5Encoder(TINY).apply)({"params": low}, ids)
    assert 0 < relative(found, reference.run_t5(model, ids)) < bound


def test_the_program_does_not_grow_with_depth():
    def lines(depth):
        config = replace(TINY, num_layers=depth)
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        params = {"params": t5.abstract_params(config)}
        text = jax.jit(T5Encoder(config).apply).lower(params, ids).as_text()
        return len(text.splitlines())

    assert lines(2) == lines(12)


@pytest.mark.parametrize(
    "sizes",
    [{"relative_attention_num_buckets": 6}, {"relative_attention_max_distance": 8}],
)
def test_buckets_that_do_not_work_are_refused(sizes):
    with pytest.raises(ValueError, match="relative_attention_num_buckets"):
        T5Config(**sizes)
