"""Hostile headers: each is refused by name, and no mutation of a good one gets past."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import CheckpointError
from convert.safetensors import TensorFile
from convert.safetensors_header import DTYPES


def build(header: bytes | dict | str, data: bytes = b"", length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def record(dtype: object = "U8", shape: object = (2,), span: object = (0, 2), **extra) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span, **extra}


HOSTILE = {
    "empty file": (b"", "truncated: 0 bytes"),
    "no header": (b"\x00" * 7, "truncated: 7 bytes"),
    "length zero": (build(b""), "must start with '{'"),
    "length over 100 MB": (build("{}", length=100_000_001), "header length 100000001"),
    "length 2**64-1": (build("{}", length=2**64 - 1), "18446744073709551615"),
    "length over file": (build("{}", length=3), "header length 3, the file has 2"),
    "leading space": (build(" {}"), "must start with '{'"),
    "an array": (build("[]"), "must start with '{'"),
    "bad utf-8": (build(b'{"\xff":1}'), "not UTF-8 at byte 2"),
    "bad json": (build("{"), "not valid JSON"),
    "two values": (build("{}{}"), "Extra data"),
    "deep json": (build('{"a":' + "[" * 100_000), "nests its JSON too deeply"),
    "deep but valid": (build('{"a":' + "[" * 500 + "]" * 500 + "}"), "tensor 'a': the record must"),
    "NaN": (build('{"a":NaN}'), "literal NaN"),
    "Infinity": (build('{"a":-Infinity}'), "literal -Infinity"),
    "5000 digits": (build('{"a":' + "9" * 5000 + "}"), "tensor 'a': the record must"),
    "duplicate tensor": (
        build('{"a":%s,"a":%s}' % ((json.dumps(record()),) * 2), b"12"),
        "'a' appears twice",
    ),
    "duplicate field": (
        build('{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"12"),
        "'dtype' appears twice",
    ),
    "metadata not an object": (build({"__metadata__": None}), "__metadata__ must be"),
    "metadata not strings": (build({"__metadata__": {"k": 1}}), "__metadata__['k'] must be"),
    "record not an object": (build({"a": 3}), "tensor 'a': the record must"),
    "extra key": (build({"a": record(x=1)}, b"12"), "tensor 'a': the record must"),
    "missing key": (build({"a": {"dtype": "U8", "shape": [2]}}), "tensor 'a': the record must"),
    "unknown dtype": (build({"a": record("F4")}, b"12"), "tensor 'a': dtype 'F4'"),
    "dtype no string": (build({"a": record(["U8"])}, b"12"), "tensor 'a': dtype ['U8']"),
    "shape negative": (build({"a": record(shape=[-2])}, b"12"), "'a': shape must be"),
    "shape float": (build({"a": record(shape=[2.0])}, b"12"), "'a': shape must be"),
    "shape bool": (build({"a": record(shape=[True, 2])}, b"12"), "'a': shape must be"),
    "shape number": (build({"a": record(shape=2)}, b"12"), "'a': shape must be"),
    "33 axes": (build({"a": record(shape=[1] * 33, span=[0, 1])}, b"1"), "at most 32"),
    "overflow": (build({"a": record(shape=[2**33, 2**33])}, b"12"), "overflows 63 bits"),
    "overflow by 0": (build({"a": record(shape=[2**63, 0], span=[0, 0])}), "overflows 63 bits"),
    "offsets negative": (build({"a": record(span=[-1, 1])}, b"12"), "'a': data_offsets must"),
    "offsets bool": (build({"a": record(shape=[1], span=[False, True])}, b"1"), "data_offsets"),
    "offsets backwards": (build({"a": record(span=[2, 0])}, b"12"), "'a': data_offsets must"),
    "three offsets": (build({"a": record(span=[0, 2, 2])}, b"12"), "'a': data_offsets must"),
    "size mismatch": (build({"a": record("F32")}, b"12"), "needs 8 bytes, its data_offsets hold 2"),
    "overlap": (
        build({"a": record(), "b": record(span=[1, 3])}, b"123"),
        "tensor 'b' [1, 3) overlaps 'a', ending at 2",
    ),
    "same range": (build({"a": record(), "b": record()}, b"12"), "tensor 'b' [0, 2) overlaps 'a'"),
    "hole first": (build({"a": record(span=[1, 3])}, b"123"), "'a' [1, 3) leaves a hole"),
    "hole": (
        build({"a": record(), "b": record(span=[3, 5])}, b"12345"),
        "'b' [3, 5) leaves a hole",
    ),
    "trailing bytes": (build({"a": record()}, b"123"), "1 trailing bytes"),
    "trailing after nothing": (build({}, b"1"), "1 trailing bytes"),
    "truncated data": (build({"a": record()}, b"1"), "the data has 1 bytes but 1 tensor(s) reach"),
    "empty name": (build({"": record()}, b"12"), "empty name"),
    "NUL in name": (build({"a\0": record()}, b"12"), "'a\\x00': the name holds a NUL"),
    "surrogate": (build({"\ud800": record()}, b"12"), "lone surrogate"),
    "climbing name": (build({"../x": record()}, b"12"), "tensor '../x'"),
    "climbing inside": (build({"a/../../x": record()}, b"12"), "tensor 'a/../../x'"),
    "climbing backslash": (build({"a\\..\\x": record()}, b"12"), "leaves its folder"),
    "rooted name": (build({"/etc/x": record()}, b"12"), "tensor '/etc/x'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + b"\0" * 16, "GGUF"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "torch zip": (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 50, "rename it to .pt"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(tmp_path: Path, case: str):
    raw, expected = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_problems_are_collected_and_listed_up_to_twenty(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({f"t{i}": record("F4") for i in range(25)} | {"\x1b[2J\n": 1}))
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)
    error = pickle.loads(pickle.dumps(caught.value))
    assert len(error.problems) == 26 and isinstance(error, ValueError)
    assert str(error).endswith("and 6 more") and len(str(error).splitlines()) == 22
    assert not any("\x1b" in problem or "\n" in problem for problem in error.problems)


def _valid_file() -> bytes:
    tensors = {
        "w.a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "w.b": np.arange(4, dtype=np.int8),
        "empty": np.zeros((0, 3), np.float16),
        "s": np.array(7, np.uint16),
    }
    return safetensors.numpy.save(tensors, {"k": "v"})


VALID = _valid_file()
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
EDIT = st.tuples(
    st.sampled_from(["put", "insert", "delete", "swap"]),
    st.integers(0, HEADER_END - 1),
    st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789-.eE[]{},:"\\ aUFI'))),
)


def mutate(edits: list[tuple[str, int, int]], keep_length: bool) -> bytes:
    raw = bytearray(VALID[:HEADER_END])
    for kind, where, byte in edits:
        where = min(where, len(raw) - 1)
        if kind == "put":
            raw[where] = byte
        elif kind == "insert":
            raw.insert(max(where, 8), byte)
        elif kind == "delete" and len(raw) > 9:
            del raw[max(where, 8)]
        elif kind == "swap":  # two stretches of the header change places
            other = 8 + byte % (len(raw) - 8)
            raw[where : where + 1], raw[other : other + 1] = (
                raw[other : other + 1],
                raw[where : where + 1],
            )
    if keep_length:
        raw[:8] = (len(raw) - 8).to_bytes(8, "little")
    return bytes(raw) + VALID[HEADER_END:]


@settings(max_examples=400, deadline=None)
@given(edits=st.lists(EDIT, min_size=1, max_size=3), keep_length=st.booleans())
def test_fuzzed_header_is_refused_or_means_the_same(tmp_path_factory, edits, keep_length):
    raw = mutate(edits, keep_length)
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(raw)
    try:
        file = TensorFile(path)
    except CheckpointError as error:
        str(error).encode()
        return
    with file:
        wanted = dict(safetensors.deserialize(raw))
        assert set(wanted) == set(file.names)
        for name, tensor in wanted.items():
            got = file.read(name)
            assert got.dtype == DTYPES[tensor["dtype"]] and got.tobytes() == tensor["data"]
            assert got.shape == tuple(tensor["shape"])
