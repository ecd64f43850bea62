"""`convert_and_quantize` and the disk: whole or not at all, and nothing of anyone else's harmed."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from convert import __main__ as program
from lowbit_jax import checkpoint_store, checkpoint_writer
from lowbit_jax.checkpoint import load
from tests.references.flux_files import TINY

ROOT = Path(__file__).resolve().parents[2]
BAD = {"proj_out.bias": np.full(8, np.inf, np.float32)}  # noticed when it is read, no earlier


def start(source, out, *wrapper):
    """The program in a process of its own."""
    command = [sys.executable, "-m", "convert", str(source), "--recipe", "w8a8", "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*wrapper, *command], cwd=ROOT, **pipes)


def test_out_is_needed_unless_it_is_a_dry_run(refused, source):
    assert "give --out DIR, or --dry-run" in refused(source, out=None)


def test_an_earlier_conversion_is_replaced_only_when_asked(
    convert, refused, tmp_path, source, make_source
):
    assert convert(source)[0] == 0
    assert "exists already" in refused(source)
    assert convert(source, "--overwrite", recipe="float")[0] == 0
    assert load(tmp_path / "out").recipe.name == "float"
    bad = make_source("bad", **BAD)
    assert "NaN or inf" in refused(bad, "--overwrite")  # and the earlier one is still there, whole
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "nothing else, so --overwrite will not delete it" in refused(source, "--overwrite")


@pytest.mark.parametrize("manifest", [None, "{}", '{"format": "other"}', "not JSON"])
def test_overwrite_spares_what_it_did_not_write(refused, tmp_path, source, manifest):
    (tmp_path / "out" / "params").mkdir(parents=True)
    (tmp_path / "out" / "params" / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (tmp_path / "out" / "manifest.json").write_text(manifest)
    assert "--overwrite will not delete it" in refused(source, "--overwrite")
    (tmp_path / "file").write_text("mine")
    assert "--overwrite will not delete it" in refused(source, "--overwrite", out="file")


def test_the_source_is_never_the_output(convert, refused, snapshot, source):
    (source / "manifest.json").write_text('{"format": "lowbit-jax"}')
    assert "exists already" in refused(source, out="source")
    assert "--overwrite will not delete it" in refused(source, "--overwrite", out="source")
    before = snapshot(source)
    assert convert(source, out="source/inside")[0] == 0
    assert {path: data for path, data in snapshot(source).items() if path in before} == before
    assert load(source / "inside").model == "flux"


def test_folders_on_the_way_are_made_and_unmade(convert, refused, tmp_path, source, make_source):
    bad = make_source("bad", **BAD)
    refused(bad, out="a/b/out")
    assert convert(source, out="a/b/out")[0] == 0
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["out"]
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(source, out="file/out")


def test_a_link_is_followed(convert, tmp_path, source):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "disk").mkdir()
    for options in ([], ["--overwrite"]):
        assert convert(source, *options, out="link")[0] == 0
        assert (tmp_path / "link").is_symlink()
        assert load(tmp_path / "disk" / "real").model == "flux"
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_the_current_folder_can_be_replaced(convert, tmp_path, source, monkeypatch):
    assert convert(source)[0] == 0
    monkeypatch.chdir(tmp_path / "out")
    assert program.main([str(source), "--recipe", "float", "--out", ".", "--overwrite"]) == 0
    assert load(tmp_path / "out").recipe.name == "float"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_parent_that_may_not_be_written(refused, tmp_path, source):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused(source, out="locked/out")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that root cannot write")
def test_a_parent_that_nobody_can_write(convert, source, tmp_path):
    code, _, errors = convert(source, out="/proc/self/out")
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith("convert_and_quantize: /proc/self/out: cannot be written: ")


def test_a_disk_with_too_little_space(refused, source, monkeypatch):
    usage = type("Usage", (), {"total": 10**9, "used": 0, "free": 5000})
    monkeypatch.setattr(checkpoint_store.shutil, "disk_usage", lambda path: usage)
    said = refused(source)
    assert re.search("out: the disk is full: 0.0 MB free, the next layer takes 0.1 MB", said)


def test_a_disk_that_is_full_at_the_manifest(convert, source, monkeypatch):
    sync = checkpoint_writer.sync

    def full(path):
        if (path / "manifest.json").exists():
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint_writer, "sync", full)
    code, _, (error,) = convert(source)
    assert code == 2 and "out: the disk is full: " in error and "3 finished part(s)" in error
    monkeypatch.undo()
    assert convert(source, "--resume")[0] == 0


@contextmanager
def small_disk(folder, **limits):
    folder.mkdir()
    options = ",".join(f"{key}={value}" for key, value in limits.items())
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "limits", [{"size": "300k"}, {"size": "1m", "nr_inodes": 12}], ids=["bytes", "files"]
)
def test_a_disk_that_fills_up(convert, tmp_path, source, limits):
    """For real, in a process of its own: orbax leaves threads that go on writing."""
    with small_disk(tmp_path / "disk", **limits) as disk:
        process = start(source, disk / "out")
        _, error = process.communicate(timeout=300)
        assert process.returncode == 2
        said = r"convert_and_quantize: .*/disk/out: the disk is full: [\d.]+ MB free, the next .*\n"
        assert re.fullmatch(said, error)
        left = [path.name for path in disk.iterdir()]
        assert left == ([".out.partial"] if "--resume goes on from there" in error else [])
        # finished parts are kept, and finish on a disk that has become larger
        remount = f"remount,{'size=8m' if 'nr_inodes' not in limits else 'size=8m,nr_inodes=9999'}"
        subprocess.run(["mount", "-o", remount, str(disk)], check=True)
        assert convert(source, "--resume", out="disk/out")[0] == 0
        assert [path.name for path in disk.iterdir()] == ["out"]
        assert load(disk / "out").model == "flux"


def test_a_limit_on_the_size_of_files(tmp_path, source):
    process = start(source, tmp_path / "out", "sh", "-c", 'ulimit -f 20 && exec "$0" "$@"')
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    assert error == f"convert_and_quantize: {tmp_path}/out: cannot be written: File too large\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def wait_for_parts(folder):
    """Until a conversion in another process has finished a part, but not all."""
    for _ in range(3000):
        journal = folder / ".out.partial" / "journal"
        if journal.exists() and journal.read_bytes().count(b"\n") > 1:
            return
        time.sleep(0.01)
    raise AssertionError("nothing was written")


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_an_end_midway_leaves_nothing_under_the_name(tmp_path, make_source, kill):
    # many layers, so that a busy machine cannot finish them before the signal comes
    source = make_source(config=dataclasses.replace(TINY, depth=0, depth_single_blocks=400))
    process = start(source, tmp_path / "out")
    wait_for_parts(tmp_path)
    process.send_signal(kill)
    _, error = process.communicate(timeout=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
    if kill == signal.SIGINT:
        assert process.returncode == 130
        said = r"convert_and_quantize: interrupted; \d+ finished part\(s\) are kept in .*"
        assert re.fullmatch(f"{said}/.out.partial; --resume goes on from there\n", error)


def test_a_second_conversion_into_the_same_folder_is_refused(
    convert, snapshot, tmp_path, source, capsys, monkeypatch
):
    finish, said = checkpoint_writer.Writer.finish, []

    def meanwhile(self):
        before = snapshot()
        for options in ([], ["--resume"], ["--overwrite"]):
            arguments = [str(source), "--recipe", "float", "--out", str(tmp_path / "out")]
            assert program.main([*arguments, *options]) == 2
            said.extend(capsys.readouterr().err.splitlines())
        assert snapshot() == before
        finish(self)

    monkeypatch.setattr(checkpoint_writer.Writer, "finish", meanwhile)
    assert convert(source)[0] == 0
    assert len(said) == 3
    assert all("another conversion is writing" in line for line in said)
    assert load(tmp_path / "out").recipe.name == "w8a8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_output_that_appears_meanwhile_is_spared(convert, tmp_path, source, monkeypatch):
    finish = checkpoint_writer.Writer.finish

    def meanwhile(self):
        (tmp_path / "out").mkdir()
        finish(self)

    monkeypatch.setattr(checkpoint_writer.Writer, "finish", meanwhile)
    code, _, (error,) = convert(source)
    assert code == 2 and "exists already" in error and "finished part(s) are kept" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_that_python_dropped_is_not_lost():
    """As in a finaliser: what it raises is printed and dropped."""
    before = signal.getsignal(signal.SIGINT)
    with program._lasting_interrupts() as stop_if_asked:
        stop_if_asked()  # nobody has
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
    assert signal.getsignal(signal.SIGINT) is before
