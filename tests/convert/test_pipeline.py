"""Where a whole pipeline is converted to: whole or not there, replaced only when told to."""

import pytest

from convert.errors import CheckpointError
from convert.pipeline import find_pipeline, staged
from lowbit_jax.checkpoint import OutputError
from lowbit_jax.pipelines.folder import FLUX, INDEX


def made(out, text="new", **options):
    options = {"overwrite": False, "resume": False} | options
    with staged(out, FLUX, **options) as staging:
        assert staging.parent == out.resolve().parent and staging != out
        (staging / "part").write_text(text)
    return out


def files(folder):
    return {p.relative_to(folder): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_it_appears_whole_with_its_index(tmp_path):
    out = made(tmp_path / "a" / "out")
    assert set(map(str, files(out))) == {"part", INDEX}
    assert list(out.parent.iterdir()) == [out]


def test_only_a_pipeline_is_replaced_and_only_when_told_to(tmp_path):
    out = made(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        made(out)
    assert files(tmp_path) == before
    made(out, "newer", overwrite=True)
    assert (out / "part").read_text() == "newer" and list(tmp_path.iterdir()) == [out]
    (out / INDEX).unlink()
    with pytest.raises(OutputError, match="no lowbit-jax pipeline, so --overwrite will not delete"):
        made(out, overwrite=True)
    assert (out / "part").read_text() == "newer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_finished_stays_for_resume(tmp_path, error):
    out = tmp_path / "out"
    with (
        pytest.raises(error) as caught,
        staged(out, FLUX, overwrite=False, resume=False) as staging,
    ):
        (staging / "part").write_text("old")
        raise error
    assert "--resume goes on from there" in caught.value.__notes__[0]
    with pytest.raises(OutputError, match="pass --resume to go on with it"):
        made(out)
    with staged(out, FLUX, overwrite=False, resume=True) as staging:
        assert (staging / "part").read_text() == "old"
    assert files(tmp_path).keys() == {p.relative_to(tmp_path) for p in (out / "part", out / INDEX)}


def test_nothing_is_left_of_an_error_of_the_source_or_of_an_early_one(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), staged(tmp_path / "out", FLUX, overwrite=False, resume=False):
            raise error
        assert not list(tmp_path.iterdir())


def test_the_earlier_one_stays_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    from pathlib import Path

    out, rename = made(tmp_path / "out", "old"), Path.rename

    def fail(self, target):
        if self.name == ".out.pipeline":
            raise OSError("power cut")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="power cut"):
        made(out, overwrite=True)
    assert (out / "part").read_text() == "old"


def test_other_pipelines_are_left_to_their_transformer(tmp_path):
    assert find_pipeline(tmp_path) is None
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "PixArtSigmaPipeline"}')
    assert find_pipeline(tmp_path) is None
    index.write_text('{"_class_name": "FluxPipeline"}')
    assert find_pipeline(tmp_path) is FLUX
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        find_pipeline(tmp_path)
