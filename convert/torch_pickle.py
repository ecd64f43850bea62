"""Reads the pickle inside a PyTorch checkpoint as data: nothing it names is imported or called.

A pickle is a program for a small stack machine, and the usual reader gives that program any
function it asks for. This one is an own machine for the opcodes that `torch.save` writes. A global
is a name and stays one: it must be one of `STORAGES`, `DTYPES`, `_REBUILD` (all of them only say
how to lay out bytes) or `INERT` (classes that training programs keep beside the weights, which here
become an `Opaque` that remembers its name and drops its contents). Every other name, and every
other opcode, is refused by name.

What a hostile pickle can make it spend is bounded before it is spent: bytes, operations (so
objects), depth, and no hash of anything but short integers and strings.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from convert.errors import CheckpointError
from convert.safetensors_header import MAX_AXES, quote
from convert.torch_values import (
    DTYPES,
    INERT,
    STORAGES,
    Global,
    Opaque,
    Storage,
    StoredTensor,
    is_size,
    is_sizes,
    outside,
)

MAX_BYTES = 64 << 20
MAX_OPERATIONS = 1_000_000  # a tensor takes about 40, its optimizer's moments 80 more
MAX_DEPTH = 256
_MAX_GLOBAL = 256  # characters of a module or a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickle:
    """What a pickle held.

    Attributes:
        value: dict, list, tuple, str, int, float, bool, None, `StoredTensor`, `Storage`, `Global`
            or `Opaque`, nested; may refer to itself.
        storages: all that it mentions, by key.
        end: the byte after it.
    """

    value: Any
    storages: dict[str, Storage]
    end: int


def read_pickle(data: mmap.mmap, path: Path, start: int, end: int) -> Pickle:
    """Reads one pickle from byte `start`, which must be over before byte `end` and `MAX_BYTES`.

    Raises:
        CheckpointError: an opcode, a global or an argument that is not on the lists above, broken
            or oversized data.
    """
    return _Machine(data, path, start, min(end, start + MAX_BYTES)).run()


class _Machine:
    """The stack machine: one method for each kind of opcode, found in `_OPERATIONS`."""

    def __init__(self, data: mmap.mmap, path: Path, start: int, end: int):
        self.data, self.path, self.start, self.at, self.end = data, path, start, start, end
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(self.path, f"pickle, byte {self.at - self.start}: {problem}")

    def run(self) -> Pickle:
        for _ in range(MAX_OPERATIONS):
            code = self.take(1)
            if code == b".":
                value = self.pop()
                if self.stack or self.outer:
                    self.fail("ends with values left over; damaged")
                return Pickle(value=value, storages=self.storages, end=self.at)
            operation = _OPERATIONS.get(code)
            if operation is None:
                self.fail(f"the opcode {_opcode(code)} is none that a checkpoint of tensors needs")
            operation(self)
        self.fail(f"more than {MAX_OPERATIONS} operations; re-save the state dict alone")

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            left = f"{self.end - self.at} are left: truncated, or over {MAX_BYTES} bytes"
            self.fail(f"needs {count} more bytes, {left}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            self.fail("takes a value from an empty stack; damaged")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            self.fail("changes a value on an empty stack; damaged")
        return self.stack[-1]

    def mark(self) -> None:
        if len(self.outer) >= MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH}")
        self.outer.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        if not self.outer:
            self.fail("closes a mark that was never opened; damaged")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.fail(f"refers to value {index}, which it has not given yet")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Opaque:  # an Opaque drops what it is given
            self.fail(f"appends to {_kind(target)}")

    def set_items(self, items: list[Any]) -> None:
        self.fill(self.top(), items)

    def fill(self, target: Any, items: list[Any]) -> None:
        if type(target) is Opaque:
            return
        if type(target) is not dict or len(items) % 2:
            self.fail(f"sets {len(items)} keys and values in {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # nothing else: a hash may cost (nested tuples) or collide (long integers) on purpose
            if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
                self.fail(f"a key of a dict is {_kind(key)}, not a string or a short integer")
            if key in target:
                self.fail(f"the key {quote(key)} appears twice in a dict")
            target[key] = value

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self.fail("a global's name is not a string")
        full = f"{module}.{name}"
        if full in INERT:
            self.push(Opaque(full))
        elif full in STORAGES or full in DTYPES or full in _REBUILD:
            self.push(Global(full))
        else:
            self.fail(
                f"asks for {quote(full)}, which is not on the list of names that a checkpoint of "
                "tensors needs. Nothing was run. If you trust the file, load it with torch and "
                "save the state dict alone"
            )

    def global_line(self) -> None:
        names = []
        for _ in range(2):
            end = self.data.find(b"\n", self.at, min(self.end, self.at + _MAX_GLOBAL + 1))
            if end < 0:
                self.fail(f"a global's name does not end within {_MAX_GLOBAL} bytes")
            names.append(self.text(end - self.at))
            self.take(1)
        self.find(*names)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.find(module, name)

    def reduce(self) -> None:
        """A "call": of a name in `_REBUILD`, whose method describes a tensor from the arguments."""
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            self.fail(f"the arguments of a call are {_kind(arguments)}")
        if type(function) is Opaque:
            self.push(function)
        elif type(function) is Global and function.name in _REBUILD:
            self.push(_REBUILD[function.name](self, function.name, arguments))
        else:
            self.fail(f"calls {_kind(function)}")

    def new_object(self) -> None:
        arguments, class_ = self.pop(), self.pop()
        if type(class_) is not Opaque or type(arguments) is not tuple:
            self.fail(f"makes an object of {_kind(class_)}")
        self.push(class_)

    def build(self) -> None:
        """Attributes of an object; those of an OrderedDict (module versions) are dropped too."""
        self.pop()
        if type(self.top()) not in (Opaque, dict):
            self.fail(f"sets attributes of {_kind(self.top())}")

    def persistent(self) -> None:
        """The mention of a storage: ("storage", type, key, device, count[, None])."""
        found = self.pop()
        if type(found) is not tuple or len(found) not in (5, 6) or found[0] != "storage":
            self.fail("a persistent id is not that of a storage")
        _, kind, key, device, count = found[:5]
        if type(kind) is not Global or kind.name not in STORAGES:
            self.fail(f"a storage's type is {_kind(kind)}")
        if type(key) is not str or type(device) is not str or not is_size(count):
            self.fail("a storage's key, device and count are not two strings and a number")
        if found[5:] not in ((), (None,)):
            self.fail(f"storage {quote(key)} is a view of another one; re-save it with torch")
        storage = Storage(key=key, dtype=STORAGES[kind.name], count=count)
        known = self.storages.setdefault(key, storage)
        if known != storage:
            both = f"{known.dtype}[{known.count}] and {storage.dtype}[{storage.count}]"
            self.fail(f"storage {quote(key)} is mentioned as {both}")
        self.push(known)

    def rebuild_tensor(self, name: str, arguments: tuple[Any, ...]) -> StoredTensor:
        # storage, offset, size, stride, requires_grad, hooks, [dtype (v3),] [metadata]
        typed = name.endswith("_v3")
        least = 4 if name.endswith("_tensor") else 7 if typed else 6
        if not least <= len(arguments) <= least + (least > 4):
            self.fail(f"{name} takes {least} arguments, it has {len(arguments)}")
        storage, offset, shape, strides = arguments[:4]
        if type(storage) is not Storage:
            self.fail(f"{name}: the storage is {_kind(storage)}")
        dtype = storage.dtype
        if typed:
            wanted = arguments[6]
            if type(wanted) is not Global or wanted.name not in DTYPES:
                self.fail(f"{name}: the dtype is {_kind(wanted)}")
            dtype = DTYPES[wanted.name]
        if len(arguments) > least and arguments[least]:  # a lazy conjugation or negation
            self.fail(f"{name}: metadata {_kind(arguments[least])} changes the values")
        if not (is_sizes(shape) and is_sizes(strides) and len(shape) == len(strides)):
            self.fail(f"{name}: size and stride are not tuples of one length up to {MAX_AXES}")
        if not is_size(offset):
            self.fail(f"{name}: the offset is not a number from 0")
        if problem := outside(storage, dtype, offset, shape, strides):
            self.fail(f"{name}: {problem}")
        return StoredTensor(
            storage=storage, dtype=dtype, offset=offset, shape=shape, strides=strides
        )

    def rebuild_parameter(self, name: str, arguments: tuple[Any, ...]) -> StoredTensor:
        if len(arguments) not in (3, 4) or type(arguments[0]) is not StoredTensor:
            self.fail(f"{name} is not given a tensor")
        return arguments[0]

    def ordered_dict(self, name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        if arguments:  # Python 2 wrote the items here: a list of lists
            pairs = arguments[0]
            if type(pairs) is not list or not all(type(p) is list and len(p) == 2 for p in pairs):
                self.fail(f"{name} is not given a list of pairs")
            self.fill(found, [item for pair in pairs for item in pair])
        return found

    def size(self, name: str, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        if len(arguments) != 1 or not is_sizes(arguments[0]):
            self.fail(f"{name} is not given sizes")
        return arguments[0]


def _kind(value: Any) -> str:
    """What a value is, never its contents: they may be nested without end."""
    return quote(value.name) if isinstance(value, Global | Opaque) else f"a {type(value).__name__}"


def _opcode(code: bytes) -> str:
    names = (op.name for op in pickletools.opcodes if op.code == code.decode("latin-1"))
    return next(names, f"{code[0]:#04x}")


_REBUILD: dict[str, Callable[[_Machine, str, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _Machine.rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _Machine.rebuild_tensor,
    "torch._utils._rebuild_parameter": _Machine.rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.rebuild_parameter,
    "collections.OrderedDict": _Machine.ordered_dict,
    "torch.Size": _Machine.size,
}


def _protocol(m: _Machine) -> None:
    if (version := m.number("<B")) > 5:
        m.fail(f"protocol {version}, the newest is 5")


def _long(m: _Machine) -> None:
    m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True))


_OPERATIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m.number("<Q"),  # FRAME: a hint for reading ahead
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": _long,
    b"G": lambda m: m.push(m.number(">d")),
    b"U": lambda m: m.push(m.text(m.number("<B"))),  # as Python 2 wrote strings
    b"X": lambda m: m.push(m.text(m.number("<I"))),
    b"\x8c": lambda m: m.push(m.text(m.number("<B"))),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()),
    b"(": _Machine.mark,
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"c": _Machine.global_line,
    b"\x93": _Machine.stack_global,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new_object,
    b"b": _Machine.build,
}
