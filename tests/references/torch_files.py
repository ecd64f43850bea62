"""PyTorch's two file layouts, written byte by byte from their description, with every field open to
a lie. Shares nothing with `convert`; needs no torch.
"""

import struct
import zlib
from dataclasses import dataclass, field

STOP = b"."


class Raw(bytes):
    """Opcodes that stand for a value."""


def encode(value) -> bytes:
    """The opcodes of protocol 2 that push a value."""
    if isinstance(value, Raw):
        return bytes(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    items = b"".join(encode(key) + encode(item) for key, item in value.items())
    return b"}(" + items + b"u"


def program(value) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + encode(value) + STOP


def name(full: str) -> Raw:
    module, _, last = full.rpartition(".")
    return Raw(b"c" + module.encode() + b"\n" + last.encode() + b"\n")


def call(function: Raw, *arguments) -> Raw:
    return Raw(function + encode(arguments) + b"R")


def storage(key="0", count=6, kind="torch.FloatStorage", device="cpu", extra=()) -> Raw:
    return Raw(encode(("storage", name(kind), key, device, count, *extra)) + b"Q")


def tensor(shape=(2, 3), strides=None, offset=0, stored=None, extra=()) -> Raw:
    """A call of `_rebuild_tensor_v2`; by default six float32 of storage "0"."""
    if strides is None:
        strides = tuple([1, 3, 6][: len(shape)])[::-1]
    stored = storage() if stored is None else stored
    hooks = call(name("collections.OrderedDict"))
    arguments = stored, offset, shape, strides, False, hooks, *extra
    return call(name("torch._utils._rebuild_tensor_v2"), *arguments)


SIX = struct.pack("<6f", *range(6))  # what storage "0" holds


@dataclass
class Member:
    """One member of a zip; the dicts replace fields of its two headers."""

    name: str
    data: bytes
    local: dict = field(default_factory=dict)
    central: dict = field(default_factory=dict)
    padding: bytes = b""  # of the local header, as an extra field
    tail: bytes | None = None  # instead of the data descriptor
    descriptor: bool = True


def members(value=None, storages=None, root="archive", **records) -> list[Member]:
    """The members `torch.save` writes: the pickle, a storage each, records."""
    pickled = (
        value if isinstance(value, bytes) else program({"w": tensor()} if value is None else value)
    )  # noqa: E501
    storages = {"0": SIX} if storages is None else storages
    files = {"data.pkl": pickled, "byteorder": b"little"}
    files |= {f"data/{key}": data for key, data in storages.items()} | {"version": b"3\n"} | records
    return [Member(f"{root}/{name}", data) for name, data in files.items() if data is not None]


def pack_zip(parts: list[Member], *, front=b"", gap=b"", back=b"", end=None, zip64=True) -> bytes:
    """A zip of stored members, 64-byte aligned; `end` replaces fields of the end record."""
    out, directory = bytearray(front), bytearray()
    for member in parts:
        crc, size, at = zlib.crc32(member.data), len(member.data), len(out)
        raw_name = member.name.encode()
        flags = 0x800 | (8 if member.descriptor else 0)
        known = (0, 0, 0) if member.descriptor else (crc, size, size)
        local = {"magic": b"PK\3\4", "flags": flags, "method": 0, "name": raw_name}
        local |= dict(zip(("crc", "packed", "size"), known, strict=True))
        local |= {"extra": member.padding} | member.local
        if not local["extra"]:
            fill = -(at + 30 + len(local["name"]) + 4) % 64
            local["extra"] = b"FB" + struct.pack("<H", fill) + b"Z" * fill
        out += struct.pack(
            "<4s5H3L2H", local["magic"], 0, local["flags"], local["method"], 0, 0, local["crc"],
            local["packed"], local["size"], len(local["name"]), len(local["extra"]),
        ) + local["name"] + local["extra"] + member.data  # fmt: skip
        tail = b"PK\7\10" + struct.pack("<3L", crc, size, size) if member.descriptor else b""
        out += tail if member.tail is None else member.tail
        central = {"magic": b"PK\1\2", "flags": flags, "method": 0, "crc": crc, "packed": size,
                   "size": size, "name": raw_name, "extra": b"", "comment": b"", "disk": 0,
                   "attributes": 0, "header": at} | member.central  # fmt: skip
        directory += struct.pack(
            "<4s6H3L5H2L", central["magic"], 0, 0, central["flags"], central["method"], 0, 0,
            central["crc"], central["packed"], central["size"], len(central["name"]),
            len(central["extra"]), len(central["comment"]), central["disk"], 0,
            central["attributes"], central["header"],
        ) + central["name"] + central["extra"] + central["comment"]  # fmt: skip
    begin = len(out) + len(gap)
    out += gap + directory
    record = {"count": len(parts), "length": len(directory), "begin": begin, "comment": b"",
              "disk": 0, "count64": len(parts), "begin64": begin, "locator": len(out)}  # fmt: skip
    record |= end or {}
    if zip64:
        out += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, record["count64"],
                           record["count64"], record["length"], record["begin64"])  # fmt: skip
        out += struct.pack("<4sLQL", b"PK\6\7", 0, record["locator"], 1)
    out += struct.pack("<4s4H2LH", b"PK\5\6", record["disk"], 0, record["count"] & 0xFFFF,
                       record["count"] & 0xFFFF, record["length"], record["begin"],
                       len(record["comment"]))  # fmt: skip
    return bytes(out + record["comment"] + back)


def pack_legacy(value=None, storages=None, *, magic=0x1950A86A20F9469CFC6C, version=1001,
                system=None, keys=None, back=b"") -> bytes:  # fmt: skip
    """The layout before PyTorch 1.6; storages are (count, bytes)."""
    storages = {"0": (6, SIX)} if storages is None else storages
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    content = {"w": tensor(stored=storage(extra=(None,)))} if value is None else value
    out = program(magic) + program(version) + program(system)
    out += content if isinstance(content, bytes) else program(content)
    out += program(sorted(storages) if keys is None else keys)
    for key in sorted(storages):
        count, data = storages[key]
        out += struct.pack("<q", count) + data
    return out + back
