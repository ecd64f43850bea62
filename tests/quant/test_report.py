"""Sizes: exact on trees counted by hand, and on FLUX.1 by the formulas of its layouts."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from lowbit_jax.checkpoint import iter_parts
from lowbit_jax.models.flux import FLUX_DEV, FLUX_SCHNELL, abstract_params
from lowbit_jax.quant.qtensor import QTensor
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.report import describe, disk_bytes, size_report, size_table
from lowbit_jax.quant.transform import quantize
from tests.references.flux_files import bfl_shapes

shape = jax.ShapeDtypeStruct
BF16, F32, I8, U8 = jnp.bfloat16, jnp.float32, jnp.int8, jnp.uint8


def ternary(layers=(), act_bits=None):
    """A 10 x 130 matrix: two blocks of 32 bytes a row, or 26 bytes of trits."""
    codes, scale = shape((*layers, 10, 64), U8), shape((*layers, 10, 1), F32)
    return QTensor(
        codes=codes, scale=scale, format="ternary", shape=(10, 130), group=130, act_bits=act_bits
    )


def test_a_small_tree_counted_by_hand():
    stack = {
        "attn": {"qkv": {"kernel": ternary((3,)), "bias": shape((3, 10), BF16)}},
        "norm": {"scale": shape((3, 7), F32)},
    }
    params = {
        "img_in": {"kernel": shape((4, 6), BF16), "bias": shape((6,), BF16)},
        "blocks": {"0": stack},
    }
    report = size_report(iter_parts(params), archive=True)
    found = {
        g.name: (g.kind, g.count, g.parameters, g.before, g.after, g.disk) for g in report.groups
    }
    assert found == {
        "img_in": ("bfloat16", 1, 30, 60, 60, 60),
        "blocks/*/attn/qkv": (
            "ternary (2 bit) per channel",
            3,
            3 * 1310,
            3 * 2620,
            3 * (640 + 40 + 20),
            3 * (260 + 40 + 20),
        ),
        "norms and tables": ("float32", 3, 21, 42, 84, 84),
    }
    assert (report.parameters, report.before) == (30 + 3930 + 21, 60 + 7860 + 42)
    assert (report.after, report.disk) == (60 + 2100 + 84, 60 + 960 + 84)
    assert report.ratio == 7962 / 2244
    assert report.bits_per_weight == 8 * 2244 / 3981
    assert size_report(iter_parts(params)).disk == report.after
    assert size_report(iter_parts(params), float_bytes=4).before == 2 * report.before


def test_a_stack_in_one_piece_counts_as_its_layers():
    part = ("stack", {"attn/kernel": ternary((3,)), "attn/bias": shape((3, 10), BF16)})
    report = size_report([part], archive=True)
    assert (report.parameters, report.after, report.disk) == (3930, 2100, 960)


def test_layers_stored_in_different_ways_are_groups_of_their_own():
    def linear(kernel):
        return {"mlp": {"kernel": kernel, "bias": shape((kernel.shape[0], 10), BF16)}}

    mixed = {"0": linear(shape((2, 130, 10), BF16)), "2": {"mlp": {"kernel": ternary((1,))}}}
    report = size_report(iter_parts({"blocks": mixed}))
    found = [(g.name, g.kind, g.count) for g in report.groups]
    assert found == [
        ("blocks/*/mlp", "bfloat16", 2),
        ("blocks/*/mlp", "ternary (2 bit) per channel", 1),
    ]


@pytest.mark.parametrize(
    ("scale", "zero", "group", "act_bits", "words"),
    [
        ((10, 1), False, 256, 8, "int4 (4 bit) per channel, int8 activations"),
        ((1, 1), False, 256, None, "int4 (4 bit) per tensor"),
        ((10, 2), True, 128, None, "int4 (4 bit) per group 128, zero points"),
    ],
)
def test_the_words_for_a_way_of_storing(scale, zero, group, act_bits, words):
    tensor = QTensor(
        codes=shape((10, 128), U8),
        scale=shape(scale, F32),
        zero=shape(scale, I8) if zero else None,
        format="int4",
        shape=(10, 256),
        group=group,
        act_bits=act_bits,
    )
    assert describe(tensor) == words
    stored = 1280 + math.prod(scale) * (5 if zero else 4)
    assert disk_bytes(tensor, archive=True) == tensor.nbytes == stored


# bytes of an n x k matrix with its scales, from the formats themselves
def int8(n, k):
    return n * k + 4 * n


def int4_groups(n, k):
    return n * math.ceil(k / 128) * (64 + 4 + 1)


def two_bits(n, k):
    return n * math.ceil(k / 128) * 32 + 4 * n


def trits(n, k):
    return n * math.ceil(k / 5) + 4 * n


def flux_report(config, recipe, archive=False):
    params = jax.eval_shape(partial(quantize, recipe=RECIPES[recipe]), abstract_params(config))
    return size_report(iter_parts(params), archive=archive)


@pytest.mark.parametrize(
    ("recipe", "archive", "matrix"),
    [
        ("float", False, lambda n, k: 2 * n * k),
        ("w8a8", True, int8),
        ("w4a16", False, int4_groups),
        ("flux-1.58bit", False, two_bits),
        ("flux-1.58bit-a8", True, trits),
    ],
)
@pytest.mark.parametrize("config", [FLUX_DEV, FLUX_SCHNELL], ids=["dev", "schnell"])
def test_flux_takes_what_its_formats_say(config, recipe, archive, matrix):
    quantised = [
        size
        for name, size in bfl_shapes(config).items()
        if "blocks." in name and name.endswith(".weight")
    ]
    assert len(quantised) == 19 * 10 + 38 * 3
    everything = sum(math.prod(size) for size in bfl_shapes(config).values())
    inside = sum(math.prod(size) for size in quantised)
    expected = 2 * (everything - inside) + sum(matrix(n, k) for n, k in quantised)
    report = flux_report(config, recipe, archive)
    assert report.disk == expected
    assert (report.parameters, report.before) == (everything, 2 * everything)


def test_published_totals():
    assert flux_report(FLUX_DEV, "float").after == 23_802_816_640
    ternary = flux_report(FLUX_DEV, "flux-1.58bit", archive=True)
    assert (ternary.after, ternary.disk) == (3_105_056_896, 2_515_073_152)
    assert ternary.ratio == pytest.approx(7.67, abs=0.005)
    assert ternary.bits_per_weight == pytest.approx(2.09, abs=0.005)


def test_a_table_of_80_columns_cuts_no_name():
    report = flux_report(FLUX_DEV, "flux-1.58bit-a8")
    console = Console(width=80, record=True, markup=False, file=open("/dev/null", "w"))
    console.print(size_table(report, "plan"))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for group in report.groups:
        assert group.name in text
    assert "double_blocks/*/img_mlp/out_layer" in text
    total = [line for line in text.splitlines() if "total" in line][0]
    assert total.split() == ["total", "2.09", "23,802.82", "3,105.06", "7.67"]
