"""The CPU benchmark: its parameters stand for those of a recipe, its ratios are the rounds'."""

import itertools
import re
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import cpu_matmul, timing
from lowbit_jax.models import flux
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize


@pytest.mark.slow
def test_figure_line(capsys):
    size = ["--hidden", "128", "--tokens", "16", "8", "--blocks", "1", "1", "--rounds", "1"]
    cpu_matmul.main([*size, "--no-layers"])
    *lines, last = capsys.readouterr().out.splitlines()
    names = re.findall(r"(\w+)_vs_bf16=\d+\.\d{3}", last)
    assert last.startswith("figure: w8a8_vs_bf16=") and names == ["w8a8", "ternary", "ternary_a8"]
    assert all(any(line.strip().startswith(name) for line in lines) for name in names)


def test_every_form_of_a_layer_is_timed():
    times = cpu_matmul.time_layer(3, 256, 32, rounds=2)
    assert len(times) == 7 and all(len(t.seconds) == 2 and t.best > 0 for t in times.values())
    text = cpu_matmul.layers_table(3, {"256 x 32": times})
    assert text.row_count == 7


@pytest.mark.parametrize("recipe", list(cpu_matmul.BLOCKS.values()))
def test_random_parameters_have_the_shapes_of_quantised_ones(recipe):
    config = flux.FluxConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2)
    made = cpu_matmul.random_params(config, recipe)
    real = jax.eval_shape(partial(quantize, recipe=RECIPES[recipe]), flux.abstract_params(config))
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for got, want in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert np.asarray(got, np.float32).any()


def test_ratios_are_taken_within_a_round(monkeypatch):
    """A machine that slows down by half each round: the ratio stays what it is, 2."""
    clock = itertools.accumulate([0, 1, 0, 2, 0, 2, 0, 4, 0, 4, 0, 8])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing.time, "process_time", itertools.count().__next__)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = timing.interleaved(calls, rounds=3)
    assert order == ["a", "b"] * 4  # once to warm up, then by turns
    assert (times["a"].seconds, times["b"].seconds) == ((1, 2, 4), (2, 4, 8))
    assert times["b"].ratio(times["a"]) == 2 and times["a"].busy_ratio(times["b"]) == 1
    assert (times["b"].median, times["b"].best) == (4, 2)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.interleaved(calls, rounds=0)
