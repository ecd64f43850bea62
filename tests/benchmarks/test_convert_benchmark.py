"""The conversion benchmark on narrow models: it runs, adds up, and leaves nothing behind."""

import re
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from benchmarks import convert
from benchmarks.torch_writer import write_torch
from convert.safetensors import TensorSpec
from convert.torch_file import TorchFile


@pytest.mark.parametrize(
    "size",
    [
        ["--blocks", "1", "1", "--hidden", "256"],
        ["--layout", "facebook", "--blocks", "2", "--hidden", "144", "--recipe", "w8a8"],
    ],
    ids=["flux", "dit"],
)
def test_figure_line(tmp_path, capsys, size):
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


def test_torch_reads_what_is_written_in_its_place(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "b.c": np.arange(3).astype(ml_dtypes.bfloat16),
        "d": np.float16(1.5).reshape(()),
    }
    specs = {
        name: TensorSpec(shape=x.shape, dtype=x.dtype, make=partial(np.asarray, x))
        for name, x in arrays.items()
    }
    write_torch(tmp_path / "a.pt", specs)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    with TorchFile(tmp_path / "a.pt") as file:
        assert file.names == tuple(arrays) == tuple(found)
        for name, x in arrays.items():
            assert file.read(name).tobytes() == x.tobytes()
            assert found[name].shape == x.shape and str(found[name].dtype) == f"torch.{x.dtype}"
            np.testing.assert_array_equal(found[name].float().numpy(), x.astype(np.float32))
