"""CLIP's text encoder against transformers', in float32 and bfloat16."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models import clip_text
from lowbit_jax.models.clip_text import CLIP_L, LEGACY_EOS, ClipTextConfig, ClipTextEncoder
from lowbit_jax.quant import RECIPES, quantize
from lowbit_jax.quant.stacks import layer_paths

transformers = pytest.importorskip("transformers", reason="the reference is transformers")
from tests.references import text_encoders as reference  # noqa: E402

TINY = reference.TINY_CLIP
TOKENS = TINY.max_position_embeddings
END = TINY.vocab_size - 1


def both(config, ids):
    model = reference.transformers_clip(config)
    params = reference.clip_params(model, config)
    found = jax.jit(ClipTextEncoder(config).apply)({"params": params}, ids)
    return found, reference.run_clip(model, ids)


def relative(found, expected):
    return np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [END, LEGACY_EOS], ids=["eos", "legacy"])
def test_equals_transformers(end, act):
    """Texts of several lengths, one of them with a second end-of-text token as padding."""
    config = replace(TINY, eos_token_id=end, hidden_act=act)
    ids = reference.texts(config, (TOKENS, 2, 9), TOKENS, end=END, pad=1)
    ids[1, 2:] = END
    found, expected = both(config, ids)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_the_state_at_the_first_end_of_text_is_taken():
    """By the rule in words, not through the network."""
    ids = jnp.array([[7, 9, 5, 9, 9], [9, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    assert clip_text.end_of_text(ids, 9).tolist() == [1, 0, 0]  # none: the first
    assert clip_text.end_of_text(ids, LEGACY_EOS).tolist() == [1, 0, 4]  # the largest


def test_what_follows_the_end_of_text_has_no_influence():
    ids = reference.texts(TINY, (5, 11), TOKENS, end=END, pad=1)
    other = np.where(np.arange(TOKENS) < np.array([[5], [11]]), ids, 17)
    params = reference.clip_params(reference.transformers_clip(TINY), TINY)
    apply = jax.jit(ClipTextEncoder(TINY).apply)
    pooled = [apply({"params": params}, x)[1] for x in (ids, other)]
    np.testing.assert_array_equal(*pooled)


@pytest.mark.slow
def test_equals_transformers_at_full_size():
    """CLIP ViT-L/14's, all 12 layers."""
    ids = reference.texts(CLIP_L, (77, 9), 77, end=49407, pad=49407)
    found, expected = both(CLIP_L, ids)
    assert found[1].shape == (2, 768)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_bfloat16_is_no_coarser_than_transformers():
    import torch

    ids = reference.texts(TINY, (TOKENS, 2, 9), TOKENS, end=END, pad=1)
    model = reference.transformers_clip(TINY)
    exact = reference.run_clip(model, ids)[0]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16), reference.clip_params(model, TINY)
    )
    found, pooled = jax.jit(ClipTextEncoder(TINY, jnp.bfloat16).apply)({"params": params}, ids)
    assert found.dtype == pooled.dtype == jnp.bfloat16
    theirs = reference.run_clip(model.to(torch.bfloat16), ids)[0]
    rms = lambda x: float(np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)))  # noqa: E731
    assert 0 < rms(found) < 1.2 * rms(theirs)


def test_the_published_number_of_parameters():
    """Counted by transformers' own class of the same sizes, without memory."""
    import torch

    with torch.device("meta"):
        theirs = transformers.CLIPTextModel(reference.clip_config(CLIP_L))
    count = sum(leaf.size for leaf in jax.tree.leaves(clip_text.abstract_params(CLIP_L)))
    assert count == 123_060_480 == sum(p.numel() for p in theirs.parameters())


def test_every_linear_is_quantised_and_near_the_float_encoder():
    ids = reference.texts(TINY, (TOKENS, 2, 9), TOKENS, end=END, pad=1)
    model = reference.transformers_clip(TINY)
    params = jax.tree.map(jnp.asarray, reference.clip_params(model, TINY))
    assert all(RECIPES["w8a16"].assign(layer_paths(params)).values())
    low = jax.jit(partial(quantize, recipe=RECIPES["w8a16"]))(params)
    found = jax.jit(ClipTextEncoder(TINY).apply)({"params": low}, ids)[1]
    assert 0 < relative(found, reference.run_clip(model, ids)[1]) < 0.03


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size 768 is not a multiple of .* 7"):
        ClipTextConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match="hidden_act 'relu' is none of quick_gelu, gelu"):
        ClipTextConfig(hidden_act="relu")
    with pytest.raises(ValueError, match="22 tokens, but this CLIP has 21 positions"):
        ClipTextEncoder(TINY).init(jax.random.key(0), jnp.zeros((1, 22), jnp.int32))
