"""Attention and rotary positions against torch and diffusers; memory; a form for each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models import attention


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def heads(t, s, b=2, h=3, d=8):
    return normal(b, t, h, d, seed=1), normal(b, s, h, d, seed=2), normal(b, s, h, d, seed=3)


def torch_attention(*qkv, mask=None):
    torch = pytest.importorskip("torch", reason="the reference is torch")
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in qkv)
    mask = None if mask is None else torch.tensor(mask)[:, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask).transpose(1, 2).numpy()


@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 9), (37, 37), (37, 5), (64, 64)])
def test_attention_equals_torch(t, s):
    """1e-6: weighted means of numbers near 1, in float32."""
    qkv = heads(t, s)
    np.testing.assert_allclose(attention.attention(*qkv), torch_attention(*qkv), atol=1e-6)


@pytest.mark.parametrize("chunk", (0.5, 1, 2, 5, 12, 13, 36, 37, 38))
def test_chunked_attention_equals_torch_at_every_boundary(monkeypatch, chunk):
    """Chunks of one row, that divide 37 rows or do not, of all but one row, of all rows."""
    qkv = heads(37, 11)
    row_bytes = 4 * 2 * 3 * 11
    monkeypatch.setattr(attention, "MAX_SCORE_BYTES", int(chunk * row_bytes))
    attend = jax.jit(lambda *qkv: attention._chunked_attention(*qkv))  # traced anew for each size
    assert ("scan" in str(jax.make_jaxpr(attend)(*qkv))) == (chunk < 37)
    out = attend(*qkv)
    np.testing.assert_allclose(out, torch_attention(*qkv), atol=1e-6)


@pytest.mark.parametrize("chunk", (5, 37))
def test_masked_attention_equals_torch_and_does_not_see_what_is_masked(monkeypatch, chunk):
    """Whole and in chunks; keys masked at the end, in the middle, all but one."""
    q, k, v = heads(37, 11, b=3)
    mask = np.ones((3, 11), bool)
    mask[0, 7:], mask[1, 2:5], mask[2, :10] = False, False, False
    monkeypatch.setattr(attention, "MAX_SCORE_BYTES", chunk * 4 * 3 * 3 * 11)
    out = np.asarray(attention.attention(q, k, v, mask))
    np.testing.assert_allclose(out, torch_attention(q, k, v, mask=mask), atol=1e-6)
    other = [np.where(mask[..., None, None], x, 1e4) for x in (k, v)]
    np.testing.assert_array_equal(attention.attention(q, *other, mask), out)


def test_attention_of_a_flux_picture_never_holds_all_scores():
    """1024 x 1024 pixels and 512 text tokens: float32 scores would take 24 * 4608**2 * 4 = 2 GB."""
    qkv = [jax.ShapeDtypeStruct((1, 4608, 24, 128), jnp.bfloat16)] * 3
    memory = jax.jit(attention.attention).lower(*qkv).compile().memory_analysis()
    everything = 24 * 4608**2 * 4
    # two or three copies of a chunk and of q, k, v in another layout or dtype
    assert memory.temp_size_in_bytes < everything / 4


def lowered(platform, shape=(1, 64, 2, 72), dtype=jnp.bfloat16):
    qkv = [jax.ShapeDtypeStruct(shape, dtype)] * 3
    # jit keeps a trace of the function it is given, and what it may hold changes from test to test
    attend = jax.jit(lambda q, k, v: attention.attention(q, k, v))
    return attend.trace(*qkv).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_a_program_is_lowered_for_chooses_its_attention(monkeypatch):
    """Not the platform it is traced on. The fused form is stood in for by a sine."""
    monkeypatch.setattr(attention, "_fused_attention", lambda q, k, v: jnp.sin(q))
    monkeypatch.setattr(attention, "cudnn_is_known", lambda: True)
    assert "sine" in lowered("cuda") and "dot_general" not in lowered("cuda")
    assert "sine" not in lowered("cpu") and "dot_general" in lowered("cpu")
    qkv = heads(37, 5)
    np.testing.assert_allclose(attention.attention(*qkv), torch_attention(*qkv), atol=1e-6)
    assert "sine" not in lowered("cuda", (1, 64, 2, 136))  # cuDNN's limits: 128, multiples of 8
    assert "sine" not in lowered("cuda", (1, 64, 2, 12))
    assert "sine" not in lowered("cuda", dtype=jnp.float32)
    monkeypatch.setattr(attention, "cudnn_is_known", lambda: False)
    assert "sine" not in lowered("cuda")


def test_gradients_pass_through_the_choice(monkeypatch):
    """On the platform at hand those of the chunked form, to the bit."""
    monkeypatch.setattr(attention, "_fused_attention", lambda q, k, v: jnp.sin(q))
    monkeypatch.setattr(attention, "cudnn_is_known", lambda: True)
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in heads(16, 8)]

    def gradients(attend):
        loss = lambda qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(qkv)

    expected = gradients(attention._chunked_attention)
    for got, want in zip(gradients(attention.attention), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_program_lowered_for_cuda_on_a_cpu_holds_cudnn():
    """Head dims of FLUX and of DiT-XL and PixArt; an odd number of tokens."""
    if not attention.cudnn_is_known():
        pytest.skip("jax finds no cuDNN (install jax-cuda12-plugin and nvidia-cudnn-cu12)")
    for shape in [(1, 4608, 24, 128), (2, 1023, 16, 72)]:
        assert "__cudnn$fmhaSoftmax" in lowered("cuda", shape)
        assert "__cudnn" not in lowered("cpu", shape)


@pytest.mark.parametrize("axes", [(16, 56, 56), (8, 12, 12), (4, 4, 8)])
def test_rotary_equals_diffusers(axes):
    """Positions of text, then of a 3 x 70 picture; angles up to 69 in float32."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import torch
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = np.array([(0, 0, 0)] * 5 + [(0, y, x) for y in range(3) for x in range(70)], np.float32)
    ids[:, 0] = np.arange(len(ids)) % 7  # FLUX leaves this axis at 0, which would hide it
    x = normal(2, len(ids), 3, sum(axes))
    tables = FluxPosEmbed(theta=10000, axes_dim=list(axes))(torch.tensor(ids))
    expected = apply_rotary_emb(torch.tensor(x), tables, sequence_dim=1).numpy()
    out = attention.apply_rotary(jnp.asarray(x), attention.rotary_angles(ids, axes))
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(  # a rotation: lengths stay
        np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


def test_rotary_axes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"ids have 2 axes, axes_dim \(4, 4, 8\)"):
        attention.rotary_angles(np.zeros((3, 2)), (4, 4, 8))
