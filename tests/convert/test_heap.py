"""The heap that threads share, in a process of its own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from convert.heap import one_heap
if sys.argv[1] == "one":
    assert one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
found = []
for _ in range(4):
    thread = threading.Thread(target=lambda: found.append(libc.malloc(1000) >> 26))
    thread.start(); thread.join()
print(len({*found, libc.malloc(1000) >> 26}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of glibc")
@pytest.mark.parametrize(("how", "heaps"), [("one", 1), ("many", 2)])
def test_threads_share_it(how, heaps):
    """A thread's heap of its own begins at a multiple of 64 MB; by `malloc`'s addresses."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = int(done.stdout)
    assert found == 1 if heaps == 1 else found >= 2
