"""What the journal promises by itself; tests/convert/test_resume.py goes on with conversions."""

import errno
import os

import pytest

from lowbit_jax.checkpoint_journal import Journal, difference
from lowbit_jax.checkpoint_store import OutputError


def test_a_difference_is_named():
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a.1.b was 2, is now 3"
    assert difference({"a": [1]}, {"a": [1, 2]}) == "a was [1], is now [1, 2]"
    assert difference({"a": 1}, {"b": 1}) == "a was 1, is now None"
    assert difference({"a": "x" * 200}, {"a": 1}).count("x") == 79


def test_a_line_that_does_not_fit_on_the_disk_leaves_none(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append({"part": "a"})
    before = (tmp_path / "journal").read_bytes()
    write = os.write

    def full(handle, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:15])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append({"part": "b"})
    assert (tmp_path / "journal").read_bytes() == before
    journal.append({"part": "c"})
    with pytest.raises(OutputError, match="another conversion is writing there"):
        Journal(tmp_path)
    journal.close()
    again = Journal(tmp_path)
    assert again.entries == [{"part": "a"}, {"part": "c"}]
    again.close()
