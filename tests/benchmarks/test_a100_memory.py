"""The memory benchmark: its arithmetic anywhere, its compilations where there is the compiler."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import a100_memory, workloads
from benchmarks.a100_memory import CHUNKED, CUDNN, FLOAT, QUANTIZED, TERNARY, Footprint
from benchmarks.workloads import WORKLOADS
from lowbit_jax.models import attention
from lowbit_jax.models.flux import FluxConfig
from lowbit_jax.models.registry import NETWORKS
from pallas_kernels.audit.compile import ToolError, check_tools, compile_program
from pallas_kernels.audit.targets import TARGETS

# a program for a GPU that is not there can be written to jax's cache, but not be read from it
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@pytest.fixture
def compiler():
    try:
        check_tools()
    except ToolError as error:
        pytest.skip(str(error))


def tiny_flux(depth=2):
    config = FluxConfig(
        in_channels=16,
        vec_in_dim=32,
        context_in_dim=64,
        hidden_size=256,
        num_heads=4,
        depth=depth,
        depth_single_blocks=depth,
        axes_dim=(16, 24, 24),
    )
    return workloads.flux_workload(config, pixels=256, text=32)


def test_every_network_of_the_registry_is_measured():
    assert set(WORKLOADS) == set(NETWORKS)
    assert all(name == work.network for name, work in WORKLOADS.items())


def test_workloads_are_those_of_the_published_pictures():
    """By hand: 1024 / 8 / 2 = 64 patches a side; 512 / 8 / 2 = 32."""
    flux, dit = WORKLOADS["flux"], WORKLOADS["dit"]
    assert flux.config == FluxConfig()
    assert [x.shape for x in flux.inputs[:2]] == [(1, 4096, 64), (1, 512, 4096)]
    assert (dit.config.grid, dit.inputs[0].shape) == (32, (2, 4, 64, 64))


@pytest.mark.parametrize("name", NETWORKS)
def test_workloads_fit_their_networks(name):
    work = WORKLOADS[name]
    model = NETWORKS[name].module(work.config, jnp.bfloat16)
    params = {"params": a100_memory.abstract_params(work, FLOAT)}
    out = jax.eval_shape(model.apply, params, *work.inputs)
    assert (out.shape[0], out.dtype) == (work.inputs[0].shape[0], jnp.bfloat16)


def test_weights_of_blocks_by_hand():
    """FLUX.1-dev's tables: 11,834,228,736 weights; a double block has two streams."""
    everything, largest = a100_memory.weights(WORKLOADS["flux"])
    assert everything == 11_834_228_736
    assert largest == 2 * 3072 * (6 * 3072 + 3 * 3072 + 3072 + 2 * 4 * 3072)


def test_figure_line_and_table(monkeypatch, capsys):
    sizes = {FLOAT: 1000, "w8a8": 500, "w4a8": 250, TERNARY: 100, "flux-1.58bit-a8": 100}

    def made_up(work, recipe, *, fused=True):
        form, temporaries = (CUDNN, 100) if fused else (CHUNKED, 400)
        return Footprint(
            attention=form,
            arguments=sizes[recipe] * 10**6,
            temporaries=temporaries * 10**6,
            output=10**6,
            peak=10**6,
        )

    monkeypatch.setattr(a100_memory, "footprint", made_up)
    monkeypatch.setattr(attention, "cudnn_is_known", lambda: True)
    assert a100_memory.main(["--models", "flux"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "figure: flux_ternary_memory_ratio=5.500 flux_w8a8_memory_ratio=1.833"
    chunked = next(line for line in lines if TERNARY in line and CHUNKED in line)
    assert chunked.split()[2:5] + chunked.split()[-1:] == ["100.0", "400.0", "500.0", "2.80"]
    assert "chunked attention takes +300.0 MB against cuDNN's" in lines
    assert all(any(recipe in line for line in lines) for recipe in (FLOAT, *QUANTIZED))


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    def missing(*_):
        raise ToolError("jax-cuda12-plugin is not installed; install it with: pip install ...")

    monkeypatch.setattr(a100_memory, "compile_program", missing)
    assert a100_memory.main([]) == 2
    captured = capsys.readouterr()
    assert "figure" not in captured.out and "pip install" in captured.err
    assert a100_memory.main(["--models", "unet"]) == 2
    assert "there are flux, dit, " in capsys.readouterr().err


def test_memory_of_a_program_by_hand(compiler):
    """Two arguments, one result; the product in between is the one temporary there can be."""
    x = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    compiled = compile_program(lambda a, b: jnp.sin(a @ b.T) @ b, (x, x), TARGETS["a100"])
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * 1024 * 512 * 4
    assert memory.output_size_in_bytes == 1024 * 512 * 4
    # a product may be given a workspace, or be split
    assert 1024 * 1024 * 4 <= memory.temp_size_in_bytes < 16 * 1024 * 1024 * 4


@pytest.mark.slow
def test_no_layer_is_unpacked_before_its_turn(compiler):
    """Eight blocks need the temporaries of two: XLA moves no unpacking out of the loop."""
    shallow, deep = tiny_flux(2), tiny_flux(8)
    ternary = {work: a100_memory.footprint(work, TERNARY).temporaries for work in (shallow, deep)}
    _, block = a100_memory.weights(shallow)
    assert ternary[shallow] - a100_memory.footprint(shallow, FLOAT).temporaries < block
    assert ternary[deep] - ternary[shallow] < block / 4


@pytest.mark.slow
def test_the_attention_named_is_the_attention_compiled(compiler):
    fused = a100_memory.footprint(tiny_flux(), FLOAT)
    chunked = a100_memory.footprint(tiny_flux(), FLOAT, fused=False)
    assert chunked.attention == CHUNKED
    assert fused.attention == (CUDNN if attention.cudnn_is_known() else CHUNKED)
    assert fused.temporaries <= chunked.temporaries


@pytest.mark.slow
def test_flux_dev_needs_what_the_readme_says(compiler):
    work = WORKLOADS["flux"]
    sizes = {recipe: a100_memory.footprint(work, recipe) for recipe in (FLOAT, "w8a8", TERNARY)}
    _, block = a100_memory.weights(work)
    assert sizes[TERNARY].temporaries - sizes[FLOAT].temporaries < block
    assert sizes[FLOAT].needed / sizes["w8a8"].needed >= 1.9
    assert sizes[FLOAT].needed / sizes[TERNARY].needed >= 6.8
