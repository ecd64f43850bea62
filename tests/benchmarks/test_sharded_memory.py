"""The benchmarks of several devices and of modulations: all but the compilations themselves."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from benchmarks import modulation_memory, sharded_memory
from benchmarks.workloads import WORKLOADS, flux_workload
from lowbit_jax.models.flux import FluxConfig
from pallas_kernels.audit.compile import ToolError

TINY = FluxConfig(
    in_channels=4,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=16,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
)


def test_figures_of_several_devices(monkeypatch, capsys):
    def made_up(work, recipe, plan, mesh, platform):
        bytes_each = 8_000_000 // (1 if recipe == "float" else 4) // mesh
        return sharded_memory.Share(
            arguments=bytes_each, temporaries=1_000_000, collectives=Counter({"all-reduce": 3})
        )

    monkeypatch.setattr(sharded_memory, "mesh_of", lambda platform, count, axis: count)
    monkeypatch.setattr(sharded_memory, "share", made_up)
    options = ["--recipes", "float", "w8a8", "--devices", "2", "4"]
    assert sharded_memory.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["tensor", "w8a8", "4", "0.5", "1.0", "1.5"] in [line.split() for line in lines]
    assert "  tensor float on 2: 3 all-reduce" in lines
    assert lines[-1] == (
        "figure: tensor_float_a100x2_GB=0.005 tensor_w8a8_a100x2_GB=0.002 "
        "tensor_float_a100x4_GB=0.003 tensor_w8a8_a100x4_GB=0.002"
    )


def test_what_is_missing_is_said(monkeypatch, capsys):
    assert sharded_memory.main(["--model", "unet"]) == 2
    assert sharded_memory.main(["--platform", "v5e", "--devices", "3"]) == 2
    assert "3 devices of 'v5e' are not described" in capsys.readouterr().err

    def missing(*_):
        raise ToolError("jax-cuda12-plugin is not installed")

    monkeypatch.setattr(modulation_memory, "compile_program", missing)
    monkeypatch.setitem(WORKLOADS, "flux", flux_workload(TINY, 64, 3))
    assert modulation_memory.main(["--recipes", "float"]) == 2
    assert "is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["float", "w8a8"])
def test_the_programs_about_modulations_fit_together(recipe):
    """By hand: a double block has two streams of six vectors, a single block three."""
    programs = modulation_memory.programs(flux_workload(TINY, 64, 3), recipe, steps=5)
    made = jax.eval_shape(*_flat(programs[modulation_memory.FIRST]))
    shapes = {leaf.shape for leaf in jax.tree.leaves(made)}
    assert shapes == {(5, 1, 1, 16), (5, 1, 16)} and len(jax.tree.leaves(made)) == 17
    now = jax.eval_shape(*_flat(programs[modulation_memory.NOW]))
    given = jax.eval_shape(*_flat(programs[modulation_memory.GIVEN]))
    assert (now.shape, now.dtype) == (given.shape, given.dtype) == ((1, 16, 4), jnp.bfloat16)


def _flat(program):
    fn, specs = program
    return (fn, *specs)
