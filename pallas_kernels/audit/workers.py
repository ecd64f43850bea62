"""Examines many cases in several processes.

Each is a `python -m pallas_kernels.audit worker` that reads jobs and writes findings, a JSON value
a line. Own processes, because XLA's CUDA compiler is only to be had where JAX_PLATFORMS was set
before jax was imported, and because a compiler that aborts then does not take the caller with it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import TextIO

from pallas_kernels.audit.cases import Case
from pallas_kernels.audit.compile import ToolError, check_tools
from pallas_kernels.audit.examine import Finding, examine
from pallas_kernels.audit.targets import target as find_target
from pallas_kernels.audit.timing import Block, Times
from pallas_kernels.tiles import Tile

Job = tuple[Case, str, Tile | None]
"""A case, the name of a target, and a tile or None for the op's own."""


class RefusedError(ToolError):
    """The kernel or the compiler refuses one case; another may go well."""


def examine_all(jobs: Iterable[Job], workers: int = 2) -> Iterator[Finding]:
    """Examines every job in this many processes; yields in their order, as they come.

    Raises:
        ValueError: a target that is not described, or no workers.
        ToolError: a piece of the compiler is missing, or fails.
    """
    for reply in attempt_all(jobs, workers):
        if isinstance(reply, RefusedError):
            raise reply
        yield reply


def attempt_all(jobs: Iterable[Job], workers: int = 2) -> Iterator[Finding | RefusedError]:
    """`examine_all` that yields the error of a refused case in its place, and goes on.

    Raises:
        ValueError: a target that is not described, or no workers.
        ToolError: a piece of the compiler is missing, or its process ends.
    """
    jobs = list(jobs)
    for _, name, _ in jobs:
        find_target(name)
    if workers < 1:
        raise ValueError(f"at least one worker is needed, got {workers}")
    check_tools()
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started = [_Worker() for _ in range(min(workers, len(jobs)))]
    for worker in started:
        idle.put(worker)

    def ask(job: Job) -> Finding | RefusedError:
        worker = idle.get()
        try:
            return worker.ask(job)
        except RefusedError as refused:
            return refused
        finally:
            idle.put(worker)

    pool = concurrent.futures.ThreadPoolExecutor(max(1, len(started)))
    try:
        yield from pool.map(ask, jobs)
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in started:
            worker.close()


def serve(jobs: TextIO, findings: TextIO) -> None:
    """A worker's loop: a job a line in, a finding or {"error": message} a line out."""
    for line in jobs:
        case, name, tile = json.loads(line)
        try:
            found = examine(Case(**case), find_target(name), tile and Tile(**tile))
            reply = dataclasses.asdict(found)
        except Exception as error:  # told to the caller, who raises
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=findings, flush=True)


def _finding(reply: dict) -> Finding:
    """A finding from its JSON."""
    parts = {"case": Case, "block": Block, "times": Times, "tile": Tile}
    for name, kind in parts.items():
        reply[name] = reply[name] and kind(**reply[name])
    return Finding(**reply)


class _Worker:
    """One process and its pipes."""

    def __init__(self):
        self._stderr = tempfile.TemporaryFile(mode="w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pallas_kernels.audit", "worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdin and self._process.stdout
        self._orders, self._replies = self._process.stdin, self._process.stdout

    def ask(self, job: Job) -> Finding:
        """Sends a job and waits for its finding."""
        case, name, tile = job
        order = [dataclasses.asdict(case), name, tile and dataclasses.asdict(tile)]
        try:
            print(json.dumps(order), file=self._orders, flush=True)
            reply = json.loads(self._replies.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._stderr.seek(0)
            said = self._stderr.read()[-2000:]
            raise ToolError(f"compiling {case} for {name} ended the compiler: {said}") from None
        if "error" in reply:
            raise RefusedError(f"{case.op} {case.shape} on {name}: {reply['error']}")
        return _finding(reply)

    def close(self) -> None:
        """Ends the process."""
        self._orders.close()
        self._replies.close()
        self._process.wait()
        self._stderr.close()
