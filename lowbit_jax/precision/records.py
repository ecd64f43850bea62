"""The file of a sensitivity scan: a line of JSON that says what was run, then one per candidate.

A line is appended and synced when its candidate is done, so a scan that was cut goes on after the
last whole line. Nothing in the file depends on time or on what was resumed: equal scans give equal
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit_jax.precision.menu import level_name
from lowbit_jax.precision.units import Unit
from lowbit_jax.quant.recipe import WeightSpec

FORMAT = "lowbit-jax sensitivity"
VERSION = 1
MSE = "mse"  # the scan's own measure; every other comes from the scorer


class ScanError(ValueError):
    """A scan, or its file, that is damaged, incomplete or not of the settings it is used with."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One unit with its weights, or its activations, quantised in one timestep range.

    Attributes:
        unit: its name.
        level: of its weights, see `menu.level_name`; None for an activation candidate.
        act_bits: of its activations; None for a weight candidate.
        range: number of the timestep range.
    """

    unit: str
    level: str | None
    act_bits: int | None
    range: int

    def __str__(self) -> str:
        what = self.level or f"int{self.act_bits} activations"
        return f"{self.unit}, {what}, range {self.range}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was scanned and how.

    Attributes:
        model: name of the network in `lowbit_jax.models.registry`.
        config: its config fields.
        units: all of them.
        menu: weight levels.
        act_bits: activation levels; empty: none were tried.
        ranges: edges of the timestep ranges.
        samples: how many were sampled with each candidate.
        settings: everything else that must be equal for a scan to be gone on with, by name: digests
            of run, parameters and samples, the scorer's name.
        reference: the floating model's score of every sample, by metric.
    """

    model: str
    config: dict[str, Any]
    units: tuple[Unit, ...]
    menu: tuple[WeightSpec, ...]
    act_bits: tuple[int, ...]
    ranges: tuple[float, ...]
    samples: int
    settings: dict[str, Any]
    reference: dict[str, list[float]]

    def candidates(self) -> list[Candidate]:
        """All of them, in the order they are run: late ranges last, weights before activations."""
        levels: list[tuple[str | None, int | None]] = [(level_name(s), None) for s in self.menu]
        levels += [(None, bits) for bits in self.act_bits]
        return [
            Candidate(unit=unit.name, level=level, act_bits=bits, range=r)
            for level, bits in levels
            for r in range(len(self.ranges) - 1)
            for unit in self.units
        ]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Header:
        """Inverse of `to_json`.

        Raises:
            ScanError: not the first line of such a file, or of another version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ScanError("its first line does not say that it is a sensitivity file")
        if data.get("version") != VERSION:
            raise ScanError(f"it has version {data.get('version')}, this library reads {VERSION}")
        try:
            return Header(
                model=data["model"],
                config=data["config"],
                units=tuple(Unit(**{**u, "layers": tuple(u["layers"])}) for u in data["units"]),
                menu=tuple(WeightSpec(**spec) for spec in data["menu"]),
                act_bits=tuple(data["act_bits"]),
                ranges=tuple(data["ranges"]),
                samples=data["samples"],
                settings=data["settings"],
                reference=data["reference"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ScanError(f"its first line is malformed: {error}") from None

    def check_same(self, other: Header) -> None:
        """That `other`, of a file, is of the same scan; of a header without reference, all else.

        Raises:
            ScanError: names the first setting that differs, with both values.
        """
        ours, theirs = self.to_json(), other.to_json()
        reference = ours.pop("reference"), theirs.pop("reference")
        for part in (ours, theirs):
            part |= part.pop("settings")
        for name in dict.fromkeys((*ours, *theirs)):
            _check_same(name, ours.get(name), theirs.get(name))
        if self.reference:
            for name in dict.fromkeys((*reference[0], *reference[1])):
                _check_same(f"the float model's '{name}'", *(part.get(name) for part in reference))


def _check_same(name: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        short = [
            text if len(text) <= 80 else f"{text[:77]}..." for text in map(str, (theirs, ours))
        ]
        raise ScanError(
            f"{name} is {short[0]} in the file and {short[1]} here: scan into another file, or "
            "resume with the settings it was begun with"
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one candidate gave.

    Attributes:
        candidate: which.
        mse: mean squared difference of each sample to the floating model's, before any decoding.
        scores: of each sample, by metric.
    """

    candidate: Candidate
    mse: list[float]
    scores: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {**asdict(self.candidate), MSE: self.mse, "scores": self.scores}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """Inverse of `to_json`."""
        fields = {name: data[name] for name in ("unit", "level", "act_bits", "range")}
        return Record(candidate=Candidate(**fields), mse=data[MSE], scores=data["scores"])


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[Candidate, Record]]:
    """A file's header and records; a last line without its end, of a killed scan, is left out.

    Raises:
        ScanError: no such file, or one that is damaged: names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError(f"{path}: no such file")
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        raise ScanError(f"{path}: its first line is not whole; delete the file and scan again")
    try:
        header = Header.from_json(json.loads(lines[0]))
    except (ScanError, ValueError) as error:
        raise ScanError(f"{path}: {error}") from None
    known = set(header.candidates())
    records: dict[Candidate, Record] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            record = Record.from_json(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ScanError(f"{path}, line {number}: malformed ({error})") from None
        problem = _problem(record, header, known, records)
        if problem:
            raise ScanError(f"{path}, line {number}: {problem}")
        records[record.candidate] = record
    return header, records


def _problem(record: Record, header: Header, known: set, records: Mapping) -> str | None:
    if record.candidate not in known:
        return f"{record.candidate} is no candidate of this scan"
    if record.candidate in records:
        return f"{record.candidate} is there twice"
    found = {name: len(values) for name, values in (record.scores | {MSE: record.mse}).items()}
    wanted = dict.fromkeys((*header.reference, MSE), header.samples)
    return None if found == wanted else f"{record.candidate} has the scores {found}, not {wanted}"


def check_begun(path: Path, header: Header, resume: bool) -> None:
    """Whether a scan can begin, or go on, in a file: before anything is run.

    Raises:
        ScanError: the file is there and `resume` is off, or its scan is another: names the setting.
    """
    if path.exists() and not resume:
        raise ScanError(f"{path} is there already: resume it, or name another file")
    if path.exists():
        header.check_same(read(path)[0])


class Appender:
    """Writes the file, a synced line at a time."""

    def __init__(self, path: Path, header: Header):
        """Begin a file, or cut off what is not whole of one to be gone on with.

        Raises:
            ScanError: the file is of another scan.
        """
        self.done: dict[Candidate, Record] = {}
        self._path = path
        if path.exists():
            there, self.done = read(path)
            header.check_same(there)
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(header.to_json())

    def add(self, record: Record) -> None:
        """Append one candidate's line."""
        self._append(record.to_json())
        self.done[record.candidate] = record

    def _append(self, data: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(data, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
