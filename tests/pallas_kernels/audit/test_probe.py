"""How the probe command reads what it is given; nothing is compiled here."""

import argparse

import jax.numpy as jnp
import pytest

from pallas_kernels.audit import probe
from pallas_kernels.tiles import Tile


def test_an_argument_is_a_dtype_and_a_shape():
    spec = probe._spec("bfloat16[4608,3072]")
    assert (spec.shape, spec.dtype) == ((4608, 3072), jnp.bfloat16)
    assert probe._spec("float32[]").shape == () and probe._spec("None") is None
    with pytest.raises(ValueError, match="written like int8"):
        probe._spec("4608x3072")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("out_dtype=bfloat16", jnp.bfloat16),
        ("bits=4", 4),
        ("bias=None", None),
        ("layout='a=b'", "a=b"),
    ],
)
def test_a_keyword_is_a_dtype_or_a_literal(text, value):
    assert probe._keyword(text) == (text.split("=")[0], value)


def test_an_op_is_named_with_its_sizes():
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    arguments = parser.parse_args(["int4_a8", "64", "256", "128"])
    fn, (operands,) = probe._op(arguments, Tile(64, 64, 128, 4, 3))
    assert operands.x.shape == (64, 256) and operands.w.shape == (128, 128)
    assert fn.keywords["tile"].m == 64


def test_which_of_several_kernels_has_to_be_said(monkeypatch):
    monkeypatch.setattr(probe, "compile_kernels", lambda *_: [])
    with pytest.raises(ValueError, match="expected one kernel"):
        probe.probe(jnp.sin, target="a100")
    with pytest.raises(ValueError, match="b200"):
        probe.probe(jnp.sin, target="b200")
