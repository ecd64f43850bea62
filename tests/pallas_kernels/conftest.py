"""Lowering for CUDA where there is none."""

import contextlib

import jax
import pytest
from jax import sharding


@pytest.fixture
def lower_for_cuda():
    """lower(f, *specs): the StableHLO text of f for a CUDA device; the Triton call is in it."""

    def lower(f, *specs):
        with _described_gpu():
            traced = jax.jit(f).trace(*specs)
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
