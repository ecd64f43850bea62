"""Inputs of real layers belong to their kernels; pictures are prepared as published."""

import importlib.metadata
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf, softmax

from benchmarks import photographs, picture_layers, text_layers
from benchmarks.real_layers import Subject, spread
from benchmarks.viditq_layers import measure, outliers_table, rule_of, table
from convert import minilm
from convert.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "The inputs of every linear are kept, and each product is compared with the float one."


@pytest.fixture(scope="module")
def vit():
    """The network, its inputs for one photograph, and the tensors after each linear."""
    pytest.importorskip("onnx")
    try:
        network = picture_layers.Network(picture_layers.model_file())
        pictures = next(photographs.batches(["coffee.png"]))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ys = {layer: site.y for layer, site in network.sites.items()}
    found = network.tensors([*ys.values(), *(site.x for site in network.sites.values())], pictures)
    rows = {layer: np.float64(found[site.x][0]) for layer, site in network.sites.items()}
    return network, rows, {layer: np.float64(found[name][0]) for layer, name in ys.items()}


def weights_of(network):
    """layer path -> kernel and bias in float64."""
    return {
        layer: (np.float64(network.weights[site.kernel]), np.float64(network.weights[site.bias]))
        for layer, site in network.sites.items()
    }


def far(got, exact):
    """Largest distance, as a share of the largest value."""
    return np.abs(got - exact).max() / np.abs(exact).max()


def check_blocks(rows, weights, heads, depth):
    """Softmax attention and GELU in float64 lead from each captured input to the next one.

    A query that is a key, a kernel of another block or an input of another linear would not. The
    graphs compute in float32; 1e-4 leaves room for their sums.
    """

    def product(block, name):
        kernel, bias = weights[f"blocks/{block}/{name}"]
        return rows[f"blocks/{block}/{name}"] @ kernel + bias

    def split(x):
        return x.reshape(len(x), heads, -1).swapaxes(0, 1)

    for block in range(depth):
        q, k, v = (split(product(block, name)) for name in ("query", "key", "value"))
        scores = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), axis=-1)
        mixed = (scores @ v).swapaxes(0, 1).reshape(q.shape[1], -1)
        assert far(rows[f"blocks/{block}/proj"], mixed) < 1e-4
        hidden = product(block, "mlp_in")
        gelu = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        assert far(rows[f"blocks/{block}/mlp_out"], gelu) < 1e-4


def test_every_kernel_of_the_vision_transformer_makes_the_graphs_next_tensor(vit):
    network, rows, ys = vit
    assert len({site.kernel for site in network.sites.values()}) == len(rows) == 12 * 6
    for layer, (kernel, bias) in weights_of(network).items():
        assert far(rows[layer] @ kernel + bias, ys[layer]) < 1e-5, layer


def test_blocks_of_the_vision_transformer_by_hand(vit):
    network, rows, _ = vit
    check_blocks(rows, weights_of(network), heads=6, depth=12)


def test_blocks_of_minilm_by_hand():
    try:
        encode = minilm.load_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rows = {k: np.float64(x) for k, x in text_layers.inputs(encode, [SENTENCE]).items()}
    stack = jax.tree.map(np.float64, encode.params["blocks"]["0"])
    weights = {
        layer: (stack[name]["kernel"][int(block)], stack[name]["bias"][int(block)])
        for layer, (_, block, name) in ((layer, layer.split("/")) for layer in rows)
    }
    check_blocks(rows, weights, heads=encode.config.num_heads, depth=encode.config.num_layers)


def test_rows_of_all_pictures_follow_each_other():
    """A graph whose tensor "a" is the picture's own rows, and "b" twice as much."""
    network = object.__new__(picture_layers.Network)
    network.sites = {
        "blocks/0/query": picture_layers.Site("a", "w0", "b0", "y0"),
        "blocks/0/key": picture_layers.Site("a", "w1", "b1", "y1"),
        "blocks/0/proj": picture_layers.Site("b", "w2", "b2", "y2"),
    }
    network.tensors = lambda names, x: {n: {"a": x, "b": 2 * x}[n] for n in names}
    pictures = np.arange(24.0).reshape(2, 1, 3, 4)
    found = network.inputs(pictures)
    for layer, times in (("query", 1), ("key", 1), ("proj", 2)):
        assert np.array_equal(found[f"blocks/0/{layer}"], times * pictures.reshape(6, 4))


def node(kind, inputs, output):
    return SimpleNamespace(op_type=kind, input=inputs, output=[output])


def test_a_product_that_is_no_blocks_linear_is_refused_by_name():
    bias = "backbone.encoder.layer.0.mlp.fc1.bias"
    nodes = [
        node("MatMul", ["a", "q"], "aq"),  # of two activations: no linear
        node("MatMul", ["x", "w1"], "xw1"),
        node("Add", [bias, "xw1"], "y1"),
        node("MatMul", ["y1", "w2"], "y1w2"),
        node("Add", ["head.bias", "y1w2"], "y2"),
    ]
    weights = dict.fromkeys(("w1", "w2", bias, "head.bias"), np.zeros(1))
    with pytest.raises(CheckpointError) as error:
        picture_layers.find_sites(nodes, weights, Path("net.onnx"))
    text = str(error.value)
    assert "w2: head.bias is added, no block's" in text
    assert "blocks/0/query: not there" in text and "blocks/0/mlp_in" not in text


def test_pixels_are_averaged_padded_and_normalised():
    """A picture of 448 x 224: means of 2 x 2 pixels, 56 black rows above and below."""
    colours = np.random.default_rng(0).integers(0, 256, (224, 448, 3), dtype=np.uint8)
    found = photographs.pixels(Image.fromarray(colours))
    small = colours.reshape(112, 2, 224, 2, 3).mean(axis=(1, 3))
    padded = np.pad(small, ((56, 56), (0, 0), (0, 0))) / 255
    exact = (padded - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.shape == (3, 224, 224)
    # Pillow rounds to whole levels after each of its two passes.
    assert np.abs(found - exact.transpose(2, 0, 1)).max() < 1.01 / 255 / 0.224
    assert [view.size for view in photographs.views(Image.fromarray(colours))][1:] == [
        (168, 168)
    ] * 3


def test_photographs_that_judge_are_no_ones_that_calibrate():
    assert not {*photographs.JUDGED} & {*photographs.CALIBRATION}


@pytest.mark.parametrize(
    "ask", [picture_layers.model_file, lambda: photographs.photograph("coffee.png")]
)
def test_what_is_missing_is_said_with_the_pinned_command(ask, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError) as error:
        ask()
    pin = re.search(r"pip install --no-deps ([\w-]+==[\d.]+)", str(error.value)).group(1)
    for constraints in ROOT.glob("constraints-py*.txt"):
        assert pin in constraints.read_text().splitlines()


def test_without_onnx_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[evidence\]'"):
        picture_layers.Network(tmp_path / "net.onnx")


def test_rows_are_spread_over_all():
    rows = np.arange(10)[:, None]
    assert spread(rows, 4)[:, 0].tolist() == [0, 2, 5, 7]
    assert spread(rows, 20)[:, 0].tolist() == list(range(10))


def small_subject():
    rng = np.random.default_rng(0)
    names = [f"blocks/{layer}/{kind}" for layer in range(2) for kind in ("qkv", "out")]
    kernels = {name: rng.standard_normal((128, 16)).astype(np.float32) for name in names}
    rows = {name: rng.standard_normal((32, 128)).astype(np.float32) for name in names}
    return Subject("net", kernels, rows, rows)


def test_a_products_ratio_equals_integers_in_numpy():
    """Int8 weights per channel, activations per token, bounds at 127 times the scale."""
    subject = small_subject()

    def rounded(x):
        scale = np.abs(x).max(axis=1, keepdims=True) / 127
        return np.rint(x / scale) * scale

    for layer, found in measure(rule_of("dynamic", "w8a8"), subject).items():
        x, kernel = np.float64(subject.rows[layer]), np.float64(subject.kernels[layer])
        exact, got = x @ kernel, rounded(x) @ rounded(kernel.T).T
        ratio = 10 * np.log10(np.square(exact).sum() / np.square(got - exact).sum())
        assert abs(found - ratio) < 0.05  # a tie that float32 rounds the other way


def test_tables_have_the_kinds_and_depth_of_the_network():
    subject = small_subject()
    ratios = dict(zip(subject.rows, (10.0, 20.0, 30.0, 50.0), strict=True))
    found = table("W8A8", subject, {"naive": ratios})
    assert "net, W8A8" in found.title and "mean over 2 layers" in found.title
    headers = [column.header for column in found.columns]
    assert headers == ["method", "qkv", "out", "mean", "worst", "in layer"]
    cells = [next(iter(column.cells)) for column in found.columns]
    assert cells == ["naive", "20.0", "35.0", "27.5", "10.0", "0/qkv"]
    subject.rows["blocks/0/qkv"][:, 3] = 64.0
    table_of = {column.header: [*column.cells] for column in outliers_table(subject).columns}
    assert table_of["over layers"] == ["mean", "most"]
    (mean, most), even = map(float, table_of["qkv"]), float(table_of["out"][1])
    assert most > 10 * even and abs(mean - (most + even) / 2) < 0.2 * even
