"""What every test runs under: the CPU, a compilation cache shared by all runs, one torch thread."""

import contextlib
import os

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from hypothesis import settings
from jax import sharding

CACHE_BYTES = 1 << 30  # a bound makes jax lock the cache, which the test processes share

settings.register_profile("lowbit", deadline=None)  # the first example compiles
settings.load_profile("lowbit")

try:
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)  # the test processes already share the cores


def pytest_configure(config):
    cache = getattr(config, "cache", None)  # None under -p no:cacheprovider
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (set JAX_PLATFORMS=cuda)"))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let compiled programs go after every file: each takes memory and, on Linux, some of the
    65,530 memory maps of a process; a worker that keeps those of all files dies of either."""
    yield
    jax.clear_caches()


@pytest.fixture
def lower_for_cuda():
    """lower(f, *specs, **named): f for a CUDA device as StableHLO, Triton calls in it."""

    def lower(f, *specs, **named):
        with _described_gpu():
            traced = jax.jit(f).trace(*specs, **named)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.custom_call @__gpu$xla.gpu.triton" in text
        return text

    return lower


def _described_gpu():
    """From jax 0.11 on, lowering for Triton asks which GPU it is for."""
    if tuple(map(int, jax.__version_info__[:2])) < (0, 11):
        return contextlib.nullcontext()
    device = sharding.AbstractDevice("NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    return sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=device))
