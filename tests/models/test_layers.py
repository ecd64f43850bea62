"""Layers against torch and diffusers; stacks of layers cut into segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import layers
from lowbit_jax.models.layers import BlockStack, Linear, RMSNorm
from lowbit_jax.quant.qtensor import QTensor
from pallas_kernels.formats import FORMATS, pack_codes


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("dim", (256, 64))
def test_timestep_embedding_equals_diffusers(dim):
    """Frequencies are rounded to float32 on both sides, by other means: 6e-7 of the angle."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import torch
    from diffusers.models.embeddings import Timesteps

    t = np.array([0.0, 1e-3, 0.05, 0.3, 0.999, 1.0, 3.5], np.float32)
    reference = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = reference(torch.tensor(1000 * t)).numpy()
    out = np.asarray(layers.timestep_embedding(jnp.asarray(t), dim))
    assert out.dtype == np.float32
    assert (np.abs(out - expected) <= 1e-6 + 6e-7 * 1000 * t[:, None]).all()


def test_rms_norm_equals_torch():
    """1e-6 relative: one mean and one division. Tiny rows show the eps, 1e-6."""
    torch = pytest.importorskip("torch", reason="the reference is torch")
    x = normal(2, 5, 16) * np.logspace(-4, 4, 5, dtype=np.float32)[:, None]
    scale = normal(16, seed=4)
    reference = torch.nn.functional.rms_norm
    expected = reference(torch.tensor(x), (16,), torch.tensor(scale), eps=1e-6).numpy()
    out = RMSNorm().apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)
    low = RMSNorm(jnp.bfloat16).apply({"params": {"scale": scale}}, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


def test_layer_norm_equals_torch():
    """2e-5: centred values lose a digit where the mean is ten times the deviation or more."""
    torch = pytest.importorskip("torch", reason="the reference is torch")
    x = normal(2, 5, 16) * np.logspace(-4, 4, 5, dtype=np.float32)[:, None]
    x[1] += 10 * np.abs(x[1]).max(axis=-1, keepdims=True)
    for eps in (1e-6, 1e-2):
        expected = torch.nn.functional.layer_norm(torch.tensor(x).double(), (16,), eps=eps).numpy()
        np.testing.assert_allclose(layers.layer_norm(x, eps), expected, rtol=0, atol=2e-5)
    assert layers.layer_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_modulate_shifts_and_scales_each_entry_of_the_batch():
    torch = pytest.importorskip("torch", reason="the reference is torch")
    x, shift, scale = normal(2, 5, 16), normal(2, 16, seed=1), normal(2, 16, seed=2)
    norm = torch.nn.functional.layer_norm(torch.tensor(x), (16,), eps=1e-6).numpy()
    expected = norm * (1 + scale[:, None]) + shift[:, None]
    np.testing.assert_allclose(layers.modulate(x, shift, scale), expected, atol=2e-6)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Linear(3, name="second")(Linear(5, name="first")(x))


def test_linear_with_a_kernel_that_does_not_fit_names_path_and_shapes():
    params = {"first": linear_params(4, 5), "second": linear_params(4, 3)}
    message = r"second/kernel: stored shape \(4, 3\), the layer needs \(5, 3\)"
    with pytest.raises(ValueError, match=message):
        Pair().apply({"params": params}, normal(2, 4))
    params["second"]["kernel"] = quantized("int8", 3, 4)
    with pytest.raises(ValueError, match=message):
        Pair().apply({"params": params}, normal(2, 4))
    params["second"] = linear_params(5, 3) | {"bias": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=r"second/bias: stored shape \(2,\), .* needs \(3,\)"):
        Pair().apply({"params": params}, normal(2, 4))


def linear_params(k, n):
    return {"kernel": normal(k, n), "bias": normal(n, seed=5)}


def quantized(format, n, k, layers=(), seed=0):
    spec = FORMATS[format]
    rng = np.random.default_rng(seed)
    codes = rng.integers(spec.low, spec.high, (*layers, n, k), np.int8, endpoint=True)
    scale = rng.uniform(0.5, 1.5, (*layers, n, 1)).astype(np.float32) / spec.high / 2
    return QTensor(pack_codes(jnp.asarray(codes), format), scale, None, format, (n, k), k)


class Step(nn.Module):
    """A block whose order matters: no two of its layers commute."""

    @nn.compact
    def __call__(self, x, gain):
        return (x + gain * nn.silu(Linear(6, name="lin")(x)),)


def stack(length):
    return BlockStack(lambda layer: Step(parent=None), length)


def float_layers(length, seed=0):
    return {"lin": {"kernel": normal(length, 6, 6, seed=seed), "bias": normal(length, 6, seed=9)}}


def unrolled(segments, x, gain):
    """Layer by layer, segments in order of their numbers; plain Python."""
    for first in sorted(segments, key=int):
        for i in range(segments[first]["lin"]["bias"].shape[0]):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], segments[first])
            (x,) = Step().apply({"params": layer}, x, gain)
    return x


def test_segments_of_any_format_run_in_order_of_layers():
    """Keys sort as numbers ('10' after '2'); 1e-6 for the other fusion of the same products."""
    segments = {"0": float_layers(2), "2": {"lin": {"bias": normal(8, 6, seed=1)}}}
    segments["2"]["lin"]["kernel"] = quantized("ternary", 6, 6, (8,))
    segments["10"] = {"lin": {"kernel": quantized("int8", 6, 6, (1,)), "bias": normal(1, 6)}}
    segments["11"] = {"lin": {"kernel": quantized("int4", 6, 6, (2,)), "bias": normal(2, 6)}}
    x, gain = normal(3, 6), np.float32(0.7)
    (out,) = stack(13).apply({"params": segments}, (x,), gain)
    np.testing.assert_allclose(out, unrolled(segments, x, gain), rtol=1e-6, atol=1e-6)


class Kind(nn.Module):
    """A block of one of two kinds, whose parameters differ."""

    bent: bool

    @nn.compact
    def __call__(self, x):
        x = x + Linear(6, name="lin")(x)
        return (Linear(6, name="bend")(nn.silu(x)) if self.bent else x,)


def kinds(bent):
    return BlockStack(lambda i: Kind(bent[i], parent=None), len(bent), name="blocks")


def test_layers_of_two_kinds_are_segments_of_their_own():
    """A tree of its kind for each layer; 1e-6 for the other fusion of the same products."""
    bent = [False, False, True, True, True, False]
    x = normal(3, 6)
    params = kinds(bent).init(jax.random.key(0), (x,))["params"]
    assert {first: sorted(tree) for first, tree in params.items()} == {
        "0": ["lin"], "2": ["bend", "lin"], "5": ["lin"],
    }  # fmt: skip
    assert [tree["lin"]["kernel"].shape[0] for tree in params.values()] == [2, 3, 1]
    (out,) = kinds(bent).apply({"params": params}, (x,))
    for first, length in (("0", 2), ("2", 3), ("5", 1)):
        for i in range(length):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params[first])
            (x,) = Kind(bent[int(first)]).apply({"params": layer}, x)
    np.testing.assert_allclose(out, x, rtol=1e-6, atol=1e-6)


def test_a_segment_of_two_kinds_is_refused():
    """Kinds may differ in how they compute alone: the tree of a segment cannot show it."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return kinds([False, False, False, True])((x,))

    params = {"blocks": {"0": float_layers(1), "1": float_layers(3)}}
    with pytest.raises(ValueError, match="'1' holds layers 1 to 3, but layer 3 is of another kind"):
        Model().apply({"params": params}, normal(3, 6))


def test_a_stack_initialises_every_layer_differently():
    params = stack(4).init(jax.random.key(0), (normal(3, 6),), 0.5)["params"]
    assert list(params) == ["0"]
    kernel = params["0"]["lin"]["kernel"]
    assert (kernel.shape, params["0"]["lin"]["bias"].shape) == ((4, 6, 6), (4, 6))
    assert len(np.unique(kernel)) == kernel.size


@pytest.mark.parametrize(
    ("segments", "length", "message"),
    [
        ({"0": 2, "3": 1}, 4, "blocks: segment '3' stands where layer 2 begins"),
        ({"0": 2, "1": 2}, 4, "blocks: segment '1' stands where layer 2 begins"),
        ({"1": 2}, 2, "blocks: segment '1' stands where layer 0 begins"),
        ({"0": 2, "2": 1}, 4, "blocks: parameters hold 3 layers, the model has 4"),
        ({"0": 5}, 4, "blocks: parameters hold 5 layers, the model has 4"),
    ],
)
def test_segments_that_do_not_add_up_are_named(segments, length, message):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BlockStack(lambda layer: Step(parent=None), length, name="blocks")((x,), 1.0)

    params = {"blocks": {first: float_layers(count) for first, count in segments.items()}}
    with pytest.raises(ValueError, match=message):
        Model().apply({"params": params}, normal(3, 6))
