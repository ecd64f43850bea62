"""The conversion benchmark on a narrow model: it runs, adds up, and leaves nothing behind."""

import re

import pytest

from benchmarks import convert


def test_figure_line(tmp_path, capsys):
    size = ["--blocks", "1", "1", "--hidden", "256"]
    convert.main([*size, "--dir", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("figure: ")
    found = {name: float(value) for name, value in re.findall(r"(\w+)=(-?[\d.]+)", last)}
    assert found["convert_MBps"] > 0
    assert 0 < found["overhead_MB"] < found["peak_rss_MB"] < 1000
    assert not any(tmp_path.iterdir())


def test_refuses_a_full_disk(tmp_path, monkeypatch):
    usage = convert.shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="not enough disk"):
        convert.main(["--blocks", "1", "1", "--hidden", "256", "--dir", str(tmp_path)])
    assert not any(tmp_path.iterdir())
