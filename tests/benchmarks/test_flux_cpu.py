"""The CPU benchmark of whole FLUX models, narrow: figures, what has no room, a checkpoint."""

import re

import pytest

from benchmarks import flux_cpu
from convert import __main__ as program
from tests.references.flux_files import PUBLISHED_HEADS, write_source

SIZE = ["--blocks", "1", "1", "--hidden", "256", "--pixels", "32", "--text", "5", "--rounds", "1"]


@pytest.mark.slow
def test_figures_and_what_has_no_room(capsys, monkeypatch):
    monkeypatch.setattr(flux_cpu, "available_memory", lambda: int(flux_cpu.ROOM + 6e6))
    flux_cpu.main([*SIZE, "--variants", "bf16", "ternary_a8"])
    out = capsys.readouterr().out
    assert "not run: bf16, needs 1.6 GB of memory" in out
    found = dict(re.findall(r"(\w+)=([\d.]+)", out.splitlines()[-1]))
    assert float(found["ternary_a8_s"]) > 0 and 0 < float(found["ternary_a8_peak_GB"]) < 2
    assert "bf16_s" not in found and "not finite" not in out


@pytest.mark.slow
def test_a_converted_checkpoint_runs(tmp_path, capsys):
    source = write_source(tmp_path / "source", PUBLISHED_HEADS)
    out = tmp_path / "out"
    assert program.main([str(source), "--recipe", "flux-1.58bit", "--out", str(out)]) == 0
    options = ["--checkpoint", str(out), "--variants", "bf16", "--pixels", "32", "--rounds", "1"]
    flux_cpu.main([*options, "--text", "5"])
    printed = capsys.readouterr().out
    assert "2 + 2 FLUX blocks, width 256" in printed
    assert re.search(r"figure: checkpoint_s=[\d.]+ checkpoint_peak_GB=[\d.]+$", printed.strip())


def test_an_unknown_variant_is_refused():
    with pytest.raises(SystemExit, match="'w3' is none of: bf16"):
        flux_cpu.main([*SIZE, "--variants", "w3"])
