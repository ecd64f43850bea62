"""Hostile zips and legacy files: what says two things about the same bytes is refused by name."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from convert.errors import CheckpointError
from convert.torch_file import TorchFile
from tests.references.torch_files import (
    SIX,
    Member,
    members,
    pack_legacy,
    pack_zip,
    program,
    storage,
    tensor,
)

EXPECTED = np.arange(6, dtype=np.float32).reshape(2, 3)


def refused(tmp_path: Path, raw: bytes, *expected: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    for text in (str(path), *expected):
        assert text in str(caught.value)


def changed(at: int = 2, /, **changes) -> list[Member]:
    """The usual members, with fields of one (by default the storage) changed."""
    parts = members()
    for field, value in changes.items():
        setattr(parts[at], field, value)
    return parts


def both(**fields) -> list[Member]:
    return changed(local=fields, central=fields)


def zip64(*values: int) -> bytes:
    return struct.pack("<2H", 1, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


def deflated() -> bytes:
    """A good zip by Python's own writer, compressed."""
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members():
            archive.writestr(member.name, member.data + b"\0" * 10**6 * member.name.endswith("/0"))
    return file.getvalue()


def overlapping() -> bytes:
    """Two storages of which the second one's header lies in the data of the first."""
    inner = pack_zip([Member("archive/data/1", SIX, descriptor=False)], zip64=False)
    local = inner[: inner.index(SIX) + 24]
    parts = members(program({"w": tensor()}), {"0": b"\0" * 64 + local})
    raw = bytearray(pack_zip(parts))
    start = raw.index(local)
    parts = members(program({"w": tensor()}), {"0": b"\0" * 64 + local, "1": SIX})
    parts[3].central = {"header": start}
    return pack_zip(parts)


CRC = zlib.crc32(SIX)
FULL = {"size": 2**32 - 1, "packed": 2**32 - 1}  # "see the zip64 field"
HOSTILE = {
    "compressed": (deflated(), "is compressed; torch.save stores"),
    "compressed, says the directory": (
        pack_zip(changed(central={"method": 8})), "'archive/data/0' is compressed"),
    "compressed, says the member": (pack_zip(changed(local={"method": 8})), "or differs there"),
    "a bomb": (pack_zip(changed(central={"size": 2**31})), "is compressed"),
    "larger, in the directory": (
        pack_zip(changed(central={"size": 28, "packed": 28})), "something follows it: damaged"),
    "smaller, in the directory": (
        pack_zip(changed(central={"size": 20, "packed": 20})), "something follows it: damaged"),
    "4 GB, in the directory": (
        pack_zip(changed(central={"size": 2**32 - 2, "packed": 2**32 - 2})),
        "overlaps what begins at byte"),
    "larger, in the member": (
        pack_zip(changed(local={"size": 28, "packed": 28, "crc": CRC})),
        "28 bytes in its own header, 24 in the"),
    "another checksum": (pack_zip(changed(local={"size": 24, "packed": 24, "crc": 1})), "damaged"),
    "another checksum after it": (
        pack_zip(changed(tail=b"PK\7\10" + struct.pack("<3L", 1, 24, 24))), "damaged"),
    "another size after it": (
        pack_zip(changed(tail=b"PK\7\10" + struct.pack("<3L", CRC, 24, 25))), "damaged"),
    "nothing after it": (pack_zip(changed(tail=b"")), "damaged"),
    "too much after it": (
        pack_zip(changed(tail=b"PK\7\10" + struct.pack("<3L", CRC, 24, 24) + b"\0" * 4)),
        "damaged"),
    "a hole after it": (pack_zip(changed(tail=b"\0" * 100)), "something follows it"),
    "without descriptor, with one": (
        pack_zip(changed(descriptor=False, tail=b"x" * 16)), "damaged"),
    "another name in the member": (
        pack_zip(changed(local={"name": b"archive/data/1"})),
        "is called 'archive/data/1' in its own header"),
    "other flags in the member": (
        pack_zip(changed(local={"flags": 0x808 | 1})), "or differs there"),
    "encrypted": (pack_zip(both(flags=0x809)), "is encrypted, split or commented"),
    "another disk": (pack_zip(changed(central={"disk": 1})), "is encrypted, split or commented"),
    "a folder": (pack_zip(changed(central={"attributes": 0x10})), "is marked as a folder"),
    "a commented member": (
        pack_zip(changed(central={"comment": b"hi"})), "is encrypted, split or commented"),
    "no member there": (pack_zip(changed(local={"magic": b"PK\3\5"})), "has no header at byte"),
    "no entry there": (
        pack_zip(changed(central={"magic": b"PK\1\3"})), "damaged directory entry 2"),
    "a member outside": (
        pack_zip(changed(central={"header": 2**31})), "something follows it: damaged"),
    "a member in another": (overlapping(), "'archive/data/0' of 152 bytes overlaps"),
    "two entries for one member": (
        pack_zip(changed(central={"header": 0})), "no room for its header before byte 0"),
    "a zip64 field nobody needs": (
        pack_zip(changed(central={"extra": zip64(24)})),
        "has 8 bytes of zip64 sizes, 0 are needed"),
    "no zip64 field": (
        pack_zip(changed(central=FULL)),
        "has 0 bytes of zip64 sizes, 16 are needed"),
    "a zip64 size that lies": (
        pack_zip(changed(central={**FULL, "extra": zip64(2**40, 2**40)})),
        "of 1099511627776 bytes overlaps what"),
    "a zip64 size of 2**64 - 1": (
        pack_zip(changed(central={**FULL, "extra": zip64(2**64 - 1, 2**64 - 1)})),
        "overlaps what begins at byte"),
    "a zip64 place that lies": (
        pack_zip(changed(central={"header": 2**32 - 1, "extra": zip64(2**50)})),
        "something follows it"),
    "a zip64 size of the member that lies": (
        pack_zip(changed(padding=zip64(25))), "has other zip64 sizes of its own"),
    "a torn extra field": (pack_zip(changed(padding=b"FB\xff\xff")), "has a damaged extra field"),
    "an extra field twice": (
        pack_zip(changed(padding=zip64(24) + zip64(24))), "has a damaged extra field"),
    "a byte in front": (pack_zip(members(), front=b"\0"), "not as a file of torch.save does"),
    "a zip in front": (
        pack_zip(members(), front=b"PK\3\4" + b"\0" * 26), "no member begins at byte 0"),
    "a zip moved": (b"PK\3\4" + pack_zip(members()), "bytes were added in front"),
    "a byte before the directory": (pack_zip(members(), gap=b"\0" * 30), "something follows it"),
    "a byte at the end": (pack_zip(members(), back=b"\0"), "no directory at the end"),
    "two zips": (pack_zip(members()) * 2, "bytes were added in front"),
    "a comment": (pack_zip(members(), end={"comment": b"hi"}), "no directory at the end"),
    "several disks": (pack_zip(members(), end={"disk": 1}), "split over several files"),
    "fewer entries": (
        pack_zip(members(), end={"count": 3, "count64": 3}), "bytes follow the last of 3 members"),
    "more entries": (
        pack_zip(members(), end={"count": 5, "count64": 5}), "the directory ends after 4 of 5"),
    "a million entries": (
        pack_zip(members(), end={"count": 2**16 - 1, "count64": 10**6}),
        "1000000 members in a directory of"),
    "two counts": (pack_zip(members(), end={"count64": 5}), "its two end records disagree"),
    "two places": (pack_zip(members(), end={"begin64": 5}), "its two end records disagree"),
    "a locator elsewhere": (
        pack_zip(members(), end={"locator": 0}), "zip64 locator does not point at"),
    "a directory elsewhere": (
        pack_zip(members(), end={"begin": 0}, zip64=False), "its end record lies at"),
    "a directory beyond": (
        pack_zip(members(), end={"length": 2**32 - 2}, zip64=False), "its end record lies at"),
    "a torn file": (pack_zip(members())[:-40], "no directory at the end"),
    "only a magic": (b"PK\3\4", "no directory at the end"),
    "an absolute name": (
        pack_zip(members(root="/archive")), "is not a plain name in the one folder"),
    "a climbing name": (pack_zip(members(**{"data/../../x": b""})), "is not a plain name"),
    "a root that climbs": (pack_zip(members(root="..")), "is not a plain name"),
    "no root": (pack_zip([Member("data.pkl", program({}))]), "is not a plain name"),
    "a backslash": (pack_zip(members(**{"data\\x": b""})), "is not a plain name"),
    "a NUL": (pack_zip(members(**{"data.pkl\0": b""})), "is not a plain name"),
    "an empty name": (pack_zip([Member("", b"")]), "a name of 0 bytes"),
    "a long name": (pack_zip([Member("a/" + "b" * 5000, b"")]), "a name of 5002 bytes"),
    "a name not UTF-8": (pack_zip(both(name=b"archive/\xff")), "is empty, long or not UTF-8"),
    "two roots": (
        pack_zip([*members(), Member("other/data/1", b"")]),
        "is not a plain name in the one folder 'archive'"),
    "a name twice": (
        pack_zip([*members(), Member("archive/data/0", SIX)]), "'archive/data/0' appears twice"),
    "two pickles": (
        pack_zip([*members(), Member("archive/data.pkl", program({}))]),
        "'archive/data.pkl' appears twice"),
    "no pickle": (
        pack_zip(members()[1:]), "holds no data.pkl, only 'byteorder', 'data/0', 'version'"),
    "big-endian": (pack_zip(members(byteorder=b"big")), "its byteorder record is not 'little'"),
    "no byte order": (pack_zip(members(byteorder=b"")), "its byteorder record is not 'little'"),
    "TorchScript": (
        pack_zip(members(**{"constants.pkl": b"", "code/__torch__.py": b""})),
        "is a TorchScript archive"),
    "something else": (
        pack_zip(members(**{"extra/notes.txt": b"hi"})),
        "holds 'extra/notes.txt', which torch.save does not"),
    "a storage nobody uses": (
        pack_zip(members(storages={"0": SIX, "7": b"1"})), "member data/'7' belongs to no tensor"),
    "no such storage": (
        pack_zip(members(storages={})), "storage '0' is used, but there is no data/'0'"),
    "a short storage": (
        pack_zip(members(storages={"0": SIX[:-1]})),
        "needs 6 x float32 = 24 bytes, its member has 23"),
    "a long storage": (
        pack_zip(members(storages={"0": SIX + b"\0"})),
        "needs 6 x float32 = 24 bytes, its member has 25"),
    "a huge storage": (
        pack_zip(members(program({"w": tensor(stored=storage(count=2**62))}))),
        "= 18446744073709551616 bytes, its member has 24"),
    "a web page": (b"<!DOCTYPE html>", "is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "nothing": (b"", "starts b'', not as a file of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_zip(tmp_path: Path, case: str):
    refused(tmp_path, *HOSTILE[case])


LEGACY = {
    "another magic": (pack_legacy(magic=1), "is a Python pickle, but not one that torch.save"),
    "a plain pickle": (program({"w": 1}), "is a Python pickle, but not one that torch.save wrote"),
    "another version": (pack_legacy(version=1002), "the version is not 1001"),
    "big-endian": (pack_legacy(system={"little_endian": False}), "on a big-endian machine"),
    "no system": (pack_legacy(system=3), "on a big-endian machine"),
    "keys in a dict": (pack_legacy(keys={}), "keys are not a list of strings"),
    "numbers as keys": (pack_legacy(keys=[0]), "keys are not a list of strings"),
    "a key twice": (pack_legacy(keys=["0", "0"]), "a storage's key appears twice"),
    "no key": (pack_legacy(keys=[]), "storage '0' is used and not stored, or"),
    "a key too many": (pack_legacy(keys=["0", "1"]), "storage '1' is used and not stored, or"),
    "a count that lies": (pack_legacy(storages={"0": (7, SIX)}), "7 elements where it lies, 6"),
    "a count below zero": (pack_legacy(storages={"0": (-1, SIX)}), "elements where it lies, 6"),
    "a short storage": (pack_legacy(storages={"0": (6, SIX[:-1])}), "ends at byte "),
    "a long storage": (pack_legacy(storages={"0": (6, SIX + b"\0")}), "1 trailing bytes after"),
    "no storage": (pack_legacy()[:-32], "damaged or truncated"),
    "bytes after it": (pack_legacy(back=b"1234"), "4 trailing bytes after the last storage"),
    "cut in its first pickle": (pack_legacy()[:10], "are left: truncated"),
}


@pytest.mark.parametrize("case", LEGACY)
def test_hostile_legacy_file(tmp_path: Path, case: str):
    refused(tmp_path, *LEGACY[case])


def test_the_builders_make_what_is_read(tmp_path: Path):
    """So that each case above is refused for its own change; and other writers' good zips."""
    plain = [Member(part.name, part.data, descriptor=False) for part in members()]
    wide = [part for part in members() if "data/" not in part.name]
    both64 = b"PK\7\10" + struct.pack("<LQQ", CRC, 24, 24)
    wide.append(Member("archive/data/0", SIX, tail=both64, padding=zip64(24, 0)))
    whole = {**FULL, "extra": zip64(24, 24)}
    good = {
        "usual": pack_zip(members()),
        "unaligned": pack_zip([Member(p.name, p.data, padding=b"FB\1\0Z") for p in members()]),
        "without descriptors": pack_zip(plain, zip64=False),
        "sizes of 64 bits after it": pack_zip(wide),
        "sizes of 64 bits": pack_zip(
            [*plain[:2], Member("archive/data/0", SIX, descriptor=False, central=whole,
                                local={"crc": CRC, **whole}), plain[3]]
        ),
        "legacy": pack_legacy(),
    }  # fmt: skip
    for case, raw in good.items():
        path = tmp_path / f"{case}.pt"
        path.write_bytes(raw)
        with TorchFile(path) as file:
            np.testing.assert_array_equal(file.read("w"), EXPECTED)
            assert file.read("w").flags.aligned
    path = tmp_path / "python.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members():
            archive.writestr(member.name, member.data)
    with TorchFile(path) as file:
        np.testing.assert_array_equal(file.read("w"), EXPECTED)


def test_booleans_hold_0_or_1(tmp_path: Path):
    flags = tensor((2,), (2,), stored=storage(kind="torch.BoolStorage", count=3))
    for stored, wanted in ((b"\1\2\0", [True, False]), (b"\0\0\2", None)):
        path = tmp_path / "a.pt"
        path.write_bytes(pack_zip(members(program({"w": flags}), {"0": stored})))
        with TorchFile(path) as file:
            if wanted is None:
                with pytest.raises(CheckpointError, match="BOOL holds the byte 2, not 0 or 1"):
                    file.read("w")
            else:
                assert file.read("w").tolist() == wanted and file.read("w").dtype == np.bool_


def test_a_member_over_4_gb_as_torch_writes_it(tmp_path: Path):
    """Its size in a zip64 field, and the places of all members after it; here mostly a hole."""
    size, path = 2**32 + 5, tmp_path / "big.pt"
    value = {"a": tensor((size,), (1,), stored=storage("0", size, "torch.ByteStorage")),
             "w": tensor(stored=storage("1"))}  # fmt: skip
    pickled = program(value)
    directory = b""
    with path.open("wb") as file:
        for name, data, nbytes in (
            (b"big/data.pkl", pickled, len(pickled)), (b"big/data/0", b"\7", size),
            (b"big/data/1", SIX, 24),
        ):  # fmt: skip
            at, large = file.tell(), nbytes >= 2**32
            extra = zip64(*[nbytes, 0] * large, *[at] * (at >= 2**32))
            extra = extra if large or at >= 2**32 else b""
            head = struct.pack("<5H3L2H", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), len(extra))
            file.write(b"PK\3\4" + head + name + extra + data)
            file.seek(nbytes - len(data), os.SEEK_CUR)
            form = "<LQQ" if large or at >= 2**32 else "<3L"
            file.write(b"PK\7\10" + struct.pack(form, 0, nbytes, nbytes))
            extra = zip64(*[nbytes, nbytes] * large, *[at] * (at >= 2**32)) if extra else b""
            short = 2**32 - 1 if large else nbytes
            directory += b"PK\1\2" + struct.pack(
                "<6H3L5H2L", 0, 0, 0x808, 0, 0, 0, 0, short, short, len(name), len(extra), 0, 0, 0,
                0, min(at, 2**32 - 1),
            ) + name + extra  # fmt: skip
        begin, count = file.tell(), 3
        file.write(directory)
        end = begin + len(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count,
                               len(directory), begin))  # fmt: skip
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory),
                               2**32 - 1, 0))  # fmt: skip
    with TorchFile(path) as file:
        assert file.size > 2**32 and file.info("a").nbytes == size
        assert file.read("a")[0] == 7
        np.testing.assert_array_equal(file.read("w"), EXPECTED)
