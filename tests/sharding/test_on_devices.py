"""Results on eight virtual CPU devices, and on two processes, are those of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = 2e-6  # sums of 1024 products in another order; 1.1e-6 measured


def start(name, *arguments, devices=8):
    cache = jax.config.jax_compilation_cache_dir
    extra = {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    extra["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.references.sharded", name, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


def run(*arguments):
    return result(start(*arguments))


@pytest.mark.slow
def test_products_and_their_gradients():
    """Integer products are equal to the bit however they are split: their sums are exact, and a
    row's scale is the whole row's. Where floats are summed over devices, the order differs; so it
    may in a rotation, which is a product itself and may move a code."""
    found = run("products")
    assert found.pop("rows without a number") == [[0, 2]]
    assert len(found) == 13
    rotated = found.pop("ternary-a8 inputs-rotated")
    assert rotated[0][1] < 2e-3
    for name, ((equal, relative), *gradient) in found.items():
        if "-a" in name.split()[0] and "groups" not in name:
            assert equal, (name, relative)
        assert relative < FLOAT32, (name, relative)
        assert all(relative < 1e-4 for _, relative in gradient), (name, gradient)
    assert sum(len(one) == 2 for one in found.values()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["float", "w4a16"])
def test_a_float_network(recipe):
    """Attention and products are summed in another order: float32 rounding, 1e-6 measured.

    Under "tensor" only the products by inputs are summed over devices and only modulation vectors
    and embedded text are gathered: nothing is moved between heads, parts or MLP features.
    """
    plans = ("tensor,2,4", "fsdp,4,1", "data,2,1")
    for plan, (_, relative, moved) in run("network", recipe, *plans).items():
        assert relative < 1e-5, plan
        if plan.startswith("tensor"):
            assert moved == ["all-gather", "all-reduce"]
        if plan.startswith("data"):
            assert moved == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "flux-1.58bit-a8"])
def test_a_network_of_integer_products(recipe):
    """Its products are exact; its attention is not, and 1e-7 there may round an activation to the
    next code, 1/127 of its row's largest: a few such steps are what is allowed."""
    for plan, (_, relative, _) in run("network", recipe, "tensor,2,4", "fsdp,4,1").items():
        assert relative < 0.02, plan


def test_a_checkpoint_is_read_into_shards(tmp_path):
    found = run("restored", tmp_path / "saved", "flux-1.58bit")
    assert found["same"] and found["lies"]
    # by hand: two layers, 512 outputs, 512 + 1024 inputs at two bits; a quarter of the inputs each
    assert found["whole"] == [2, 512, 384]
    assert found["share"] == [2, 512, 96]


@pytest.mark.slow
def test_two_processes():
    """`jax.distributed` over loopback: each process holds two of four shares."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [start("two_processes", rank, address, devices=2) for rank in (0, 1)]
    for found in [result(process) for process in both]:
        assert (found["processes"], found["devices"], found["mine"]) == (2, 4, 2)
        assert found["difference"][1] < 0.02  # see the test above
