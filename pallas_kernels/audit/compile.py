"""Compiles a jitted function for a described GPU, ahead of time and without one.

XLA's CUDA compiler comes as a jax plugin that registers itself even under JAX_PLATFORMS=cpu, and
takes a description in place of a device. It leaves the PTX; ptxas, the assembler XLA itself would
call, gives registers and spills; nvdisasm gives the machine code. All are pip packages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from pallas_kernels.audit import sass
from pallas_kernels.audit.quiet import quiet
from pallas_kernels.audit.targets import Target
from pallas_kernels.audit.traffic import Traffic, traffic

_CALL = re.compile(r"custom_call @__gpu\$xla\.gpu\.triton\(")
_FIELD = re.compile(r'\b(name|num_warps|num_stages|grid_x|grid_y|grid_z) = "?([\w.$-]+)')
_ENTRY = re.compile(r"\.visible \.entry ([\w$]+)\(")
_PTX_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_PTXAS = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers"
)
_THUNK = re.compile(
    r"\] (?P<name>[\w$]+) grid: \[[\d, ]+\] threads: \[(?P<threads>\d+),"
    r".*?shared_memory: (?P<shared>\d+)"
)


class ToolError(RuntimeError):
    """A piece of the compiler is missing or failed; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled Pallas-Triton kernel.

    `spill_bytes`: stores and loads, per thread. `shared_bytes`: what a block is launched with.
    `others`: the kernels XLA put around it in the same program; `traffic`: the whole program's.
    """

    name: str
    target: Target
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    others: tuple[str, ...]
    traffic: Traffic
    function: sass.Function = dataclasses.field(repr=False)
    listing: str = dataclasses.field(repr=False)

    @property
    def blocks(self) -> int:
        """Programs of the grid."""
        return int(np.prod(self.grid))


def compile_kernels(fn: Callable, specs, target: Target) -> list[Kernel]:
    """Compiles fn(*specs) and returns its Pallas-Triton kernels in the order of their calls.

    Args:
        fn: any function of arrays whose trace calls Pallas-Triton kernels.
        specs: jax.ShapeDtypeStruct (or pytrees of them), one per argument.
        target: the GPU.

    Raises:
        ToolError: a piece of the compiler is missing, or fails.
        ValueError: the function calls no Pallas-Triton kernel.
    """
    mesh = _mesh(target)
    with _mesh_context(mesh), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(fn).lower(*_placed(specs, mesh))
        calls = _pallas_calls(lowered.as_text())
        if not calls:
            raise ValueError(f"{fn} calls no Pallas-Triton kernel")
        with quiet():
            compiled = lowered.compile(compiler_options=_dump_options(folder))
        moved = traffic(compiled.as_text() or "")
        return _read_dump(Path(folder), calls, target, moved)


def _read_dump(folder: Path, calls: list[dict[str, str]], target, moved: Traffic) -> list[Kernel]:
    thunks = "\n".join(file.read_text() for file in folder.glob("*thunk_sequence.txt"))
    launches = {match["name"]: match for match in _THUNK.finditer(thunks)}
    wanted, seen = {call["name"] for call in calls}, []
    found: dict[str, tuple[dict[str, tuple[int, int]], str]] = {}
    for file in sorted(folder.glob("*.ptx")):
        entries = _ENTRY.findall(text := file.read_text())
        seen += entries
        if wanted & set(entries):
            found |= dict.fromkeys(entries, assemble(text))
    if not seen:
        raise ToolError("XLA left no PTX: is jax's persistent compilation cache on?")
    if missing := wanted - set(found) | wanted - set(launches):
        raise ToolError(f"XLA's output lacks {sorted(missing)}; it has {seen}, {sorted(launches)}")
    return [_kernel(call, found[call["name"]], launches, seen, target, moved) for call in calls]


def _kernel(call, assembled, launches, seen, target, moved) -> Kernel:
    name = call["name"]
    per_kernel, listing = assembled
    registers, spill = per_kernel[name]
    return Kernel(
        name=name,
        target=target,
        grid=(int(call["grid_x"]), int(call["grid_y"]), int(call["grid_z"])),
        num_warps=int(launches[name]["threads"]) // 32,
        num_stages=int(call["num_stages"]),
        registers=registers,
        spill_bytes=spill,
        shared_bytes=int(launches[name]["shared"]),
        others=tuple(sorted(set(seen) - {name})),
        traffic=moved,
        function=sass.parse(listing)[name],
        listing=listing,
    )


def assemble(ptx: str) -> tuple[dict[str, tuple[int, int]], str]:
    """({kernel: (registers, bytes of spill stores and loads)}, the SASS listing) of a PTX text."""
    arch = _PTX_TARGET.search(ptx)
    if not arch:
        raise ToolError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        notes = _run(tool("ptxas"), f"-arch={arch[1]}", "-v", str(source), "-o", str(cubin))[1]
        listing = _run(tool("nvdisasm"), "-c", str(cubin))[0]
    return resources(notes), listing


def resources(notes: str) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes of spill stores and loads)}, a thread, as `ptxas -v` says."""
    return {
        match["name"]: (int(match["registers"]), int(match["stores"]) + int(match["loads"]))
        for match in _PTXAS.finditer(notes)
    }


def compile_program(
    fn: Callable, specs, target: Target, mesh: jax.sharding.Mesh | None = None
) -> jax.stages.Compiled:
    """Compiles fn(*specs) as it is, with Pallas kernels in it or without, for one GPU or several.

    Nothing is tuned without a device, so XLA's own products are all cuBLAS's: its Triton form has
    no default tile for some. Arguments and errors are those of `compile_kernels`, and a mesh of
    `described_devices`, on which specs lie as their `sharding` says, whole if they have none.
    """
    mesh = _mesh(target) if mesh is None else mesh
    options: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
    options["xla_gpu_cuda_data_dir"] = str(tool("ptxas").parents[1])
    with _mesh_context(mesh), quiet():
        return jax.jit(fn).lower(*_placed(specs, mesh)).compile(options)


def _placed(specs, mesh: jax.sharding.Mesh) -> tuple:
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(spec):
        sharding = getattr(spec, "sharding", None)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding or whole)

    return jax.tree.map(placed, tuple(specs))


@functools.cache
def tool(name: str) -> Path:
    """The path of ptxas or nvdisasm inside this environment's site-packages.

    Raises:
        ToolError: it is not installed.
    """
    for root in dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")):
        for path in sorted(Path(root, "nvidia").glob(f"*/bin/{name}")):
            return path
    raise ToolError(f"{name} is not installed; {INSTALL}")


INSTALL = "install the compiler pieces with: pip install 'lowbit-jax[audit]' (or make audit)"


def check_tools() -> None:
    """Refuses early where a piece of the compiler is missing.

    Raises:
        ToolError: names the piece and how to install it.
    """
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ToolError(f"jax-cuda12-plugin is not installed; {INSTALL}")
    tool("ptxas")
    tool("nvdisasm")


def _mesh(target: Target) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(described_devices(target)), ("gpu",))


@functools.cache
def described_devices(target: Target, count: int = 1) -> tuple:
    """Devices of one machine that need not be there: programs can be compiled for them.

    Raises:
        ToolError: as for `compile_kernels`.
    """
    check_tools()
    from jax.experimental import topologies

    with quiet():
        jax.devices()  # starts the CPU backend and registers the CUDA compiler
        described = topologies.get_topology_desc(
            target.name, platform="cuda", target_config=target.config(), topology=f"1x1x{count}"
        )
    return tuple(described.devices)


def _mesh_context(mesh: jax.sharding.Mesh):
    # from jax 0.11 on Pallas-Triton asks the mesh in force, and no device, what it lowers for
    return jax.set_mesh(mesh) if jax.__version_info__ >= (0, 11) else contextlib.nullcontext()


def _dump_options(folder: str) -> dict[str, str | bool]:
    # the ptxas read here is also the one XLA asks which PTX version to write
    options: dict[str, str | bool] = {
        "xla_dump_to": folder,
        "xla_gpu_cuda_data_dir": str(tool("ptxas").parents[1]),
    }
    if jax.__version_info__ >= (0, 11):  # PTX is then only left for the emitters asked for
        options["xla_dump_emitter_re"] = ".*"
    return options


def _pallas_calls(text: str) -> list[dict[str, str]]:
    """The fields of every distinct Triton call in a StableHLO text."""
    calls: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if _CALL.search(line):
            fields = dict(_FIELD.findall(re.sub(r'ir = "(?:[^"\\]|\\.)*"', "", line)))
            calls.setdefault(fields["name"], fields)
    return list(calls.values())


def _run(*command) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout, done.stdout + done.stderr
