"""The `convert_and_quantize` program and a small source for it."""

import dataclasses

import pytest

from convert import __main__ as program
from tests.references.flux_files import TINY, write_source

CONFIG = dataclasses.replace(TINY, depth=0, depth_single_blocks=2)


@pytest.fixture
def make_source(tmp_path):
    """Write a random FLUX, with changes of `write_source`, and return its folder."""

    def make(name="source", config=CONFIG, **changes):
        return write_source(tmp_path / name, config, **changes)

    return make


@pytest.fixture
def source(make_source):
    return make_source()


@pytest.fixture
def snapshot(tmp_path):
    """Every file and folder below a folder (the test's own), with the contents."""

    def take(folder=tmp_path):
        paths = sorted(folder.rglob("*"), key=str)
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    return take


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the program in this process: (code, stdout, lines of stderr)."""

    def run(source, *options, recipe="w8a8", out="out"):
        where = ["--out", str(tmp_path / out)] if out else []
        code = program.main([str(source), "--recipe", str(recipe), *where, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def refused(convert, snapshot):
    """Run the program on something bad: what it says, after checking that nothing is left."""

    def run(source, *options, lines=1, **changes):
        before = snapshot()
        code, _, errors = convert(source, *options, **changes)
        assert code == 2
        assert lines in (None, len(errors)), errors
        assert errors[0].startswith("convert_and_quantize: ")
        assert snapshot() == before
        return "\n".join(errors)

    return run
