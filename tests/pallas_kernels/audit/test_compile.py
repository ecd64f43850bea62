"""How the answers of XLA, ptxas and nvdisasm are read; end to end where they are installed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.audit import compile as compiler
from pallas_kernels.audit import workers
from pallas_kernels.audit.cases import Case
from pallas_kernels.audit.targets import target
from pallas_kernels.tiles import Tile

FIXTURES = Path(__file__).parent / "fixtures"


def compiler_is_here():
    try:
        compiler.check_tools()
    except compiler.ToolError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not compiler_is_here(), reason="the compiler pieces (the extra 'audit') are not installed"
)


def test_registers_and_spills_of_every_kernel():
    found = compiler.resources((FIXTURES / "ptxas.txt").read_text(encoding="utf-8"))
    assert found == {"ternary_matmul": (32, 14088 + 14540), "input_reduce_fusion": (27, 0)}


def test_a_missing_piece_names_what_to_install(monkeypatch):
    monkeypatch.setattr(
        compiler.sysconfig, "get_paths", lambda: {"purelib": "/no", "platlib": "/no"}
    )
    compiler.tool.cache_clear()
    try:
        with pytest.raises(compiler.ToolError, match=r"ptxas.*lowbit-jax\[audit\]"):
            compiler.tool("ptxas")
    finally:
        compiler.tool.cache_clear()


def test_a_description_names_the_gpu_and_its_capability():
    text = target("h100").config()
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "core_count: 132" in text and "shared_memory_per_block_optin: 232448" in text
    assert "major: 8 minor: 6 feature_extension: NONE" in target("a10").config()


def test_a_worker_answers_every_line_and_survives_a_refusal(monkeypatch):
    def examine(case, gpu, tile):
        raise ValueError(f"{case.op} on {gpu.name} with {tile}")

    monkeypatch.setattr(workers, "examine", examine)
    case = {"op": "int8_a8", "m": 1, "k": 2, "n": 3}
    jobs, replies = [json.dumps([case, "a100", None])] * 2, io.StringIO()
    workers.serve(jobs, replies)
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [
        {"error": "ValueError: int8_a8 on a100 with None"}
    ] * 2


@pytest.mark.slow
@needs_compiler
def test_end_to_end():
    jobs = [
        (Case("int8_a8", 4608, 3072, 3072), "a100", Tile(128, 128, 64, 8, 4)),
        (Case("int8_a8", 4608, 3072, 3072), "h100", Tile(128, 128, 64, 8, 4)),
        (Case("ternary_a8", 1, 3072, 9216), "a100", None),
        (Case("quantize_rows", 1024, 1152, 0), "a100", None),
        (Case("ternary_a8", 64, 256, 256), "a100", Tile(64, 64, 64, 4, 3)),
    ]
    int8, hopper, one_row, rows, refused = workers.attempt_all(jobs)
    # the published rates make this loop exactly tensor-bound: 32 products of 8 cycles
    assert int8.products == {"IMMA.16832.S8.S8": 32} and int8.bound == 1.0
    assert int8.blocks_per_sm == 2 and int8.registers <= 128 and int8.spill_bytes == 0
    assert int8.blocks == 36 * 24 and int8.shared_bytes == 3 * (128 + 128) * 64
    assert all(kind.startswith("IGMMA.64x128x32") for kind in hopper.products)
    weights = 9216 * 3072 // 4
    assert weights < one_row.minimum < one_row.moved < 1.05 * weights
    assert one_row.repeats == 1.0
    assert rows.products == {} and rows.tile is None
    assert isinstance(refused, workers.RefusedError) and "tile.k must be 128" in str(refused)


@pytest.mark.slow
@needs_compiler
def test_probe_prints_its_line():
    command = "-m pallas_kernels.audit probe pallas_kernels.quantize_rows:quantize_rows"
    done = subprocess.run(
        [sys.executable, *command.split(), "bfloat16[64,256]", "--target", "l20"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identity_quantize_rows l20: ") and " 0 B spilled" in done.stdout


@pytest.mark.slow
@needs_compiler
def test_a_function_without_a_kernel_is_refused():
    script = (
        "import jax, jax.numpy as jnp\n"
        "from pallas_kernels.audit.compile import compile_kernels\n"
        "from pallas_kernels.audit.targets import target\n"
        "try: compile_kernels(jnp.sin, [jax.ShapeDtypeStruct((8,), jnp.float32)], target('a100'))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert "calls no Pallas-Triton kernel" in done.stdout, done.stderr
