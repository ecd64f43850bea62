"""Conversions that kill themselves (SIGKILL) at a chosen step that changes the disk.

    python -m tests.references.interrupted JSON

JSON: {"runs": [[step, delay, arguments], ...]}. Each run is a forked process. At its step-th call
of `STEPS` it dies in place of the call; where that writes, half of the bytes are written first.
With a delay (seconds) it makes the call and dies so much later, wherever it is then (SIGALRM, which
nobody handles). With step null it runs to its end. Prints, a line each, the list of calls a run
made and how it ended.
"""

import json
import os
import signal
import sys

STEPS = ("fsync", "write", "mkdir", "rename", "unlink", "rmdir")


def install(step, delay, report):
    """Count the calls of `STEPS` from the next one on and die at one; report every name."""
    count = 0
    write = os.write

    def wrap(name, function):
        def call(*args, **kwargs):
            nonlocal count
            if name == "write" and args[0] == report:
                return function(*args, **kwargs)
            if count == step and delay:
                signal.setitimer(signal.ITIMER_REAL, delay)
            elif count == step:
                if name == "write":
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            write(report, f"{name}\n".encode())
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, wrap(name, getattr(os, name)))


def run(step, delay, arguments):
    """(names of the calls, exit status) of one conversion in a process of its own."""
    read, report = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        from convert import __main__ as program

        install(step, delay, report)
        sys.stdout = open(os.devnull, "w")
        status = program.main(arguments)
        os._exit(status)  # as at the end of a program, but without what orbax does at exit
    os.close(report)
    with open(read) as calls:
        names = calls.read().split()
    return names, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    import convert.__main__  # noqa: F401  imported once, before the forks

    for each in json.loads(sys.argv[1])["runs"]:
        print(json.dumps(run(*each)), flush=True)
