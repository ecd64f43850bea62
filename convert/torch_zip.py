"""The layout of `torch.save` since PyTorch 1.6: a zip of stored members, checked byte by byte.

The members are `ROOT/data.pkl` (the object), `ROOT/data/KEY` (a storage each) and a few small
records. A zip says everything twice, in the directory at its end and before each member; here both
must agree, nothing may be compressed, and the members must follow each other from the first byte to
the directory without overlap or hole: no other reader can then see another file in these bytes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from convert.errors import CheckpointError
from convert.safetensors_header import quote
from convert.torch_pickle import Pickle, read_pickle

MAX_MEMBERS = 100_000
MAX_NAME = 1024  # bytes
MAX_DIRECTORY = 64 << 20
_END, _END64, _LOCATOR = (
    struct.Struct("<4s4H2LH"),
    struct.Struct("<4sQ2H2L4Q"),
    struct.Struct("<4sLQL"),
)
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 record"
_DESCRIPTOR, _UTF8 = 8, 0x800  # flags: sizes follow the data; the name is UTF-8
_FOLDER = 0x10  # an attribute by which other readers, torch's too, skip a member's data
_KNOWN = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment"}
_SERIAL = ".data/serialization_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member: `size` bytes from byte `start`; `flags`, `crc` and `header` are the directory's."""

    name: str
    size: int
    header: int
    flags: int
    crc: int
    start: int = -1


def read_zip(data: mmap.mmap, path: Path, size: int) -> tuple[Pickle, dict[str, int]]:
    """The object of a torch zip and where each of its storages begins (bytes, by key).

    Raises:
        CheckpointError: not such a zip, or one that says two things about the same bytes.
    """
    members = _Zip(data, path, size).members()
    if "data.pkl" not in members:
        _fail(path, f"holds no data.pkl, only {_listed(members)}: not made by torch.save")
    order = members.get("byteorder")
    if order is not None and data[order.start : order.start + min(order.size, 8)] != b"little":
        _fail(path, "its byteorder record is not 'little': written on a big-endian machine")
    found = {
        name.removeprefix("data/"): m for name, m in members.items() if name.startswith("data/")
    }
    strange = set(members) - _KNOWN - {_SERIAL} - {f"data/{key}" for key in found}
    if "constants.pkl" in strange:
        _fail(path, "is a TorchScript archive, which holds code: save the module's state_dict")
    if strange:
        _fail(path, f"holds {_listed(sorted(strange))}, which torch.save does not write")
    pickle = members["data.pkl"]
    content = read_pickle(data, path, pickle.start, pickle.start + pickle.size)
    if content.end != pickle.start + pickle.size:
        rest = pickle.start + pickle.size - content.end
        _fail(path, f"data.pkl has {rest} bytes after the end of its pickle")
    return content, _storages(path, content, found)


def _storages(path: Path, content: Pickle, found: dict[str, Member]) -> dict[str, int]:
    problems = []
    for key, storage in content.storages.items():
        if key not in found:
            problems.append(f"storage {quote(key)} is used, but there is no data/{quote(key)}")
        elif found[key].size != storage.nbytes:
            need = f"{storage.count} x {storage.dtype} = {storage.nbytes} bytes"
            problems.append(f"storage {quote(key)} needs {need}, its member has {found[key].size}")
    problems += [
        f"member data/{quote(key)} belongs to no tensor"
        for key in sorted(found.keys() - content.storages.keys())
    ]
    if problems:
        raise CheckpointError(path, problems)
    return {key: found[key].start for key in content.storages}


class _Zip:
    """Reads a zip's directory and checks it against the members themselves."""

    def __init__(self, data: mmap.mmap, path: Path, size: int):
        self.data, self.path, self.size = data, path, size

    def members(self) -> dict[str, Member]:
        """All members by their name below the one root folder, in the order of the file."""
        begin, end, count = self._directory()
        members = sorted(self._entries(begin, end, count), key=lambda member: member.header)
        starts = [member.header for member in members]
        if starts[:1] != [0]:
            _fail(self.path, "zip: no member begins at byte 0: bytes were added in front")
        found: dict[str, Member] = {}
        root = ""
        for member, stop in zip(members, [*starts[1:], begin], strict=True):
            member = self._locate(member, stop)
            folder, _, name = member.name.partition("/")
            root = root or folder
            if folder != root or not _plain(folder) or not all(map(_plain, name.split("/"))):
                _fail(
                    self.path,
                    f"zip: member {quote(member.name)} is not a plain name in the one folder "
                    f"{quote(root)}",
                )
            if name in found:
                _fail(self.path, f"zip: member {quote(member.name)} appears twice")
            found[name] = member
        return found

    def _directory(self) -> tuple[int, int, int]:
        """(first byte, byte after the last, entries) of the directory, which ends the file."""
        tail = self.size - _END.size
        if tail < 0 or self.data[tail : tail + 4] != b"PK\x05\x06":
            _fail(self.path, "zip: no directory at the end: truncated, or bytes were added")
        _, disk, disk0, here, count, length, begin, comment = self._unpack(_END, tail)
        end = tail
        at = tail - _LOCATOR.size
        if at >= 0 and self.data[at : at + 4] == b"PK\x06\x07":
            old = (here, count, length, begin)
            end, here, count, length, begin = self._directory64(at)
            full = (_FULL16, _FULL16, _FULL32, _FULL32)
            new = zip(old, (here, count, length, begin), full, strict=True)
            if any(short not in (long, limit) for short, long, limit in new):
                _fail(self.path, "zip: its two end records disagree")
        if disk or disk0 or here != count or comment:
            _fail(self.path, "zip: split over several files, or with a comment")
        if begin + length != end:
            text = f"directory of {length} bytes at {begin}, its end record lies at {end}"
            _fail(self.path, f"zip: {text}: damaged, or bytes were added in front")
        if count > MAX_MEMBERS or length > MAX_DIRECTORY or count * _ENTRY.size > length:
            limits = f"the limits are {MAX_MEMBERS} and {MAX_DIRECTORY}"
            _fail(self.path, f"zip: {count} members in a directory of {length} bytes; {limits}")
        return begin, end, count

    def _directory64(self, at: int) -> tuple[int, int, int, int, int]:
        """(where it lies, entries here, entries, bytes, start) of the zip64 end record."""
        _, disk, where, disks = self._unpack(_LOCATOR, at)
        if disk or disks != 1 or where != at - _END64.size:
            text = "zip: its zip64 locator does not point at the record before it"
            _fail(self.path, f"{text}: damaged, or bytes were added in front")
        magic, length, _, _, disk, disk0, here, count, nbytes, begin = self._unpack(_END64, where)
        if magic != b"PK\x06\x06" or length != _END64.size - 12 or disk or disk0:
            _fail(self.path, "zip: damaged zip64 end record")
        return where, here, count, nbytes, begin

    def _entries(self, at: int, end: int, count: int) -> list[Member]:
        members: list[Member] = []
        for _ in range(count):
            if at + _ENTRY.size > end:
                _fail(self.path, f"zip: the directory ends after {len(members)} of {count} members")
            fields = self._unpack(_ENTRY, at)
            magic, _, _, flags, method, _, _, crc, packed, size = fields[:10]
            names, extras, comment, disk, _, attributes, header = fields[10:]
            at += _ENTRY.size
            if magic != b"PK\x01\x02" or at + names + extras + comment > end:
                _fail(self.path, f"zip: damaged directory entry {len(members)}")
            name = self._name(at, names)
            extra = self.data[at + names : at + names + extras]
            at += names + extras + comment
            size, packed, header = self._widen(name, extra, size, packed, header)
            if method or packed != size:
                _fail(self.path, f"zip: member {quote(name)} is compressed; torch.save stores")
            if flags & ~(_DESCRIPTOR | _UTF8) or disk or comment:
                _fail(self.path, f"zip: member {quote(name)} is encrypted, split or commented")
            if attributes & _FOLDER:
                _fail(self.path, f"zip: member {quote(name)} is marked as a folder")
            member = Member(name=name, size=size, header=header, flags=flags, crc=crc)
            members.append(member)
        if at != end:
            _fail(self.path, f"zip: {end - at} bytes follow the last of {count} members")
        return members

    def _widen(self, name: str, extra: bytes, *sizes: int) -> list[int]:
        """Sizes with those that are all ones replaced from the zip64 extra field, in order."""
        wide = self._extra(name, extra).get(1, b"")
        needed = sum(size == _FULL32 for size in sizes)
        if len(wide) != 8 * needed:
            have = f"{len(wide)} bytes of zip64 sizes, {8 * needed} are needed"
            _fail(self.path, f"zip: member {quote(name)} has {have}")
        values = iter(struct.unpack(f"<{needed}Q", wide))
        return [next(values) if size == _FULL32 else size for size in sizes]

    def _extra(self, name: str, extra: bytes) -> dict[int, bytes]:
        fields: dict[int, bytes] = {}
        at = 0
        while at < len(extra):
            kind, length = struct.unpack("<2H", extra[at : at + 4].ljust(4, b"\xff"))
            at += 4 + length
            if at > len(extra) or kind in fields:
                _fail(self.path, f"zip: member {quote(name)} has a damaged extra field")
            fields[kind] = extra[at - length : at]
        return fields

    def _locate(self, member: Member, stop: int) -> Member:
        """The member with its data's start, after comparing its own header with the directory."""
        label = f"zip: member {quote(member.name)}"
        if member.header + _LOCAL.size > stop:
            _fail(self.path, f"{label} has no room for its header before byte {stop}")
        fields = self._unpack(_LOCAL, member.header)
        magic, _, flags, method, _, _, crc, packed, size, names, extras = fields
        name_at = member.header + _LOCAL.size
        start = name_at + names + extras
        if magic != b"PK\x03\x04":
            _fail(self.path, f"{label} has no header at byte {member.header}")
        if start + member.size > stop:
            _fail(self.path, f"{label} of {member.size} bytes overlaps what begins at byte {stop}")
        name = self._name(name_at, names)
        if (name, flags, method) != (member.name, member.flags, 0):
            _fail(self.path, f"{label} is called {quote(name)} in its own header, or differs there")
        sizes = self._claimed(member, self.data[name_at + names : start], packed, size)
        true = (member.crc, member.size, member.size)
        after = self.data[start + member.size : stop] if stop - start - member.size <= 24 else b"-"
        if flags & _DESCRIPTOR:
            agree = (crc, *sizes) in ((0, 0, 0), true) and _is_descriptor(after, true)
        else:
            agree = (crc, *sizes) == true and not after
        if not agree:
            here = f"{sizes[1]} bytes in its own header, {member.size} in the directory"
            _fail(self.path, f"{label} has {here}, or something follows it: damaged")
        return replace(member, start=start)

    def _claimed(self, member: Member, extra: bytes, packed: int, size: int) -> tuple[int, int]:
        """(stored, real) size in a member's own header, or in its zip64 field."""
        wide = self._extra(member.name, extra).get(1, b"")
        values = struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8])
        # PyTorch writes the field for the size or the place of a member over 4 GB, or for both,
        # and leaves the stored size in it, and those in the header, at zero
        if len(wide) % 8 or not set(values) <= {0, member.size, member.header}:
            _fail(self.path, f"zip: member {quote(member.name)} has other zip64 sizes of its own")
        if size == packed == _FULL32 and len(values) > 1:
            return values[1], values[0]
        return packed, size

    def _name(self, at: int, length: int) -> str:
        try:
            if not 0 < length <= MAX_NAME:
                raise ValueError
            return self.data[at : at + length].decode()
        except ValueError:  # UnicodeDecodeError too
            _fail(self.path, f"zip: a name of {length} bytes at {at} is empty, long or not UTF-8")

    def _unpack(self, form: struct.Struct, at: int) -> tuple:
        if not 0 <= at <= self.size - form.size:
            _fail(self.path, f"zip: a record of {form.size} bytes at {at} leaves the file")
        return form.unpack(self.data[at : at + form.size])


def _is_descriptor(raw: bytes, true: tuple[int, int, int]) -> bool:
    """Whether bytes after a member repeat its checksum and sizes, in 32 bits or in 64."""
    return raw[:4] == b"PK\x07\x08" and raw[4:] in {
        struct.pack(form, *true) for form in ("<LQQ", "<LLL")[: 1 + (true[1] < 2**32)]
    }


def _plain(part: str) -> bool:
    return part not in ("", ".", "..") and not set(part) & set("\\\0") and part.isprintable()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(quote, names[:5])) + more


def _fail(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(path, problem)
