"""The comparison of converters on a narrow model: figures, refusals, nothing left behind."""

import re

import pytest

from benchmarks import convert_flux
from benchmarks.convert_rivals import RIVALS, Rival

SIZE = ["--blocks", "1", "1", "--hidden", "256", "--layouts", "diffusers"]


def test_figures_and_why_a_rival_did_not_run(tmp_path, capsys, monkeypatch):
    """Recipes with and without statistics; a rival that is not installed, one that has no room."""
    monkeypatch.setitem(RIVALS, "none", Rival(packages=("no_such_package",), quantize=print))
    monkeypatch.setitem(RIVALS, "large", Rival(packages=(), quantize=print))
    monkeypatch.setattr(convert_flux, "available_memory", lambda: 10**8)
    monkeypatch.setattr(Rival, "missing", property(lambda self: list(self.packages)))
    recipes = ["--recipes", "w8a8", "viditq-w8a8"]
    options = [*recipes, "--rivals", "none", "large", "--dir", str(tmp_path)]
    convert_flux.main([*SIZE, *options])
    out = capsys.readouterr().out
    assert "not installed: no_such_package" in out and "holds the model" in out
    found = dict(re.findall(r"(\w+)=([\d.]+)", out.splitlines()[-1]))
    assert float(found["convert_MBps"]) > 0 and 0 < float(found["peak_rss_GB"]) < 1
    # narrow: embedders and orbax's own files weigh more than in FLUX.1
    assert 1.3 < float(found["ratio"]) < 2
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_that_is_installed_runs(tmp_path, capsys, name):
    if RIVALS[name].missing:
        pytest.skip(f"needs {RIVALS[name].missing}")
    options = ["--recipes", "w8a8", "--rivals", name, "--dir", str(tmp_path)]
    convert_flux.main([*SIZE, *options])
    assert f"({name})" in capsys.readouterr().out
