"""The parity benchmark: it runs, it covers the registries, and it sees a wrong network."""

import re

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="the reference is diffusers")

from benchmarks import parity
from benchmarks.parity_cases import CASES
from benchmarks.parity_samplers import RUNS
from lowbit_jax.models.registry import NETWORKS
from lowbit_jax.samplers.registry import SAMPLERS

DIT = next(case for case in CASES if case.model == "dit" and case.layout == "diffusers")


def test_every_network_layout_and_sampler_is_there():
    """A new one needs an entry in benchmarks/parity_cases.py (docs/adding-a-model.md)."""
    parity.check_complete(CASES)
    assert {case.model for case in CASES} == set(NETWORKS)
    assert set(RUNS) == set(SAMPLERS)
    for case in CASES:
        assert case.sampler in NETWORKS[case.model].samplers


def test_a_layout_without_an_entry_is_named():
    with pytest.raises(SystemExit, match=r"no entry .* for: dit \(diffusers\)$"):
        parity.check_complete([case for case in CASES if case is not DIT])


def test_figure_line(monkeypatch, capsys):
    monkeypatch.setattr(parity, "CASES", (DIT,))
    monkeypatch.setattr(parity, "check_complete", lambda cases: None)
    assert parity.main(["--quick"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"figure: worst_relative_error=(\S+) models=1 layouts=1", last)
    assert 0 < float(found[1]) < 5e-5  # float32; see tests/models/test_dit.py
    assert any(re.search(r"dit +diffusers +small", line) for line in lines)


def test_an_error_over_the_limit_fails(monkeypatch, capsys):
    for error in (0.5, float("inf")):
        result = parity.Result(case=DIT, size="small", forward=0.0, trajectory=error, seconds=0.0)
        monkeypatch.setattr(parity, "measure", lambda *a, r=result: r)
        assert parity.main(["--quick"]) == 1
        assert f"worst_relative_error={error:.2e} models" in capsys.readouterr().out


def test_what_is_not_finite_is_an_infinite_error():
    ones = np.ones(3)
    assert parity.relative_error(np.array([1, np.nan, 1]), ones) == float("inf")
    assert parity.relative_error(np.array([1, 1.5, 1]), ones) == 0.5
    with pytest.raises(AssertionError):
        parity.relative_error(np.ones((1, 3)), ones)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_both_sides_of_a_sampler_run_the_same(name):
    """On a denoiser of one formula in two libraries; the schedules themselves are tested in
    tests/samplers."""
    import jax
    import jax.numpy as jnp

    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)
    learned = name == "ddpm"

    def denoise(x, t, xp):
        t = t.reshape(-1, 1, 1, 1) if name == "flow-euler" else t.reshape(-1, 1, 1, 1) / 1000
        out = 0.8 * x + 0.3 * xp.sin(2 * x + 5 * t)
        return xp.concatenate([out, xp.sin(x)], 1) if learned else out

    run = RUNS[name]
    ours = jax.jit(lambda x: run.ours(lambda x, t: denoise(x, t, jnp), x))(noise)
    theirs = run.theirs(lambda x, t: denoise(x, t.astype(np.float32), np), noise)
    assert parity.relative_error(np.asarray(ours), theirs) < 1e-5
    assert np.abs(theirs - noise).max() > 0.1
