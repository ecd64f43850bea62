"""A conversion that is killed and resumed gives, file by file, what an uninterrupted one gives."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import job as conversion
from lowbit_jax import checkpoint_journal, checkpoint_writer
from lowbit_jax.checkpoint import load, read_manifest
from tests.references.flux_files import TINY, write_source

ROOT = Path(__file__).resolve().parents[2]
CONFIG = dataclasses.replace(TINY, depth=0, depth_single_blocks=2)
PARTS = ("outer", "single_blocks.0", "single_blocks.1")


def files(folder):
    """Every file below a folder, with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_killed(*runs):
    """[(calls made, exit status)] of conversions that die at a step."""
    command = [sys.executable, "-m", "tests.references.interrupted", json.dumps({"runs": runs})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def arguments(source, out, *options, recipe="w8a8"):
    return [str(source), "--recipe", recipe, "--out", str(out), *options]


@pytest.fixture
def interrupted(convert, tmp_path, source, monkeypatch):
    """A conversion that ended, as far as the disk can tell, after its second part."""
    write = checkpoint_writer.Writer.write

    def stop(self, name, *rest):
        if name == "single_blocks/1":
            raise KeyboardInterrupt
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.Writer, "write", stop)
        code, _, (error,) = convert(source)
    partial = tmp_path / ".out.partial"
    assert code == 130
    assert error == (
        f"convert_and_quantize: interrupted; 2 finished part(s) are kept in {partial}; "
        "--resume goes on from there"
    )
    return partial


@pytest.fixture
def whole(convert, tmp_path, source):
    """The files of an uninterrupted conversion."""
    assert convert(source, out="whole")[0] == 0
    return files(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_at_any_point(convert, tmp_path, source):
    """At every journal line (torn), the rename, removals, random steps, and inside orbax."""
    full = tmp_path / "full"
    ((calls, status),) = run_killed([None, None, arguments(source, full, recipe="float")])
    assert status == 0
    whole = files(full)
    assert calls.count("write") == 1 + len(PARTS) and calls.count("rename") == 1
    renamed = calls.index("rename") + 1
    points = [i for i, name in enumerate(calls) if name in ("write", "rename")]
    points += [1, *random.Random(0).sample(range(2, renamed), 4)]
    points += [renamed, *random.Random(1).sample(range(renamed + 1, len(calls)), 1), len(calls) - 1]
    deaths = [(point, None) for point in points]
    *_, first, last = (i for i, name in enumerate(calls[:renamed]) if name == "mkdir")
    deaths += [(first, 0.002), (last, 0.004)]
    outs = [tmp_path / f"killed-{i}" for i in range(len(deaths))]
    runs = [
        [*death, arguments(source, out, recipe="float")]
        for death, out in zip(deaths, outs, strict=True)
    ]
    for (made, status), (point, delay) in zip(run_killed(*runs), deaths, strict=True):
        assert made[:point] == calls[:point]
        assert status == (-signal.SIGALRM if delay else -signal.SIGKILL)
        assert delay or len(made) == point
    for (point, _), out in zip(deaths, outs, strict=True):
        assert out.exists() == (point >= renamed)
        code, _, errors = convert(source, "--resume", recipe="float", out=out.name)
        assert (code, errors) == (0, []), (point, calls[point])
        assert files(out) == whole, (point, calls[point])
    assert not [path.name for path in tmp_path.iterdir() if ".partial" in path.name]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux for a file's name")
def test_a_part_counts_only_when_it_is_on_the_disk(convert, source, monkeypatch):
    """The order of fsync and journal; what a power cut would leave cannot be tried here."""
    append, fsync = checkpoint_journal.Journal.append, os.fsync
    synced, checked = set(), []

    def note(handle):
        fsync(handle)
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def check(self, entry):
        folder = Path(self._file.name).parent / "checkpoint" / "params"
        new = {folder}
        if "part" in entry:
            part = folder / entry["part"].replace("/", ".")
            new |= {part, *part.rglob("*")}
        assert new <= synced
        checked.append(len(new))
        synced.clear()
        append(self, entry)
        assert synced == {Path(self._file.name)}

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(checkpoint_journal.Journal, "append", check)
    assert convert(source)[0] == 0
    assert len(checked) == 1 + len(PARTS) and min(checked[1:]) > 20
    assert any(path.name == "manifest.json" for path in synced)
    assert source.parent in synced  # the rename


def test_a_kill_while_an_earlier_checkpoint_is_replaced(convert, tmp_path, source):
    """It is whole in one of two places, and a resumed conversion ends with the new one."""
    assert convert(source, "--dtype", "f32", recipe="float", out="old")[0] == 0
    old = files(tmp_path / "old")
    outs = [tmp_path / name for name in ("full", *"abc")]
    for out in outs:
        shutil.copytree(tmp_path / "old", out)
    given = [arguments(source, out, "--overwrite", recipe="float") for out in outs]
    ((calls, status),) = run_killed([None, None, given[0]])
    whole = files(outs[0])
    assert status == 0 and whole != old and calls.count("rename") == 2
    first = calls.index("rename")
    killed = run_killed(*([first + i, None, args] for i, args in enumerate(given[1:])))
    assert [status for _, status in killed] == [-signal.SIGKILL] * 3
    assert files(outs[1]) == old
    assert not outs[2].exists() and files(tmp_path / ".b.partial" / "replaced") == old
    code, _, (error,) = convert(source, "--overwrite", recipe="float", out="b")
    assert code == 2 and "it holds the only copy of the earlier b, in " in error
    assert files(outs[3]) == whole
    for out in outs[1:]:
        options = ("--overwrite", "--resume")
        assert convert(source, *options, recipe="float", out=out.name)[0] == 0
        assert files(out) == whole
    assert not [path.name for path in tmp_path.iterdir() if ".partial" in path.name]


def test_what_is_there_is_said_and_not_made_again(
    convert, tmp_path, source, interrupted, whole, monkeypatch
):
    write, written = checkpoint_writer.Writer.write, []

    def note(self, name, *rest):
        written.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(checkpoint_writer.Writer, "write", note)
    code, out, _ = convert(source, "--resume")
    assert code == 0 and written == ["single_blocks/1"]
    assert re.search(
        r"resume: 2 of 3 parts are there, equal to their digests \(0\.\d of 0\.\d MB of the "
        r"source\); to be made: single_blocks/1\n",
        out,
    )
    assert files(tmp_path / "out") == whole
    code, out, _ = convert(source, "--resume")  # again: nothing to do, and that is no error
    assert code == 0 and "resume: the checkpoint had been finished" in out
    assert written == ["single_blocks/1"] and files(tmp_path / "out") == whole


def test_resume_with_nothing_there_begins(convert, tmp_path, source, whole):
    code, out, _ = convert(source, "--resume")
    assert code == 0 and "resume: nothing is there; beginning" in out
    assert files(tmp_path / "out") == whole
    assert convert(source, "--resume", recipe="float")[0] == 2  # another one: not overwritten
    assert files(tmp_path / "out") == whole


def test_without_resume_it_is_named_and_left(convert, refused, source, interrupted):
    for options in ([], ["--overwrite"]):
        said = refused(source, *options)
        assert f"an interrupted conversion is in {interrupted}; pass --resume" in said
    assert "--resume goes on with a conversion and --dry-run" in refused(
        source, "--resume", "--dry-run"
    )
    shutil.rmtree(interrupted)
    assert convert(source)[0] == 0


def test_another_conversion_is_refused_by_name(
    convert, refused, tmp_path, source, interrupted, whole, monkeypatch
):
    other = write_source(tmp_path / "other", CONFIG, **{"proj_out.bias": np.ones(8, np.float32)})
    single = next(source.glob("*.safetensors")).name
    (tmp_path / "renamed").mkdir()
    for path in source.iterdir():
        name = path.name.replace("diffusion_pytorch_model", "model")
        shutil.copy(path, tmp_path / "renamed" / name)
    keep = ("--keep", "single_blocks/./linear1")
    cases = [
        (other, (), {}, f"source.files.{single} was '"),
        (tmp_path / "renamed", (), {}, f"source.files.{single} was '"),
        (source, (), {"recipe": "w8a16"}, "recipe.name was 'w8a8', is now 'w8a16'"),
        (source, keep, {}, "recipe.name was 'w8a8', is now 'w8a8 keeping single_blocks"),
        (source, ("--dtype", "f32"), {}, "dtype was 'bfloat16', is now 'float32'"),
        (source, ("--archive",), {}, "archive was False, is now True"),
    ]
    for given, options, changes, message in cases:
        said = refused(given, "--resume", *options, **changes)
        assert f"{interrupted} was another one: {message}" in said
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "LAYOUT_VERSION", 2)
        assert "layout_version was 1, is now 2" in refused(source, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "library_versions", lambda: {"jax": "0.1"})
        assert "versions.lowbit-jax was " in refused(source, "--resume")
    assert convert(source, "--resume")[0] == 0
    assert files(tmp_path / "out") == whole


def largest(folder):
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def flip(partial):
    path = largest(partial / "checkpoint" / "params" / "outer")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def lose_a_file(partial):
    largest(partial / "checkpoint" / "params" / "outer").unlink()


def add_a_file(partial):
    (partial / "checkpoint" / "params" / "outer" / "more").write_text("")


def half_write(partial):
    folder = partial / "checkpoint" / "params"
    shutil.copytree(folder / "outer", folder / "single_blocks.1")
    (partial / "checkpoint" / "manifest.json").write_text('{"format": "low')


@pytest.mark.parametrize(
    ("damage", "message", "remade"),
    [
        (flip, "outer is not what the journal says", 1),
        (lose_a_file, "outer is not what the journal says", 1),
        (add_a_file, "outer is not what the journal says", 1),
        (lambda partial: shutil.rmtree(partial / "checkpoint/params/outer"), "outer is missing", 1),
        (lambda partial: shutil.rmtree(partial / "checkpoint"), "single_blocks/0 is missing", 2),
        (half_write, "params/single_blocks.1 was half written", 0),
        (half_write, "manifest.json was half written", 0),
    ],
)
def test_a_part_that_is_not_whole_is_made_again(
    convert, tmp_path, source, interrupted, whole, damage, message, remade
):
    damage(interrupted)
    code, out, _ = convert(source, "--resume")
    assert code == 0 and f"resume: {message}; removed" in out
    assert f"resume: {2 - remade} of 3 parts are there" in out
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_interruption_while_parts_are_checked_loses_none(
    convert, snapshot, tmp_path, source, interrupted, whole, monkeypatch, error
):
    def fail(folder):
        raise error

    before = snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "tree_digest", fail)
        code, _, (said,) = convert(source, "--resume")
    assert code in (2, 130) and f"2 finished part(s) are kept in {interrupted}; --resume" in said
    assert snapshot() == before
    assert convert(source, "--resume")[0] == 0
    assert files(tmp_path / "out") == whole


def test_what_is_removed_at_exit_is_never_a_kept_part(interrupted):
    """The hook for what orbax goes on writing after a failure runs when a notebook ends, say."""
    part = interrupted / "checkpoint" / "params" / "outer"
    checkpoint_writer._remove_late(part, interrupted)
    assert part.exists()
    (interrupted / "journal").unlink()
    checkpoint_writer._remove_late(part, interrupted)
    assert not part.exists() and interrupted.exists()  # another part is in it
    checkpoint_writer._remove_late(part.with_name("single_blocks.0"), interrupted)
    assert not interrupted.exists()


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_torn_line_of_the_journal_does_not_count(
    convert, tmp_path, source, interrupted, whole, cut
):
    raw = (interrupted / "journal").read_bytes()
    assert raw.count(b"\n") == 3
    (interrupted / "journal").write_bytes(raw[:-cut])
    code, out, _ = convert(source, "--resume")
    assert code == 0 and "1 of 3 parts are there" in out
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("line", [1, 2])
def test_a_flipped_bit_in_the_journal_costs_a_part(
    convert, tmp_path, source, interrupted, whole, line
):
    lines = (interrupted / "journal").read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b"sha256", b"sha257", 1)
    (interrupted / "journal").write_bytes(b"\n".join(lines))
    code, out, _ = convert(source, "--resume")
    assert code == 0 and "1 of 3 parts are there" in out
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("change", [lambda raw: b"", lambda raw: b"z" + raw[1:]])
def test_a_journal_that_does_not_say_what_is_made_is_refused(refused, source, interrupted, change):
    path = interrupted / "journal"
    path.write_bytes(change(path.read_bytes()))
    assert path.read_bytes()[:1] in (b"", b"z")
    assert "the first line of its journal is damaged; remove that folder" in refused(
        source, "--resume"
    )


def test_what_is_wrong_with_the_source_keeps_nothing(convert, tmp_path, make_source):
    bad = {"single_transformer_blocks.1.proj_out.bias": np.full(64, np.nan, np.float32)}
    code, _, (error,) = convert(make_source(**bad), "--resume")
    assert code == 2 and "NaN or inf in single_blocks/1/linear2/bias" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bad_numbers_that_are_kept_survive_an_interruption(convert, make_source, tmp_path):
    bad = {"single_transformer_blocks.0.proj_out.bias": np.full(64, np.nan, np.float32)}
    source = make_source(**bad)
    recipe = tmp_path / "recipe.json"
    rule = {"match": ".*", "weights": {"format": "int8", "quantizer": "absmax"}}
    recipe.write_text(json.dumps({"name": "mine", "rules": [rule], "on_nonfinite": "keep"}))
    write = checkpoint_writer.Writer.write
    with pytest.MonkeyPatch.context() as patch:
        stop = lambda self, name, *rest: name == "single_blocks/1" or write(self, name, *rest)  # noqa: E731
        patch.setattr(checkpoint_writer.Writer, "write", stop)
        patch.setattr(
            checkpoint_writer.Writer, "finish", lambda self: (_ for _ in ()).throw(OSError(5, "x"))
        )
        assert convert(source, recipe=recipe)[0] == 2
    code, out, _ = convert(source, "--resume", recipe=recipe)
    assert code == 0 and "NaN or inf kept, in floating point: single_blocks/0/linear2/bias\n" in out
    assert read_manifest(tmp_path / "out")["nonfinite"] == {
        "single_blocks/0": ["single_blocks/0/linear2/bias"]
    }


def test_files_do_not_depend_on_threads_or_shards(convert, tmp_path, source, whole, monkeypatch):
    for threads in (1, 4):
        monkeypatch.setattr(conversion, "THREADS", threads)
        assert convert(source, out=f"threads-{threads}")[0] == 0
        assert files(tmp_path / f"threads-{threads}") == whole
    shards = write_source(tmp_path / "shards", CONFIG, max_shard_bytes=100_000)
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert convert(shards, out="sharded")[0] == 0
    found = files(tmp_path / "sharded")
    manifests = [json.loads(x.pop(Path("manifest.json"))) for x in (found, dict(whole))]
    assert manifests[0] | {"source": None} == manifests[1] | {"source": None}
    assert found == {path: raw for path, raw in whole.items() if path.name != "manifest.json"}


def test_the_shipped_model_interrupted(convert, tmp_path):
    source = ROOT / "checkpoints" / "nouns-flux"
    assert convert(source, recipe="flux-1.58bit", out="whole")[0] == 0
    ((_, status),) = run_killed(
        [250, None, arguments(source, tmp_path / "out", recipe="flux-1.58bit")]
    )
    assert status == -9
    code, out, _ = convert(source, "--resume", recipe="flux-1.58bit")
    assert code == 0 and re.search(r"resume: [1-6] of 7 parts are there", out)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert load(tmp_path / "out").model == "flux"
