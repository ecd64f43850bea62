"""`export_diffusers`: a converted folder back to a folder that diffusers loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convert import __main__ as convert_cli
from convert import export
from convert.checkpoint_files import open_checkpoint

MODEL = Path(__file__).parents[2] / "checkpoints" / "nouns-flux"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "float"
    assert convert_cli.main([str(MODEL), "--recipe", "float", "--out", str(out)]) == 0
    return out


def test_float_round_trip_is_the_shipped_file(converted, tmp_path):
    """Every tensor, bit for bit, under its own name; and the same config."""
    assert export.main([str(converted), "--out", str(tmp_path / "back")]) == 0
    with open_checkpoint(MODEL) as before, open_checkpoint(tmp_path / "back") as after:
        assert before.names == after.names
        assert before.config == after.config
        for name in before.names:
            left, right = before.read(name), after.read(name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left.view(np.uint16), right.view(np.uint16))


def test_refuses_a_folder_in_use_and_a_wrong_source(converted, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert export.main([str(converted), "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert export.main([str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
