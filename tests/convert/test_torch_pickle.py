"""Hostile pickles in both of PyTorch's layouts: none runs, each is refused by name and at once."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from convert import torch_pickle
from convert.errors import CheckpointError
from convert.torch_file import TorchFile
from convert.torch_values import DTYPES, INERT, STORAGES
from tests.references.torch_files import (
    Raw,
    call,
    encode,
    members,
    name,
    pack_legacy,
    pack_zip,
    program,
    storage,
    tensor,
)


def write(path: Path, value, legacy: bool) -> Path:
    """A checkpoint whose object is `value`, or the pickle given as bytes."""
    raw = value if type(value) is bytes else program(value)
    used = None if encode("storage") in raw else {}  # None: the usual storage "0"
    path.write_bytes(pack_legacy(raw, used) if legacy else pack_zip(members(raw, used)))
    return path


def refused(path: Path, *expected: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    for text in (str(path), *expected):
        assert text in str(caught.value)
    return caught.value


class Payload:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def creates_file(target: Path) -> list[tuple[str, Payload]]:
    """Objects whose unpickling makes `target`, and the name that must be refused."""
    code = f"open({str(target)!r}, 'w')"
    return [
        ("io.open", Payload(io.open, str(target), "w")),
        ("eval", Payload(eval, code)),
        ("exec", Payload(exec, code)),
        ("posix.mkdir", Payload(__import__("os").mkdir, str(target))),
    ]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("which", range(4))
def test_a_payload_is_refused_by_name_and_does_not_run(tmp_path, legacy, protocol, which):
    target = tmp_path / "proof"
    expected, payload = creates_file(target)[which]
    raw = pickle.dumps({"w": 1, "model": payload}, protocol)
    pickle.loads(raw)
    assert target.exists()  # the payload is alive
    target.rmdir() if target.is_dir() else target.unlink()
    problem = refused(write(tmp_path / "a.pt", raw, legacy))
    by_name = f"{expected}', which is not on the list" in str(problem)
    assert by_name or (protocol < 2 and "is none that a checkpoint" in str(problem))
    assert not target.exists()


SYSTEM = name("posix.system")
ARGUMENTS = encode(("touch proof",))
ORDERED = name("collections.OrderedDict")
ARGS = name("argparse.Namespace")
HIDING_PLACES = {
    "the object itself": call(SYSTEM, "touch proof"),
    "the weights": {"w": call(SYSTEM, "touch proof")},
    "another part": {"ema": {"w": tensor()}, "opt": [{"x": (call(SYSTEM, "touch proof"),)}]},
    "the state of a Namespace": {"w": tensor(), "args": Raw(
        ARGS + b")\x81" + encode({"x": call(SYSTEM, "touch proof")}) + b"b")},
    "the hooks of a tensor": {"w": Raw(name("torch._utils._rebuild_tensor_v2") + encode(
        (storage(), 0, (6,), (1,), False, call(SYSTEM, "touch proof"))) + b"R")},
    "the metadata of a tensor": {"w": tensor(extra=(call(SYSTEM, "touch proof"),))},
    "the state of an OrderedDict": Raw(call(ORDERED) + call(SYSTEM, "touch proof") + b"b"),
    "a persistent id": Raw(call(SYSTEM, "touch proof") + b"Q"),
    "the type of a storage": storage(kind="posix.system"),
    "a name taken from the memo": Raw(SYSTEM + b"q\0" + b"0h\0" + ARGUMENTS + b"R"),
    "a name put together": Raw(encode("posix") + encode("system") + b"\x93" + ARGUMENTS + b"R"),
    "a name with a dot": Raw(b"cposix\nsystem.__call__\n"),
    "a NEWOBJ": Raw(SYSTEM + ARGUMENTS + b"\x81"),
    "a child of a trusted module": Raw(b"ctorch._utils\n_import_dotted_name\n"),
    "an attribute of a trusted name": Raw(b"ccollections\nOrderedDict.__reduce__\n"),
    "a trusted name, split elsewhere": Raw(b"ccollections.\nOrderedDict\n"),
    "getattr": Raw(b"c__builtin__\ngetattr\n" + encode((ORDERED, "__class__")) + b"R"),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", HIDING_PLACES)
def test_no_hiding_place_for_a_name(tmp_path, legacy, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(write(tmp_path / "a.pt", HIDING_PLACES[place], legacy))
    known = ("posix.system", "_import_dotted_name", "__reduce__", "collections..", "getattr")
    said = any(text in str(error) for text in known)
    assert said or (place == "a name taken from the memo" and "POP" in str(error))
    assert not (tmp_path / "proof").exists()


W = encode({"w": tensor()})
OPCODES = {
    "INST": b"(" + encode("touch proof") + b"iposix\nsystem\n",
    "OBJ": b"(" + ARGS + encode("touch proof") + b"o",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "NEWOBJ_EX": ARGS + b")}\x92",
    "PERSID": b"Pposix\n",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": W + b"\x98",
    "BYTEARRAY8": b"\x96" + b"\0" * 8,
    "LONG4": b"\x8b\xff\xff\xff\x7f",
    "BINBYTES8": b"\x8e" + b"\xff" * 8,
    "BINUNICODE8": b"\x8d" + b"\xff" * 8,
    "INT": b"I12\n",
    "LONG": b"L12L\n",
    "STRING": b"S'x'\n",
    "UNICODE": b"Vx\n",
    "FLOAT": b"F1.5\n",
    "GET": b"g0\n",
    "PUT": W + b"p0\n",
    "DUP": W + b"2",
    "POP": W + W + b"0",
    "POP_MARK": W + b"(1",
    "DICT": b"(d",
    "LIST": b"(l",
    "FROZENSET": b"(\x91",
    "EMPTY_SET": b"\x8f",
    "0x7f": b"\x7f",
}


@pytest.mark.parametrize("opcode", OPCODES)
def test_opcodes_torch_does_not_write_are_refused_by_name(tmp_path, opcode):
    raw = b"\x80\x02" + OPCODES[opcode] + b"."
    for legacy in (False, True):
        refused(write(tmp_path / "a.pt", raw, legacy), f"the opcode {opcode} is none that")


def test_every_opcode_is_either_taken_or_in_that_list():
    taken = {
        op.name
        for op in pickletools.opcodes
        if op.code.encode("latin-1") in torch_pickle._OPERATIONS
    } | {"STOP"}
    others = {op.name for op in pickletools.opcodes} - taken
    close = {"BINSTRING", "SHORT_BINBYTES", "BINBYTES", "ADDITEMS"}  # of the same kinds
    assert others == (set(OPCODES) - {"0x7f"}) | close
    assert {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID"} <= others


def test_the_names_that_are_taken_reach_nothing():
    """The lists hold strings and numpy dtypes; the machine's functions are its own methods."""
    assert all(isinstance(entry, str) for entry in INERT)
    for dangerous in ("eval", "exec", "getattr", "compile", "open", "__import__", "apply", "input"):
        for module in ("builtins", "__builtin__", "io", "os", "posix", "nt", "subprocess"):
            assert f"{module}.{dangerous}" not in INERT | STORAGES.keys() | DTYPES.keys()
    for function in (*torch_pickle._REBUILD.values(), *torch_pickle._OPERATIONS.values()):
        assert function.__module__ == torch_pickle.__name__
    source = Path(torch_pickle.__file__).read_text()
    for way in ("import_module", "__import__", "getattr(", "eval(", "exec(", "import pickle\n"):
        assert way not in source


HUGE = 2**62
V2, V3 = (name(f"torch._utils._rebuild_tensor_v{version}") for version in (2, 3))
BROKEN = {
    "empty": (b"", "needs 1 more bytes, 0 are left"),
    "no STOP": (b"\x80\x02}", "needs 1 more bytes, 0 are left"),
    "STOP on nothing": (b"\x80\x02.", "takes a value from an empty stack"),
    "two values": (b"\x80\x02}}.", "ends with values left over"),
    "an open mark": (b"\x80\x02(}.", "ends with values left over"),
    "bytes after STOP": (program({"w": tensor()}) + b"}.", "2 bytes after the end of its pickle"),
    "protocol 6": (b"\x80\x06}.", "protocol 6, the newest is 5"),
    "a mark that was never opened": (b"\x80\x02u.", "closes a mark that was never opened"),
    "an unknown memo": (b"\x80\x02h\x07.", "refers to value 7, which it has not given yet"),
    "put of nothing": (b"\x80\x02q\0.", "changes a value on an empty stack"),
    "a string of 4 GB": (b"\x80\x02X\xff\xff\xff\xff.", "needs 4294967295 more bytes, 1 are left"),
    "a string not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", "a string is not UTF-8"),
    "an endless global": (b"\x80\x02c" + b"a" * 5000, "does not end within 256 bytes"),
    "a global not UTF-8": (b"\x80\x02c\xff\n\xff\n.", "a string is not UTF-8"),
    "a global of numbers": (b"\x80\x02K\x01K\x01\x93.", "a global's name is not a string"),
    "a call of a dict": (b"\x80\x02})R.", "calls a dict"),
    "a call of a dtype": (
        b"\x80\x02" + call(name("torch.float32")) + b".", "calls 'torch.float32'"),
    "a call with a list": (b"\x80\x02" + ORDERED + b"]R.", "the arguments of a call are a list"),
    "an object of a dtype": (b"\x80\x02ctorch\nint8\n)\x81.", "makes an object of 'torch.int8'"),
    "attributes of a tensor": (
        b"\x80\x02" + tensor() + b"}b.", "sets attributes of a StoredTensor"),
    "items of a list": (b"\x80\x02](}}u.", "sets 2 keys and values in a list"),
    "half an item": (b"\x80\x02}(}u.", "sets 1 keys and values in a dict"),
    "append to a dict": (b"\x80\x02}}a.", "appends to a dict"),
    "a key twice": (
        b"\x80\x02}(" + encode("a") + b"N" + encode("a") + b"Nu.", "key 'a' appears twice"),
    "a key of tuples": (b"\x80\x02})Ns.", "a key of a dict is a tuple, not a string or a short"),
    "a long key": (b"\x80\x02}(" + encode(2**61 - 1) + b"Nu.", "a key of a dict is a int, not"),
    "a number for an OrderedDict": (program(call(ORDERED, 1)), "is not given a list of pairs"),
    "triples for an OrderedDict": (program(call(ORDERED, [["a", 1, 2]])), "given a list of pairs"),
    "a key twice in its pairs": (
        program(call(ORDERED, [["a", 1], ["a", 2]])), "the key 'a' appears twice"),
    "a Size of strings": (
        program(call(name("torch.Size"), ("a",))), "torch.Size is not given sizes"),
    "a Parameter of a dict": (
        program(call(name("torch._utils._rebuild_parameter"), {}, True, {})),
        "is not given a tensor"),
    "a persistent id of another kind": (
        program(Raw(encode(("module", "x")) + b"Q")), "not that of a storage"),
    "a storage of -1": (program(storage(count=-1)), "are not two strings and a number"),
    "a storage of True": (program(storage(count=True)), "are not two strings and a number"),
    "a storage of 2**64": (program(storage(count=2**64)), "are not two strings and a number"),
    "a numbered storage": (program(storage(key=0)), "are not two strings and a number"),
    "a view of a storage": (program(storage(extra=(("0", 0, 24),))), "is a view of another one"),
    "a storage of two sizes": (
        program([storage(), storage(count=5)]), "'0' is mentioned as float32[6] and float32[5]"),
    "a storage of two types": (
        program([storage(), storage(kind="torch.IntStorage")]), "as float32[6] and int32[6]"),
    "a tensor of a list": (program(tensor(stored=Raw(b"]"))), "the storage is a list"),
    "3 arguments": (
        program(call(V2, storage(), 0, ())), "takes 6 arguments, it has 3"),
    "8 arguments": (program(tensor(extra=({}, {}))), "takes 6 arguments, it has 8"),
    "a negative bit": (
        program(tensor(extra=({"neg": True},))), "metadata a dict changes the values"),
    "no dtype": (
        program(call(V3, storage(), 0, (6,), (1,), False, {}, "f4")), "the dtype is a str"),
    "sizes in a list": (program(tensor([2, 3], (3, 1))), "size and stride are not tuples"),
    "a negative size": (program(tensor((-2, -3), (3, 1))), "size and stride are not tuples"),
    "a size of True": (program(tensor((True,), (1,))), "size and stride are not tuples"),
    "33 axes": (program(tensor((1,) * 33, (1,) * 33)), "of one length up to 32"),
    "two sizes, one stride": (program(tensor((2, 3), (1,))), "of one length"),
    "a negative stride": (program(tensor((2, 3), (-3, 1))), "size and stride are not tuples"),
    "a negative offset": (program(tensor(offset=-1)), "the offset is not a number from 0"),
    "an offset beyond": (program(tensor(offset=1)), "offset 1 leaves storage '0' of 6 elements"),
    "one element beyond": (program(tensor((7,), (1,))), "leaves storage '0' of 6 elements"),
    "a stride beyond": (
        program(tensor((2, 3), (4, 1))), "stride [4, 1], offset 0 leaves storage '0'"),
    "a huge stride": (program(tensor((2, 3), (HUGE, HUGE))), "leaves storage '0'"),
    "a huge offset": (program(tensor(offset=2**63 - 1)), "leaves storage '0'"),
    "a scalar beyond": (program(tensor((), (), 6)), "leaves storage '0' of 6 elements"),
    "a huge axis of stride 0": (program(tensor((HUGE,), (0,))), "overflows 63 bits"),
    "a repeated row": (program(tensor((7,), (0,))), "repeats the 6 elements of its storage"),
    "an empty one with a huge axis": (program(tensor((0, HUGE), (1, 1))), "overflows 63 bits"),
    "an empty one far outside": (
        program(tensor((0,), (1,), 8)), "leaves storage '0' of 6 elements"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pickles(tmp_path, case):
    raw, expected = BROKEN[case]
    refused(write(tmp_path / "a.pt", raw, legacy=False), expected)
    if case != "bytes after STOP":  # there, another pickle follows anyway
        with pytest.raises(CheckpointError):
            TorchFile(write(tmp_path / "b.pt", raw, legacy=True))


def test_dicts_as_old_programs_wrote_them(tmp_path):
    """An OrderedDict of Python 2, strings of its kind, and an optimizer's numbers of objects."""
    weights = call(ORDERED, [[Raw(b"U\x01a"), tensor()], [Raw(b"U\x01b"), tensor()]])
    value = {"model": weights, "optimizer": {140_213_456_789_012: None, -1: None}}
    for legacy in (False, True):
        with TorchFile(write(tmp_path / "a.pt", value, legacy)) as file:
            assert file.names == ("a", "b") and file.read("b").tolist() == [[0, 1, 2], [3, 4, 5]]


def nested(count: int) -> bytes:
    """A tuple around a tuple around ..."""
    return b")" + b"\x85" * count


DOUBLING = b")" + b"q\0h\0\x86" * 60  # 2**60 empty tuples, were anyone to look at all of them
BOMBS = {
    "lists": (b"]" * 20_000_000, "more than 1000000 operations"),
    "marks": (b"(" * 20_000_000, "nested deeper than 256"),
    "nested tuples": (nested(500_000) + b".", "holds a tuple, not a dict"),
    "nested lists": (b"]" * 250_000 + b"a" * 249_999 + b".", "holds a list, not a dict"),
    "nested tuples as a key": (b"}" + nested(500_000) + b"Ns.", "a key of a dict is a tuple"),
    "doubling tuples": (DOUBLING + b".", "holds a tuple, not a dict"),
    "doubling tuples as a key": (b"}" + DOUBLING + b"Ns.", "a key of a dict is a tuple"),
    "doubling tuples as sizes": (program(tensor(Raw(DOUBLING))), "size and stride are not tuples"),
    "doubling tuples as an id": (DOUBLING + b"Q.", "persistent id is not that of a storage"),
    "doubling tuples as weights": (program({"w": Raw(DOUBLING)}), "holds no tensors"),
    "numbers that collide": (
        b"}(" + b"".join(encode(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)) + b"u.",
        "a key of a dict is a int",
    ),
    "a list in itself": (b"]q\0h\0a.", "holds a list, not a dict"),
    "a dict in itself": (program({"model": Raw(b"}q\0(" + encode("a") + b"h\0u")}), "holds no ten"),
    "a far memo": (b"}r\xff\xff\xff\xffj\xff\xff\xff\xffa.", "appends to a dict"),
    "a long number": (b"\x8a\xff" + b"\xff" * 254 + b"\x7f.", "holds a int, not a dict"),
    "more than 64 MiB": (
        b"X" + struct.pack("<I", 70 << 20) + b"a" * (70 << 20) + b".",
        "needs 73400320 more bytes, 67108857 are left",
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_at_once(tmp_path, legacy, case):
    """Objects nested or shared without end are neither walked, hashed, printed nor compared."""
    raw, expected = BOMBS[case]
    path = write(tmp_path / "a.pt", raw if raw[:1] == b"\x80" else b"\x80\x02" + raw, legacy)
    start = time.perf_counter()
    refused(path, expected)
    assert time.perf_counter() - start < 20  # at most about 2


@pytest.mark.parametrize("case", ["lists", "marks", "more than 64 MiB"])
def test_bombs_cost_little_memory(tmp_path, case, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_OPERATIONS", 100_000)  # the tracer is slow
    path = write(tmp_path / "a.pt", b"\x80\x02" + BOMBS[case][0], legacy=False)
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6  # a hundred thousand lists take 6.4
