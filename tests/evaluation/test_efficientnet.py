"""EfficientNet-Lite0 against a torch network written from the published model's code."""

import jax
import numpy as np
import pytest

from convert.efficientnet import DISTRIBUTION, load_efficientnet, model_file
from convert.errors import CheckpointError
from lowbit_jax.evaluation.efficientnet import features, resize, shapes

torch = pytest.importorskip("torch")


def state_dict(seed=0):
    """Random tensors under the published names, written out from the publication."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, out, inner, side):
        bound = (2 / (inner * side * side)) ** 0.5
        state[f"{name}.weight"] = bound * torch.randn(out, inner, side, side, generator=generator)

    def norm(name, size):
        state[f"{name}.weight"] = 0.5 + torch.rand(size, generator=generator)
        state[f"{name}.bias"] = torch.rand(size, generator=generator) - 0.2
        state[f"{name}.running_mean"] = 0.1 * torch.randn(size, generator=generator)
        state[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    width, number = 32, 0
    # kernel, stride, expansion, channels, blocks: table 1 of the EfficientNet paper
    for kernel, _, expand, channels, repeats in (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    ):
        for _ in range(repeats):
            p, inner = f"_blocks.{number}", width * expand
            if expand > 1:
                conv(f"{p}._expand_conv", inner, width, 1)
                norm(f"{p}._bn0", inner)
            conv(f"{p}._depthwise_conv", inner, 1, kernel)
            norm(f"{p}._bn1", inner)
            conv(f"{p}._project_conv", channels, inner, 1)
            norm(f"{p}._bn2", channels)
            width, number = channels, number + 1
    conv("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=generator) / 36
    state["_fc.bias"] = torch.randn(1000, generator=generator)
    return state


def run_torch(state, pictures):
    """(pooled, logits) of pictures [b, 3, y, x] in [0, 1], with torch's own operations."""
    nn = torch.nn.functional

    def conv(x, name, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        side = weight.shape[-1]
        pads = []
        for size in reversed(x.shape[2:]):  # TensorFlow's SAME
            total = max((-(-size // stride) - 1) * stride + side - size, 0)
            pads += [total // 2, total - total // 2]
        return nn.conv2d(nn.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x, name):
        parts = (state[f"{name}.{end}"] for end in ("running_mean", "running_var"))
        affine = state[f"{name}.weight"], state[f"{name}.bias"]
        return nn.batch_norm(x, *parts, *affine, eps=1e-3)

    x = nn.relu6(norm(conv((255 * pictures - 127) / 128, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        p, before = f"_blocks.{number}", x
        if f"{p}._expand_conv.weight" in state:
            x = nn.relu6(norm(conv(x, f"{p}._expand_conv"), f"{p}._bn0"))
        x = nn.relu6(norm(conv(x, f"{p}._depthwise_conv", stride, x.shape[1]), f"{p}._bn1"))
        x = norm(conv(x, f"{p}._project_conv"), f"{p}._bn2")
        if x.shape == before.shape:
            x = x + before
    x = nn.relu6(norm(conv(x, "_conv_head"), "_bn1"))
    pooled = x.mean(dim=(2, 3))
    return pooled.numpy(), nn.linear(pooled, state["_fc.weight"], state["_fc.bias"]).numpy()


@pytest.mark.parametrize("size", [(64, 64), (37, 50)])
def test_equals_torch(tmp_path, size):
    """From a file of torch.save's legacy format, as published; 1e-4 of the largest number."""
    state = state_dict()
    path = tmp_path / "net.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    params = load_efficientnet(path)
    pictures = np.random.default_rng(0).random((2, *size, 3)).astype(np.float32)
    found = jax.jit(features)(params, pictures)
    pooled, logits = run_torch(state, torch.from_numpy(pictures.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-4 * np.abs(pooled).max())
    np.testing.assert_allclose(found.logits, logits, atol=1e-4 * np.abs(logits).max())


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    state = state_dict()
    del state["_blocks.3._project_conv.weight"]
    state["_fc.weight"] = torch.zeros(10, 1280)
    state["extra"] = torch.zeros(3)
    path = tmp_path / "net.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as error:
        load_efficientnet(path)
    text = str(error.value)
    assert "missing tensor '_blocks.3._project_conv.weight' of block3/project" in text
    assert "'_fc.weight' gives classifier (1280, 10), needed (1280, 1000)" in text
    assert "unknown tensor 'extra'" in text


def test_the_published_weights_are_read_and_know_a_colour():
    """The package, where installed: all 4,694,024 numbers; noise and a plain picture differ."""
    try:
        model_file()
    except FileNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    params = load_efficientnet()
    assert sum(int(np.prod(shape)) for shape in shapes().values()) == 4_694_024
    noise = np.random.default_rng(0).random((1, 96, 96, 3)).astype(np.float32)
    found = jax.jit(features)(params, resize(np.concatenate([noise, np.full_like(noise, 0.5)]), 96))
    assert np.isfinite(found.logits).all()
    assert found.logits[0].argmax() != found.logits[1].argmax()
